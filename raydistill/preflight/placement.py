"""What a run asks of the cluster, and whether the cluster has it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from raydistill.config import Config
from raydistill.errors import ResourceError

ROLE_SHARE = 0.001
"""Of a node's role resource (`rollout`, `teacher`, `trainer`) for one actor: it says where, the CPUs and GPUs how many."""
NODE_RESOURCES = {"trainer": "trainer", "rollout": "rollout", "teacher": "teacher", "evaluation": "teacher"}
"""Which nodes a role's actors go to with cluster.by_role; held-out rows are scored where the teachers are."""
KINDS: tuple[tuple[Literal["GPU", "CPU"], str], ...] = (("GPU", "num_gpus"), ("CPU", "num_cpus"))
SLACK = 1e-6  # of sums of fractions
START_ORDER = ("rollout", "teacher", "evaluation", "trainer")  # `make_pools`, then the trainer group


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """One role's actors."""

    role: str
    count: int
    num_cpus: float
    num_gpus: float

    def each(self, kind: Literal["GPU", "CPU"]) -> float:
        """Of one actor."""
        return self.num_gpus if kind == "GPU" else self.num_cpus

    @property
    def count_field(self) -> str | None:
        """The setting that lowers `count`; None where there is always one actor."""
        return {"trainer": "trainer.num_workers", "evaluation": None}.get(self.role, f"{self.role}.num_actors")


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
    # Without held-out rows too: it writes the export.
    e = config.evaluation
    plan.append(Demand(role="evaluation", count=e.num_actors, num_cpus=e.num_cpus, num_gpus=e.num_gpus))
    return plan


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuActors:
    """GPUs that hold the same actors."""

    count: int
    roles: tuple[str, ...]  # of the actors on each, one entry for each actor
    share: float  # of each that is booked


def gpu_plan(config: Config) -> list[GpuActors]:
    """Who shares a GPU with whom, as Ray hands them out on nodes that are large enough: actors in the order in which they
    start, a fraction on the fullest GPU that has room for it. With cluster.by_role only roles of the same nodes share."""
    gpus: dict[str, list[list[Demand]]] = {}
    for demand in sorted(placement_plan(config), key=lambda demand: START_ORDER.index(demand.role)):
        mine = gpus.setdefault(NODE_RESOURCES[demand.role] if config.cluster.by_role else "", [])
        for _ in range(demand.count):
            if demand.num_gpus >= 1:
                mine += [[demand] for _ in range(int(demand.num_gpus))]
            elif demand.num_gpus > 0:
                room = [gpu for gpu in mine if _booked(gpu) + demand.num_gpus <= 1 + SLACK]
                if not room:
                    mine.append([])
                max(room or mine[-1:], key=_booked).append(demand)
    kinds = Counter(
        (tuple(d.role for d in gpu), round(min(_booked(gpu), 1.0), 6)) for there in gpus.values() for gpu in there
    )
    return [GpuActors(count=count, roles=roles, share=share) for (roles, share), count in kinds.items()]


def _booked(gpu: Sequence[Demand]) -> float:
    return sum(min(demand.num_gpus, 1.0) for demand in gpu)


def check_placement(config: Config, nodes: Sequence[Mapping[str, float]]) -> None:
    """ResourceError if the plan needs more than the nodes have, as `node_resources` gives them: all of them together, one
    node for the largest actor, and with cluster.by_role the nodes of each role, and of roles that share nodes together."""
    plan = placement_plan(config)
    if config.cluster.by_role:
        _check_roles_exist(plan, nodes)
    for kind, field in KINDS:
        needed, there = _needed(plan, kind), sum(node.get(kind, 0.0) for node in nodes)
        if needed > there + SLACK:
            raise ResourceError(
                f"the run needs {needed:g} {kind}s ({_parts(plan, kind)}) but the cluster has {there:g}; lower "
                f"<role>.{field} or <role>.num_actors (trainer.num_workers), or add nodes"
            )
        for demand in plan:
            _check_largest_node(demand, kind, _nodes_for(config, {NODE_RESOURCES[demand.role]}, nodes), config)
    if config.cluster.by_role:
        _check_room_of_roles(config, plan, nodes)


def _check_roles_exist(plan: Sequence[Demand], nodes: Sequence[Mapping[str, float]]) -> None:
    for resource in dict.fromkeys(NODE_RESOURCES[demand.role] for demand in plan):
        if not any(resource in node for node in nodes):
            raise ResourceError(
                f"cluster.by_role=true asks for nodes with the resource {resource!r}, and the cluster has none; start one "
                f"with `ray start --address=... --resources='{{\"{resource}\": 1}}'`, or leave cluster.by_role out"
            )


def _check_largest_node(
    demand: Demand, kind: Literal["GPU", "CPU"], nodes: Sequence[Mapping[str, float]], config: Config
) -> None:
    each, most = demand.each(kind), max((node.get(kind, 0.0) for node in nodes), default=0.0)
    if each > most + SLACK:
        which = f"node with the resource {NODE_RESOURCES[demand.role]!r}" if config.cluster.by_role else "node"
        raise ResourceError(
            f"one {demand.role} actor needs {each:g} {kind}s on one node, but the largest {which} has {most:g}; "
            f"lower {demand.role}.{dict(KINDS)[kind]}, or add a larger node"
        )


def _check_room_of_roles(config: Config, plan: Sequence[Demand], nodes: Sequence[Mapping[str, float]]) -> None:
    """A node may carry several roles, so any of them together must fit the nodes that take at least one of them."""
    resources = list(dict.fromkeys(NODE_RESOURCES[demand.role] for demand in plan))
    for size in range(1, len(resources) + 1):
        for chosen in combinations(resources, size):
            mine = [demand for demand in plan if NODE_RESOURCES[demand.role] in chosen]
            here = _nodes_for(config, set(chosen), nodes)
            for kind, field in KINDS:
                needed, there = _needed(mine, kind), sum(node.get(kind, 0.0) for node in here)
                if needed > there + SLACK:
                    names = " or ".join(repr(name) for name in chosen)
                    counts = [demand.count_field for demand in mine if demand.count_field and demand.each(kind)]
                    ways = " or ".join([f"{mine[0].role}.{field}", *counts])
                    raise ResourceError(
                        f"cluster.by_role=true: {_parts(mine, kind)} need {needed:g} {kind}s on nodes with the resource "
                        f"{names}, and those have {there:g}; lower {ways}, or add such a node"
                    )


def _nodes_for(
    config: Config, resources: set[str], nodes: Sequence[Mapping[str, float]]
) -> Sequence[Mapping[str, float]]:
    return [node for node in nodes if resources & node.keys()] if config.cluster.by_role else nodes


def _needed(plan: Sequence[Demand], kind: Literal["GPU", "CPU"]) -> float:
    return sum(demand.count * demand.each(kind) for demand in plan)


def _parts(plan: Sequence[Demand], kind: Literal["GPU", "CPU"]) -> str:
    return ", ".join(f"{d.role} {d.count} x {d.each(kind):g}" for d in plan if d.each(kind))


def node_resources(nodes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, float]]:
    """What each living node has, of what `ray.nodes()` gives."""
    return [node["Resources"] for node in nodes if node["Alive"]]
