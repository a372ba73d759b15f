"""Why a pool gives up on an actor that another one would not mend: one line that names the setting and a way out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray

from raydistill.errors import RunError

LIMIT_FIELD = "rollout.timeout_s"  # of the calls of all pools, see pools.POOL_MAKERS
LIGHTER = {
    "rollout": "raise rollout.num_actors, or lower rollout.max_new_tokens, evaluation.max_new_tokens or data.eval_rows",
    "teacher": "raise teacher.num_actors, or lower rollout.max_new_tokens or data.eval_rows",
    "evaluator": "lower evaluation.max_new_tokens or data.eval_rows",
}
FEWER = {
    "rollout": "lower rollout.num_actors or rollout.num_gpus",
    "teacher": "lower teacher.num_actors or teacher.num_gpus",
    "evaluator": "lower evaluation.num_gpus",
}
SLACK = 1e-6  # of sums of fractions


def needs_of(options: Mapping[str, Any]) -> dict[str, float]:
    """What Ray books for an actor that is started with these options."""
    return {"GPU": options["num_gpus"], "CPU": options["num_cpus"], **options.get("resources", {})}


def no_place(role: str, name: str, needs: Mapping[str, float]) -> RunError | None:
    """The error of an actor that still waits for a place, if the cluster has less free than it needs."""
    free = ray.available_resources()
    short = [
        f"{need:g} {kind} ({free.get(kind, 0.0):g} free)"
        for kind, need in needs.items()
        if need > free.get(kind, 0.0) + SLACK
    ]
    if not short:
        return None
    return RunError(
        f"{name} found no place on the cluster: it needs {' and '.join(short)}; wait for the job that holds them, add a "
        f"node, or {FEWER.get(role, 'start fewer actors')}, and start the same command again"
    )


def hangs_every_time(role: str, name: str, method: str, limit_s: float, is_of_pool: bool, times: int) -> RunError:
    """The error of a call that no actor answered in time. is_of_pool: its limit is the pool's, which the user sets."""
    limit = f"{LIMIT_FIELD}={limit_s:g}" if is_of_pool else f"{limit_s:g} s"
    way_out = (
        f"if it only takes longer, raise {LIMIT_FIELD}, or {LIGHTER.get(role, 'give it less to do')}"
        if is_of_pool
        else "look at its process in Ray's logs and at the disk that it reads models from"
    )
    return RunError(
        f"{name} did not answer {method!r} within {limit}, {times} times in a row and each time with a new process; {way_out}"
    )
