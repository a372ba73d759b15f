"""The config that all runs of these tests start from, and the pools that most of them share."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from run_helpers import HF, NUM_STEPS, merge

from raydistill.config import Config
from raydistill.launch import Pools, make_pools


def base_config(tiny_world: Any, output: Path) -> dict[str, Any]:
    model = str(tiny_world.teacher_folder)
    return {
        "run": {"output": str(output)},
        "student": {"model": model, "dtype": "float32"},
        "teacher": {"model": model, "dtype": "float32", "num_cpus": 0.1},
        "data": {
            "path": str(tiny_world.train_path),
            "eval_path": str(tiny_world.validation_path),
            "eval_rows": 16,
            "max_length": 160,
            "min_prompt_room": 4,
            "min_completion": 2,
        },
        "objective": {"on_policy_fraction": 0.5, "mixing": "sequence", "target": "dense"},
        "quant": {"format": "int2", "scale": "searched"},
        "adapter": {"mode": "merged", "rank": 8, "alpha": 16},
        "rollout": {"max_new_tokens": 40, "num_cpus": 0.1, "timeout_s": 240, "kv_cache_gib": 1},
        "trainer": {
            "num_steps": NUM_STEPS,
            "sequences_per_step": 8,
            "sequences_per_micro_batch": 4,
            "learning_rate": 2e-3,
            "num_cpus": 0.1,
            "timeout_s": 240,
        },
        "sync": {"max_staleness": 1, "codes_check_every": 1, "max_policy_gap_nats": 1e-5},
        "evaluation": {"eval_every": 4, "num_cpus": 0.1},
        "cluster": {"num_cpus": 8},
    }


@pytest.fixture(scope="module")
def make_config(tiny_world: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A config of the tiny world: float32, int2, merged, half on-policy by sequence; each test names what differs."""
    base = base_config(tiny_world, tmp_path_factory.mktemp("outputs"))
    # MLflow takes longer to import, and to make a store, than these runs take: most do without, the others share one.
    base["results"] = {"uri": f"sqlite:///{tmp_path_factory.getbasetemp()}/results.db", "deliver": False}

    def make(**changes: Any) -> Config:
        return Config.model_validate(merge(base, changes))

    return make


@pytest.fixture(scope="session")
def pools(ray_cluster: Any, tiny_world: Any) -> Iterator[Pools]:
    """A rollout actor with transformers' engine, a teacher, an evaluation actor and the ranks of earlier runs.

    A process of these costs ten seconds of a core before it does anything, so every test uses them that can.
    """
    pools = make_pools(Config.model_validate(merge(base_config(tiny_world, Path()), HF)))
    yield pools
    pools.shutdown()
