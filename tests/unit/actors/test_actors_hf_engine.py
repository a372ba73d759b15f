"""transformers' generate as a sampling engine: seeds, ends, and the policy that was loaded and no other."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from raydistill.actors.engine import SamplingSettings
from raydistill.actors.hf_engine import HfEngine, SeededGumbel
from raydistill.config import AdapterSection, QuantSection, StudentSection
from raydistill.messages import StudentWeights, TokenRows
from raydistill.models import StudentSpec, build_student
from raydistill.quant.hashing import hash_codes, hash_tensors
from raydistill.quant.student import adapter_state, load_adapter_state, student_codes

EOS = (1, 2)
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [15, 16]]
SEEDS = (11, 22, 33, 44)


def make_spec(folder: Path) -> StudentSpec:
    return StudentSpec(
        student=StudentSection(model=str(folder), dtype="float32"),
        quant=QuantSection(format="int4", group_size=16),
        adapter=AdapterSection(rank=4, alpha=8, targets=("q_proj", "down_proj")),
    )


def settings(temperature: float = 1.0, top_p: float = 1.0, least: int = 0, most: int = 12) -> SamplingSettings:
    return SamplingSettings(temperature=temperature, top_p=top_p, min_new_tokens=least, max_new_tokens=most)


def make_weights(version: int, student: nn.Module) -> StudentWeights:
    generator = torch.Generator().manual_seed(version)
    state = adapter_state(student)
    tensors = {k: (v + 0.3 * torch.randn(v.shape, generator=generator)).numpy() for k, v in state.items()}
    return StudentWeights(version=version, tensors=tensors, probe=None)


@pytest.fixture(scope="module")
def student(tiny_qwen: Path) -> nn.Module:
    """The same student beside the engine, at version 1."""
    torch.manual_seed(0)
    model = build_student(make_spec(tiny_qwen)).eval()
    weights = make_weights(1, model)
    load_adapter_state(model, {k: torch.from_numpy(v) for k, v in weights.tensors.items()})
    return model


@pytest.fixture(scope="module")
def version_1(student: nn.Module) -> StudentWeights:
    tensors = {k: v.numpy() for k, v in adapter_state(student).items()}
    return StudentWeights(version=1, tensors=tensors, probe=None)


@pytest.fixture
def engine(tiny_qwen: Path, version_1: StudentWeights) -> HfEngine:
    engine = HfEngine(make_spec(tiny_qwen), EOS)
    engine.load("run-a", version_1, want_codes=False)
    return engine


def sample(engine: HfEngine, rows: Sequence[int], s: SamplingSettings) -> dict[int, tuple[list[int], str]]:
    prompts = TokenRows.from_rows([PROMPTS[r] for r in rows])
    completions = engine.sample(prompts, s, [SEEDS[r] for r in rows])
    return {r: (list(c.ids), c.finish_reason) for r, c in zip(rows, completions, strict=True)}


def argmax_of_whole_forwards(student: nn.Module, prompt: list[int], most: int) -> list[int]:
    ids = list(prompt)
    for _ in range(most):
        with torch.no_grad():
            ids.append(int(student(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in EOS:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_completion_depends_on_its_own_seed_only(engine: HfEngine, temperature: float, top_p: float) -> None:
    s = settings(temperature, top_p)
    together = sample(engine, [0, 1, 2, 3], s)
    assert sample(engine, [3, 1, 0, 2], s) == together
    for row in range(4):
        assert sample(engine, [row], s)[row] == together[row]
    assert len({tuple(ids) for ids, _ in together.values()}) > 1


def test_another_seed_gives_another_completion(engine: HfEngine) -> None:
    prompts = TokenRows.from_rows([PROMPTS[0]] * 8)
    completions = engine.sample(prompts, settings(), range(8))
    assert len({tuple(c.ids) for c in completions}) > 4


def test_greedy_is_the_argmax_of_the_whole_forward(engine: HfEngine, student: nn.Module) -> None:
    completions = sample(engine, [0, 1, 2, 3], settings(temperature=0.0))
    for row, (ids, _) in completions.items():
        assert ids == argmax_of_whole_forwards(student, PROMPTS[row], 12)


def test_the_models_own_generation_settings_do_not_leak_into_sampling(engine: HfEngine, student: nn.Module) -> None:
    # The folder asks for top_k=2 and a repetition penalty of 3; every token must stay possible, repeats at full weight.
    prompt = [20, 20, 20, 20]
    with torch.no_grad():
        probabilities = torch.softmax(student(torch.tensor([prompt])).logits[0, -1].double(), -1).numpy()
    count = 4000
    drawn = engine.sample(TokenRows.from_rows([prompt] * count), settings(most=1), range(count))
    shares = np.bincount([int(c.ids[0]) for c in drawn], minlength=61) / count
    error = np.sqrt(probabilities * (1 - probabilities) / count)
    assert (np.abs(shares - probabilities) <= 5 * error + 1e-3).all()
    assert (shares > 0).sum() > 10


def test_gumbel_noise_draws_from_the_softmax() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    count = 4000
    noisy = SeededGumbel(range(count), "cpu")(torch.zeros(count, 1), probabilities.log().expand(count, 5))
    shares = torch.bincount(noisy.argmax(-1), minlength=5) / count
    assert float(shares[4]) == 0.0
    assert (shares - probabilities).abs().max() < 0.03


def test_the_sampled_end_is_kept_and_finish_reasons_are_right(tiny_qwen: Path, version_1: StudentWeights) -> None:
    ends = tuple(range(1, 61, 4))  # a quarter of the tokens ends a completion, so both reasons occur
    engine = HfEngine(make_spec(tiny_qwen), ends)
    engine.load("run-a", version_1, want_codes=False)
    completions = engine.sample(TokenRows.from_rows([PROMPTS[0]] * 40), settings(most=6), range(40))
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    for completion in completions:
        *inner, last = completion.ids
        assert not set(inner) & set(ends)
        if completion.finish_reason == "stop":
            assert last in ends
        else:
            assert last not in ends
            assert len(completion.ids) == 6


def test_ids_that_the_teacher_does_not_have_are_never_sampled(tiny_qwen: Path, version_1: StudentWeights) -> None:
    engine = HfEngine(make_spec(tiny_qwen), EOS, sampled_ids=30)  # of 61
    engine.load("run-a", version_1, want_codes=False)
    completions = engine.sample(TokenRows.from_rows([PROMPTS[0]] * 40), settings(), range(40))
    drawn = {int(i) for c in completions for i in c.ids}
    assert max(drawn) < 30
    assert len(drawn) > 15


def test_no_end_is_sampled_before_the_least_number_of_tokens(tiny_qwen: Path, version_1: StudentWeights) -> None:
    ends = tuple(range(1, 61, 2))
    engine = HfEngine(make_spec(tiny_qwen), ends)
    engine.load("run-a", version_1, want_codes=False)
    prompts = TokenRows.from_rows([PROMPTS[r % 4] for r in range(40)])
    completions = engine.sample(prompts, settings(least=5, most=8), range(40))
    assert min(len(c.ids) for c in completions) == 6
    assert all(not set(c.ids[:5]) & set(ends) for c in completions)


def test_loading_another_version_changes_the_score(engine: HfEngine, student: nn.Module) -> None:
    rows = TokenRows.from_rows([[5, 6, 7, 8], [9, 10]])
    before = engine.score(rows)
    engine.load("run-a", make_weights(2, student), want_codes=False)
    assert np.abs(engine.score(rows) - before).max() > 1e-2


def test_loading_a_version_twice_is_harmless(engine: HfEngine, version_1: StudentWeights, student: nn.Module) -> None:
    rows = TokenRows.from_rows([[5, 6, 7, 8], [9, 10]])
    before, first = engine.score(rows), engine.load("run-a", version_1, want_codes=True)
    assert engine.load("run-a", version_1, want_codes=True) == first
    np.testing.assert_array_equal(engine.score(rows), before)
    engine.load("run-a", make_weights(2, student), want_codes=False)
    assert engine.load("run-a", version_1, want_codes=True) == first
    np.testing.assert_array_equal(engine.score(rows), before)


def test_the_hashes_are_those_of_what_the_engine_holds(
    engine: HfEngine, version_1: StudentWeights, student: nn.Module
) -> None:
    weights_hash, codes_hash = engine.load("run-a", version_1, want_codes=True)
    assert weights_hash == hash_tensors(version_1.tensors)
    assert codes_hash == hash_codes(student_codes(student))
    assert engine.load("run-a", version_1, want_codes=False) == (weights_hash, None)
    assert engine.load("run-a", make_weights(2, student), want_codes=True)[0] != weights_hash


def test_read_only_weights_can_be_loaded(engine: HfEngine, version_1: StudentWeights) -> None:
    for array in version_1.tensors.values():
        array.setflags(write=False)
    engine.load("run-a", version_1, want_codes=False)
