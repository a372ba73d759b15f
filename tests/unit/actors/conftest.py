"""One tiny random Qwen3 on disk for the tests of teachers and engines."""

from pathlib import Path

import pytest
import torch

from raydistill.imports import UNUSED_BY_MODELS, quick_transformers, without

with without(*UNUSED_BY_MODELS), quick_transformers():  # this file is the first of all to load it
    from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3Config


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of 61 tokens, whose generation config holds what must not leak into sampling."""
    torch.manual_seed(7)
    config = Qwen3Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        dtype="float32",
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.6, top_k=2, top_p=0.5, repetition_penalty=3.0, eos_token_id=[1, 2]
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-qwen3"
    model.save_pretrained(folder)
    return folder
