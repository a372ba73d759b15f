"""The config that all runs of these tests start from."""

from typing import Any

import pytest
from run_helpers import NUM_STEPS

from raydistill.config import Config


def merge(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(tree)
    for key, value in changes.items():
        merged[key] = merge(tree.get(key, {}), value) if isinstance(value, dict) else value
    return merged


@pytest.fixture(scope="module")
def make_config(tiny_world: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A config of the tiny world: float32, int4, merged, half on-policy by sequence; each test names what differs."""
    model = str(tiny_world.teacher_folder)
    base = {
        "run": {"output": str(tmp_path_factory.mktemp("outputs"))},
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

    def make(**changes: Any) -> Config:
        return Config.model_validate(merge(base, changes))

    return make
