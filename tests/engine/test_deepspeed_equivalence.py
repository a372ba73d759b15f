"""The real DeepSpeed on gloo: however a step is split over ranks, micro-batches and ZeRO stages, it is the same step.

The training runs in processes of its own (`rank_worker.py`), once for each world size; the tests look at what came out.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_worker import EVEN, PROBES, Case, cases, plain_torch, spec

from raydistill.actors.hf_engine import HfEngine
from raydistill.messages import StudentWeights

pytestmark = pytest.mark.engine

STAGES = [0, 1, 2, 3]
LIMIT_S = 900.0
State = dict[str, torch.Tensor]


class Outcomes:
    """What the ranks of both world sizes saved."""

    def __init__(self, folder: Path, model: Path) -> None:
        self._folder, self.model = folder, model

    def steps(self, case: str, world_size: int, rank: int = 0) -> list[dict[str, Any]]:
        """One entry before training and one after each step."""
        steps: list[dict[str, Any]] = self._of(case, world_size, rank)["steps"]
        return steps

    def resumed(self, case: str) -> dict[float, list[dict[str, Any]]]:
        """By learning rate: where another engine took up the saved state, and after its step."""
        resumed: dict[float, list[dict[str, Any]]] = self._of(case, 1, 0)["resumed"]
        return resumed

    def _of(self, case: str, world_size: int, rank: int) -> dict[str, Any]:
        result: dict[str, Any] = torch.load(self._folder / f"{case}-of{world_size}-{rank}.pt", weights_only=False)
        assert "error" not in result, result["error"]
        return result

    def case(self, name: str, world_size: int) -> Case:
        return next(c for c in cases(world_size) if c.name == name)


@pytest.fixture(scope="module")
def shallow_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model without its last layer: a hundred engines are built of it, and another layer would split as the first."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("shallow")
    config = AutoConfig.from_pretrained(tiny_model)
    config.num_hidden_layers, config.layer_types = 1, config.layer_types[:1]
    AutoModelForCausalLM.from_pretrained(tiny_model, config=config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def outcomes(shallow_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    for world_size in (1, 2):
        arguments = [str(world_size), str(shallow_model), str(folder)]
        script = str(Path(__file__).with_name("rank_worker.py"))
        logs = [(folder / f"log-of{world_size}-{rank}.txt").open("w") for rank in range(world_size)]
        ranks = [
            subprocess.Popen([sys.executable, script, str(rank), *arguments], env=environment, stdout=log, stderr=log)
            for rank, log in enumerate(logs)
        ]
        deadline = time.monotonic() + LIMIT_S
        try:
            codes = [process.wait(max(deadline - time.monotonic(), 1)) for process in ranks]
        finally:
            for process in ranks:
                process.kill()
        assert codes == [0] * world_size, (folder / f"log-of{world_size}-0.txt").read_text()[-3000:]
    return Outcomes(folder, shallow_model)


@pytest.fixture(scope="module")
def reference(shallow_model: Path) -> Any:
    """Plain torch's result for a case, whatever its split; computed once for equal cases."""
    known: dict[tuple[Any, ...], dict[str, State]] = {}

    def of(case: Case) -> dict[str, State]:
        key = (case.mode, case.optimizer, case.max_grad_norm, len(case.steps))
        if key not in known:
            known[key] = plain_torch(case, shallow_model)
        return known[key]

    return of


def largest_difference(one: State, other: State) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def is_same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def check_against_plain_torch(outcomes: Outcomes, reference: Any, name: str, world_size: int) -> None:
    expected = reference(outcomes.case(name, world_size))
    for rank in range(world_size):
        steps = outcomes.steps(name, world_size, rank)
        assert [s["skipped"] for s in steps] == [None] * len(steps)
        assert is_same(steps[0]["state"], expected["before"])
        assert largest_difference(steps[-1]["state"], expected["after"]) < 1e-6
    # The bound above says something: the step moved the weights by far more.
    assert largest_difference(expected["before"], expected["after"]) > 1e-4


@pytest.mark.parametrize("stage", STAGES)
def test_one_rank_with_four_micro_batches_takes_the_step_of_one_batch(
    outcomes: Outcomes, reference: Any, stage: int
) -> None:
    check_against_plain_torch(outcomes, reference, f"merged-{stage}", 1)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["merged", "served"])
def test_two_ranks_with_two_micro_batches_take_the_step_of_one_batch(
    outcomes: Outcomes, reference: Any, name: str, stage: int
) -> None:
    check_against_plain_torch(outcomes, reference, f"{name}-{stage}", 2)


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_with_eighty_and_ten_tokens_take_the_step_of_one_batch(
    outcomes: Outcomes, reference: Any, stage: int
) -> None:
    assert outcomes.case(f"uneven-{stage}", 2).order != EVEN
    check_against_plain_torch(outcomes, reference, f"uneven-{stage}", 2)


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_are_clipped_to_their_global_norm_once(outcomes: Outcomes, reference: Any, stage: int) -> None:
    check_against_plain_torch(outcomes, reference, f"clipped-{stage}", 2)
    norm = outcomes.steps(f"clipped-{stage}", 2)[1]["metrics"]["trainer/grad_norm"]
    assert norm > 0.1, "the reported norm is the one before clipping, and clipping to 0.05 did something"


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_and_split_reports_the_same_loss_and_norm(outcomes: Outcomes, stage: int) -> None:
    expected = outcomes.steps("merged-2", 1)[1]["metrics"]
    for name, world_size in ((f"merged-{stage}", 1), (f"merged-{stage}", 2), (f"uneven-{stage}", 2)):
        metrics = outcomes.steps(name, world_size)[1]["metrics"]
        assert metrics["trainer/tokens"] == 90
        assert metrics == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", ["adamw-2", "none-2"])
def test_adamw_and_training_all_weights_follow_plain_torch(
    outcomes: Outcomes, reference: Any, name: str, world_size: int
) -> None:
    check_against_plain_torch(outcomes, reference, name, world_size)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("name", "world_size", "reason"),
    [
        ("nan", 1, "teacher answers are NaN or infinite"),
        ("nan", 2, "teacher answers are NaN or infinite"),
        ("loss", 2, "the loss is NaN or infinite"),
        ("gradient", 2, "the gradient is NaN or infinite"),
    ],
)
def test_a_bad_step_leaves_no_trace_on_any_rank(
    outcomes: Outcomes, name: str, world_size: int, reason: str, stage: int
) -> None:
    """Only the last rank meets the NaN. Weights, moments and learning rate afterwards are those of a run without it."""
    clean = outcomes.steps(f"clean-{stage}", world_size)
    for rank in range(world_size):
        start, good, bad, next_good = outcomes.steps(f"{name}-{stage}", world_size, rank)
        assert (good["skipped"], bad["skipped"], next_good["skipped"]) == (None, reason, None)
        assert is_same(good["state"], bad["state"])
        assert bad["learning_rate"] == good["learning_rate"] < start["learning_rate"]
        assert not is_same(bad["state"], next_good["state"])
        assert is_same(next_good["state"], clean[2]["state"])
        assert next_good["learning_rate"] == clean[2]["learning_rate"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_bad_step_in_bfloat16_changes_nothing_either(outcomes: Outcomes, stage: int) -> None:
    for rank in range(2):
        _, good, bad, next_good = outcomes.steps(f"bf16_nan-{stage}", 2, rank)
        assert bad["skipped"] is not None
        assert is_same(good["state"], bad["state"])
        assert bad["learning_rate"] == good["learning_rate"]
        assert next_good["skipped"] is None
        assert not is_same(bad["state"], next_good["state"])


@pytest.mark.parametrize("stage", STAGES)
def test_the_published_bfloat16_adapter_is_the_one_the_trainer_computes_with(outcomes: Outcomes, stage: int) -> None:
    """An engine that loads it has the same codes and the same log-probs, bit for bit."""
    name = f"bf16-{stage}"
    steps = outcomes.steps(name, 1)
    engine = HfEngine(spec(outcomes.case(name, 1), outcomes.model), (0,))
    for version, seen in enumerate(steps):
        assert seen["skipped"] is None
        tensors = {key: tensor.numpy() for key, tensor in seen["state"].items()}
        _, codes = engine.load("run-a", StudentWeights(version=version, tensors=tensors, probe=None), want_codes=True)
        assert codes == seen["codes"]
        assert torch.equal(torch.from_numpy(engine.score(PROBES)), seen["probe"])
    assert not is_same(steps[0]["state"], steps[-1]["state"])


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_engine_steps_with_the_learning_rate_of_now(outcomes: Outcomes, stage: int) -> None:
    """Saved with 0.1, DeepSpeed's own state would bring that back: a quarter of it takes a quarter of the step."""
    saved = outcomes.steps(f"resumed-{stage}", 1)[-1]
    (before, after), (before_small, after_small) = (outcomes.resumed(f"resumed-{stage}")[rate] for rate in (0.1, 0.025))
    for one in (before, before_small):
        assert is_same(one["state"], saved["state"])
    assert [one["learning_rate"] for one in (before, after, before_small, after_small)] == [0.1, 0.1, 0.025, 0.025]
    quarter = {name: old + 0.25 * (after["state"][name] - old) for name, old in before["state"].items()}
    assert largest_difference(before["state"], after["state"]) > 1e-4
    assert largest_difference(quarter, after_small["state"]) < 1e-6


@pytest.mark.parametrize("stage", STAGES)
def test_gradient_checkpointing_gives_the_same_update(outcomes: Outcomes, stage: int) -> None:
    plain, checkpointed = (outcomes.steps(f"{name}-{stage}", 1) for name in ("merged", "checkpointed"))
    assert largest_difference(plain[1]["state"], checkpointed[1]["state"]) < 1e-7
    assert checkpointed[1]["metrics"]["trainer/grad_norm"] > 0.1


@pytest.mark.parametrize("stage", STAGES)
def test_every_rank_has_the_same_weights_and_the_first_hashes_their_codes(outcomes: Outcomes, stage: int) -> None:
    name = f"merged-{stage}"
    first, second = (outcomes.steps(name, 2, rank)[1] for rank in range(2))
    assert is_same(first["state"], second["state"])
    tensors = {key: tensor.numpy() for key, tensor in first["state"].items()}
    engine = HfEngine(spec(outcomes.case(name, 2), outcomes.model), (0,))
    _, codes = engine.load("run-a", StudentWeights(version=1, tensors=tensors, probe=None), want_codes=True)
    assert first["codes"] == codes != outcomes.steps(name, 2)[0]["codes"]
    assert second["codes"] is None
