"""The shared forward pass: logits at completion positions are those of the whole model."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen3Config,
)

from raydistill.errors import ModelError
from raydistill.messages import TeacherDense, TeacherTopK, TokenRows
from raydistill.tensors import CompletionModel, DenseTensors, SequenceBatch, TopKTensors, score_rows, target_tensors

VOCABULARY = 37
SHAPE = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "intermediate_size": 32, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "dtype": "float32",
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
PROMPTS = TokenRows.from_rows([[5, 6, 7], [8], [9, 10, 11, 12]])
COMPLETIONS = TokenRows.from_rows([[13, 14], [15, 16, 17, 18], []])


def make_model(config: PretrainedConfig) -> nn.Module:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def qwen() -> nn.Module:
    return make_model(Qwen3Config(**SHAPE, tie_word_embeddings=True))


def full_logits(model: nn.Module, prompt: np.ndarray, completion: np.ndarray) -> Tensor:
    """[completion tokens, V] of one sequence, without padding, by the model's own forward."""
    ids = torch.tensor([[*prompt.tolist(), *completion.tolist()]])
    with torch.no_grad():
        return model(ids).logits[0, len(prompt) - 1 : len(prompt) - 1 + len(completion)]


def assert_logits_are_the_whole_models(model: nn.Module) -> None:
    with torch.no_grad():
        ours = CompletionModel(model)(SequenceBatch.of(PROMPTS, COMPLETIONS, "cpu"))
    rows = zip(PROMPTS.rows(), COMPLETIONS.rows(), strict=True)
    torch.testing.assert_close(ours, torch.cat([full_logits(model, *row) for row in rows]), rtol=1e-4, atol=1e-5)


def test_completion_logits_are_the_whole_models_one_position_earlier(qwen: nn.Module) -> None:
    assert_logits_are_the_whole_models(qwen)


def test_completion_logits_of_an_untied_head_are_the_whole_models() -> None:
    assert_logits_are_the_whole_models(make_model(LlamaConfig(**SHAPE, tie_word_embeddings=False)))


def test_the_soft_cap_is_applied() -> None:
    model = make_model(Gemma2Config(**SHAPE, final_logit_softcapping=0.5, attn_logit_softcapping=50.0))
    assert_logits_are_the_whole_models(model)
    with torch.no_grad():
        logits = CompletionModel(model)(SequenceBatch.of(PROMPTS, COMPLETIONS, "cpu"))
    assert 0.45 < float(logits.abs().max()) <= 0.5


@pytest.mark.parametrize(
    "config",
    [CohereConfig(**{**SHAPE, "logit_scale": 0.0625}), GraniteConfig(**{**SHAPE, "logits_scaling": 8.0})],
    ids=["cohere", "granite"],
)
def test_a_model_that_rescales_its_logits_is_refused(config: PretrainedConfig) -> None:
    model = make_model(config)
    with pytest.raises(ModelError, match=f"teacher.model: {type(model).__name__} changes its logits"):
        CompletionModel(model).check_head("teacher.model")


def test_plain_and_soft_capped_heads_are_accepted(qwen: nn.Module) -> None:
    CompletionModel(qwen).check_head("teacher.model")
    CompletionModel(make_model(Gemma2Config(**SHAPE, final_logit_softcapping=0.5))).check_head("teacher.model")


def test_scored_rows_are_the_log_softmax_of_each_next_token(qwen: nn.Module) -> None:
    rows = TokenRows.from_rows([[3, 4, 5, 6], [7], [8, 9]])
    scores = score_rows(CompletionModel(qwen), rows, "cpu")
    expected = []
    for row in rows.rows():
        with torch.no_grad():
            logits = qwen(torch.from_numpy(row).long()[None]).logits[0].double()
        normalised = logits - logits.exp().sum(-1, keepdim=True).log()
        expected += [float(normalised[t, row[t + 1]]) for t in range(len(row) - 1)]
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert len(scores) == 3 + 0 + 1


def test_padding_does_not_change_a_score(qwen: nn.Module) -> None:
    model = CompletionModel(qwen)
    alone = score_rows(model, TokenRows.from_rows([[3, 4, 5]]), "cpu")
    together = score_rows(model, TokenRows.from_rows([[3, 4, 5], list(range(2, 30))]), "cpu")
    np.testing.assert_allclose(together[:2], alone, atol=1e-5)


def test_read_only_answers_become_tensors_of_their_own() -> None:
    arrays = {
        "ids_NK": np.array([[3, 1]], np.int32),
        "logprobs_NK": np.array([[-0.5, -1.5]], np.float32),
        "tail_logprob_N": np.array([-2.0], np.float32),
    }
    for array in arrays.values():
        array.setflags(write=False)
    tensors = target_tensors(TeacherTopK(**arrays), "cpu")
    assert isinstance(tensors, TopKTensors)
    assert tensors.ids_NK.dtype == torch.int64
    tensors.logprobs_NK.zero_()
    assert arrays["logprobs_NK"][0, 0] == np.float32(-0.5)
    assert isinstance(target_tensors(TeacherDense(logprobs_NV=np.zeros((1, 3), np.float32)), "cpu"), DenseTensors)
