"""How actors of the pools are started: Ray's options of a role, names on the dashboard, environment variables."""

from __future__ import annotations

from typing import Any

import ray

from raydistill.config import EvaluationSection, RolloutSection, TeacherSection
from raydistill.preflight.placement import ROLE_SHARE

MAX_NAMESAKES = 100
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}  # Ray hides no GPU from an actor that booked none: it would take one unbooked
START_TIMEOUT_S = 900.0  # reading a large model from a cold disk


def actor_options(
    role: str, section: RolloutSection | TeacherSection | EvaluationSection, environment: dict[str, str], by_role: bool
) -> dict[str, Any]:
    """Ray's options for one role's actors; `by_role`: on a node that has the role's resource."""
    return {
        "num_cpus": section.num_cpus,
        "num_gpus": section.num_gpus,
        "runtime_env": {"env_vars": environment},
        **({"resources": {role: ROLE_SHARE}} if by_role else {}),
    }


def start_actor(actor_class: Any, options: dict[str, Any], name: str, *args: Any) -> Any:
    """An actor that Ray's dashboard shows by name; one whose name a dying predecessor still has gets a number behind it."""
    for number in range(MAX_NAMESAKES):
        full_name = name if number == 0 else f"{name}-{number}"
        try:
            return ray.remote(actor_class).options(name=full_name, **options).remote(name, *args)
        except ValueError as error:
            if number + 1 == MAX_NAMESAKES or "name" not in str(error):
                raise
    raise AssertionError("unreachable")


def torch_environment(section: TeacherSection | EvaluationSection) -> dict[str, str]:
    shared = {"TOKENIZERS_PARALLELISM": "false"}
    return shared | NO_GPU | {"OMP_NUM_THREADS": "1"} if section.num_gpus == 0 else shared
