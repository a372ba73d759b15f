"""What a run asks of the cluster, and whether the cluster has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raydistill.config import Config
from raydistill.errors import ResourceError

ROLE_SHARE = 0.001
"""Of a node's role resource (`rollout`, `teacher`, `trainer`) for one actor: it says where, the CPUs and GPUs how many."""
ROLES = ("rollout", "teacher", "trainer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """One role's actors."""

    role: str
    count: int
    num_cpus: float
    num_gpus: float


def placement_plan(config: Config) -> list[Demand]:
    """The actors a run will start, with what Ray books for each."""
    plan = [
        Demand(
            role="trainer",
            count=config.trainer.num_workers,
            num_cpus=config.trainer.num_cpus,
            num_gpus=config.trainer.num_gpus,
        )
    ]
    if config.needs_rollout_pool:
        r = config.rollout
        plan.append(Demand(role="rollout", count=r.num_actors, num_cpus=r.num_cpus, num_gpus=r.num_gpus))
    if config.needs_teacher:
        t = config.teacher
        plan.append(Demand(role="teacher", count=t.num_actors, num_cpus=t.num_cpus, num_gpus=t.num_gpus))
    if config.data.eval_rows:
        e = config.evaluation
        plan.append(Demand(role="evaluation", count=1, num_cpus=e.num_cpus, num_gpus=e.num_gpus))
    return plan


def check_placement(config: Config, resources: dict[str, float], largest_node_gpus: float | None = None) -> None:
    """ResourceError if the plan needs more than the cluster's `resources`, as `ray.cluster_resources()` gives them, or one
    actor more GPUs than any node has (None: all GPUs are in one node)."""
    plan = placement_plan(config)
    missing = [d.role for d in plan if d.role in ROLES and d.role not in resources] if config.cluster.by_role else []
    if missing:
        raise ResourceError(
            f"cluster.by_role=true asks for nodes with the resource {missing[0]!r}, and the cluster has none; start one with "
            f"`ray start --address=... --resources='{{\"{missing[0]}\": 1}}'`, or leave cluster.by_role out"
        )
    for kind, field in (("GPU", "num_gpus"), ("CPU", "num_cpus")):
        needed = sum(d.count * getattr(d, field) for d in plan)
        there = resources.get(kind, 0.0)
        if needed > there + 1e-6:
            parts = ", ".join(f"{d.role} {d.count} x {getattr(d, field):g}" for d in plan if getattr(d, field))
            raise ResourceError(
                f"the run needs {needed:g} {kind}s ({parts}) but the cluster has {there:g}; lower <role>.{field} or "
                "<role>.num_actors (trainer.num_workers), or add nodes"
            )
    most = resources.get("GPU", 0.0) if largest_node_gpus is None else largest_node_gpus
    for demand in plan:
        if demand.num_gpus > most:
            raise ResourceError(
                f"one {demand.role} actor needs {demand.num_gpus:g} GPUs on one node, but the largest node has {most:g}; "
                f"lower {demand.role}.num_gpus, or add a larger node"
            )


def largest_node_gpus(nodes: Sequence[Mapping[str, Any]]) -> float:
    """The most GPUs of one living node, of what `ray.nodes()` gives."""
    return max((node["Resources"].get("GPU", 0.0) for node in nodes if node["Alive"]), default=0.0)
