"""A short run of the tiny world whose devices are named by the caller: on CPUs, or on GPUs in tests/gpu."""

from pathlib import Path
from typing import Any

from rich.console import Console

from raydistill.config import Config
from raydistill.launch import RunSummary, run


def short_run(world: Any, output: Path, dtype: str, **devices: dict[str, Any]) -> tuple[Config, RunSummary]:
    """Three steps, most completions sampled, serial; `devices`: role -> its fields."""
    model = str(world.teacher_folder)
    roles: dict[str, dict[str, Any]] = {
        "teacher": {"model": model, "dtype": dtype, "num_cpus": 0.1},
        "rollout": {"max_new_tokens": 32, "num_cpus": 0.1, "timeout_s": 600},
        "trainer": {"num_steps": 3, "sequences_per_step": 8, "sequences_per_micro_batch": 4, "num_cpus": 0.1},
        "evaluation": {"eval_every": 3, "num_cpus": 0.1},
    }
    config = Config.model_validate(
        {
            "run": {"output": str(output)},
            "student": {"model": model, "dtype": dtype},
            "data": {
                "path": str(world.train_path), "eval_path": str(world.validation_path), "eval_rows": 8,
                "max_length": 160, "min_prompt_room": 4, "min_completion": 2,
            },
            "objective": {"on_policy_fraction": 0.75},
            "adapter": {"rank": 8, "alpha": 16},
            "sync": {"max_staleness": 0, "codes_check_every": 1},
            "cluster": {"num_cpus": 8},
        }
        | {role: fields | devices.get(role, {}) for role, fields in roles.items()}
    )  # fmt: skip
    return config, run(config, console=Console(quiet=True))
