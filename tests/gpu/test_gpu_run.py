"""Whole runs on GPUs: every role on one shared device, and two trainer ranks with NCCL."""

from pathlib import Path
from typing import Any

import pytest
from whole_runs import short_run

pytestmark = pytest.mark.gpu


def check(world: Any, folder: Path, **devices: dict[str, Any]) -> None:
    config, summary = short_run(world, folder, "bfloat16", **devices)
    assert summary.codes_hash is not None  # compared on trainer, engine and export; a difference stops the run
    assert summary.largest_gap_nats < config.policy_gap_bound_nats
    assert summary.skipped_steps == 0


def test_all_roles_share_one_gpu(ray_cluster: Any, tiny_world: Any, tmp_path: Path) -> None:
    check(
        tiny_world,
        tmp_path,
        trainer={"num_gpus": 0.4},
        rollout={"num_gpus": 0.3, "gpu_memory_utilization": 0.25},
        teacher={"num_gpus": 0.2},
        evaluation={"num_gpus": 0.1},
    )


@pytest.mark.gpu(num=3)
def test_two_trainer_ranks_have_a_gpu_each(ray_cluster: Any, tiny_world: Any, tmp_path: Path) -> None:
    check(
        tiny_world,
        tmp_path,
        trainer={"num_gpus": 1, "num_workers": 2},
        rollout={"num_gpus": 0.5, "gpu_memory_utilization": 0.4},
        teacher={"num_gpus": 0.4},
        evaluation={"num_gpus": 0.1},
    )
