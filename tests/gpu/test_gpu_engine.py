"""The real vLLM on CUDA against the student as transformers computes it: the scenarios of tests/engine, on GPUs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_questions import Answers, Scenario, ask, make_scenario, make_spec, play_in_a_process

from raydistill.actors.hf_engine import HfEngine
from raydistill.actors.vllm_settings import ENGINE_ENVIRONMENT

pytestmark = pytest.mark.gpu
MODES = ("merged", "served", "none")
ENVIRONMENT = ENGINE_ENVIRONMENT | {"HF_HUB_OFFLINE": "1"}


def scenario(world: Any, mode: str, ranks: int) -> Scenario:
    spec = make_spec(world.teacher_folder, mode=mode, dtype="bfloat16", format="int4")
    return make_scenario(mode, world, spec, tensor_parallel_size=ranks, num_gpus=ranks)


def check(played: dict[str, Any], scenarios: list[Scenario]) -> None:
    """Hashes and policy gap of every version against transformers on the same device."""
    for one in scenarios:
        engine = HfEngine(one.spec, one.eos_ids, one.sampled_ids)
        for weights, mine in zip(one.versions, played[one.name]["answers"], strict=True):
            reference: Answers = ask(engine, one, weights)
            assert (mine.weights_hash, mine.codes_hash) == (reference.weights_hash, reference.codes_hash)
            assert float(np.abs(mine.scores_N - reference.scores_N).mean()) < 0.05


def test_the_engine_on_cuda_computes_the_trained_student(tiny_world: Any, tmp_path: Path) -> None:
    scenarios = [scenario(tiny_world, mode, 1) for mode in MODES]
    check(play_in_a_process(scenarios, tmp_path, ENVIRONMENT), scenarios)


@pytest.mark.gpu(num=2)
def test_two_ranks_on_cuda_compute_the_trained_student_and_end_together(tiny_world: Any, tmp_path: Path) -> None:
    sharded = scenario(tiny_world, "merged", 2)
    played = play_in_a_process([sharded], tmp_path, ENVIRONMENT)
    check(played, [sharded])
    first, second = played["merged"]["weights_kept"]
    assert first == second
    assert played["merged"]["exit_status"] == 1
    assert played["merged"]["ended_at"] - played["merged"]["killed_at"] < 60
