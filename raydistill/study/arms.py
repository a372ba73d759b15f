"""The arms of a study: one config with few fields changed, the same rows, pools and adapter for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raydistill.config import Config
from raydistill.results.tables import Role

GOLD = {"objective": {"on_policy_fraction": 0.0, "distill_weight": 0.0, "ce_weight": 1.0}}
ARMS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "student": {},
    # Its exact match is measured once, at the end, with everybody's: no rollout engine is needed on the way.
    "gold-ce": GOLD | {"evaluation": {"exact_match": "off"}},
    "off-policy": {"objective": {"on_policy_fraction": 0.0, "beta": 0.0}},
    "mixed": {"objective": {"on_policy_fraction": 0.5, "beta": 0.5}},
    "on-policy": {"objective": {"on_policy_fraction": 1.0, "beta": 1.0}},
}
ROLES: Mapping[str, Role] = {"gold-ce": "control"}  # the others are students


def arm_config(config: Config, arm: str) -> Config:
    """The study's config as one arm trains with it."""
    data = config.model_dump()
    for section, values in ARMS[arm].items():
        data[section] |= values
    data["world"] = {"name": "none"}  # built already
    return Config.model_validate(data)


def run_config(config: Config, arm: str, name: str, output: Path, seed: int) -> Config:
    """The same for one run of it. seed: 0 for the first, which has the config's own."""
    changed = arm_config(config, arm)
    run = changed.run.model_copy(update={"name": name, "output": output, "seed": config.run.seed + seed})
    return changed.model_copy(update={"run": run})


def run_names(study: str, arm: str, seeds: int) -> list[str]:
    """Names of an arm's runs, one for each seed; the same whenever the study is given again."""
    return [f"{study}-{arm}" if seeds == 1 else f"{study}-{arm}-seed{seed}" for seed in range(seeds)]


def shared_config(config: Config, arms: Sequence[str]) -> Config:
    """What pools and rows must be good for: every arm. A completion fits behind every prompt if any arm samples, so that
    all arms train on the same rows."""
    every = [arm_config(config, arm) for arm in arms]
    objective = {
        "on_policy_fraction": max(one.objective.on_policy_fraction for one in every),
        "distill_weight": max(one.objective.distill_weight for one in every),
        "ce_weight": max(one.objective.ce_weight for one in every),
    }
    data = config.data
    if any(one.needs_rollouts for one in every):
        room = max(data.min_prompt_room, config.rollout.max_new_tokens)
        data = data.model_copy(update={"min_prompt_room": room})
    return config.model_copy(update={"objective": config.objective.model_copy(update=objective), "data": data})


def devices_of(config: Config) -> dict[str, float]:
    """Devices that one actor of each stage holds: GPUs, or where it has none one for each of its processes. The trainer's
    spans are those of its first rank, which stands for all."""
    rollout, trainer = config.rollout, config.trainer
    return {
        "rollout": rollout.num_gpus or float(rollout.tensor_parallel_size),
        "teacher": config.teacher.num_gpus or 1.0,
        "trainer": (trainer.num_gpus or 1.0) * trainer.num_workers,
        "evaluate": config.evaluation.num_gpus or 1.0,
    }
