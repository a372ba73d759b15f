"""What a run asks of the cluster, and whether the cluster has it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from raydistill.config import Config
from raydistill.errors import ResourceError

ROLE_SHARE = 0.001
"""Of a node's role resource (`rollout`, `teacher`, `trainer`) for one actor: it says where, the CPUs and GPUs how many."""
NODE_RESOURCES = {"trainer": "trainer", "rollout": "rollout", "teacher": "teacher", "evaluation": "teacher"}
"""Which nodes a role's actors go to with cluster.by_role; held-out rows are scored where the teachers are."""
Kind = Literal["GPU", "CPU"]
KINDS: tuple[tuple[Kind, str], ...] = (("GPU", "num_gpus"), ("CPU", "num_cpus"))
SLACK = 1e-6  # of sums of fractions
START_ORDER = ("rollout", "teacher", "evaluation", "trainer")  # `make_pools`, then the trainer group


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """One role's actors."""

    role: str
    count: int
    num_cpus: float
    num_gpus: float

    def each(self, kind: Kind) -> float:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortage:
    """What a cluster lacks, and what to do about it."""

    text: str
    ways_out: str


def check_placement(config: Config, nodes: Sequence[Mapping[str, float]]) -> None:
    """ResourceError if the plan needs more than the nodes have, as `node_resources` gives them; see `shortage`."""
    found = shortage(placement_plan(config), nodes, config.cluster.by_role)
    if found is not None:
        raise ResourceError(f"{found.text}; {found.ways_out}")


def shortage(
    plan: Sequence[Demand], nodes: Sequence[Mapping[str, float]], by_role: bool, who: str = "the run needs"
) -> Shortage | None:
    """What a plan needs more than the nodes have: all of them together, one node for the largest actor, places for actors
    on whole nodes, and with by_role the nodes of each role, and of roles that share nodes together. A plan that passes may
    still find no place where actors of several sizes leave gaps."""
    checks = [_missing_roles(plan, nodes)] if by_role else []
    for kind, _ in KINDS:
        checks.append(_too_few_in_all(who, plan, kind, nodes))
        checks += [_too_large(demand, kind, nodes, by_role) for demand in plan]
    checks += _too_few_of_roles(plan, nodes) if by_role else []
    checks += [_too_few_places(demand, plan, nodes, by_role) for demand in plan]
    return next((found for found in checks if found is not None), None)


def _missing_roles(plan: Sequence[Demand], nodes: Sequence[Mapping[str, float]]) -> Shortage | None:
    for resource in dict.fromkeys(NODE_RESOURCES[demand.role] for demand in plan):
        if not any(resource in node for node in nodes):
            return Shortage(
                text=f"cluster.by_role=true asks for nodes with the resource {resource!r}, and the cluster has none",
                ways_out=f"start one with `ray start --address=... --resources='{{\"{resource}\": 1}}'`, or leave "
                "cluster.by_role out",
            )
    return None


def _too_few_in_all(
    who: str, plan: Sequence[Demand], kind: Kind, nodes: Sequence[Mapping[str, float]]
) -> Shortage | None:
    needed, there = _needed(plan, kind), sum(node.get(kind, 0.0) for node in nodes)
    if needed <= there + SLACK:
        return None
    return Shortage(
        text=f"{who} {needed:g} {kind}s ({_parts(plan, kind)}) but the cluster has {there:g}",
        ways_out=f"lower <role>.{dict(KINDS)[kind]} or <role>.num_actors (trainer.num_workers), or add nodes",
    )


def _too_large(demand: Demand, kind: Kind, nodes: Sequence[Mapping[str, float]], by_role: bool) -> Shortage | None:
    here = _nodes_for(by_role, {NODE_RESOURCES[demand.role]}, nodes)
    each, most = demand.each(kind), max((node.get(kind, 0.0) for node in here), default=0.0)
    if each <= most + SLACK:
        return None
    return Shortage(
        text=f"one {demand.role} actor needs {each:g} {kind}s on one node, but the largest {_kind_of_node(demand, by_role)} "
        f"has {most:g}",
        ways_out=f"lower {demand.role}.{dict(KINDS)[kind]}, or add a larger node",
    )


def _too_few_places(
    demand: Demand, plan: Sequence[Demand], nodes: Sequence[Mapping[str, float]], by_role: bool
) -> Shortage | None:
    """An actor lies on one node: what is left over on several holds none. Counts all actors that are as large as one."""
    booked = [(kind, demand.each(kind)) for kind, _ in KINDS if demand.each(kind) > 0]
    if not booked:
        return None
    resource = NODE_RESOURCES[demand.role]
    alike = [
        one
        for one in plan
        if (not by_role or NODE_RESOURCES[one.role] == resource)
        and all(one.each(kind) >= each - SLACK for kind, each in booked)
    ]
    here = _nodes_for(by_role, {resource}, nodes)
    places = sum(min(int((node.get(kind, 0.0) + SLACK) / each) for kind, each in booked) for node in here)
    wanted = sum(one.count for one in alike)
    if wanted <= places:
        return None
    size = " and ".join(f"{each:g} {kind}s" for kind, each in booked)
    names = ", ".join(f"{one.role} {one.count}" for one in alike)
    return Shortage(
        text=f"{wanted} actors need {size} or more on one node ({names}), and each {_kind_of_node(demand, by_role)} filled by "
        f"itself, there is room for {places}",
        ways_out=_ways_to_lower(alike, booked[0][0]) + ", or add a node",
    )


def _too_few_of_roles(plan: Sequence[Demand], nodes: Sequence[Mapping[str, float]]) -> Iterator[Shortage]:
    """A node may carry several roles, so any of them together must fit the nodes that take at least one of them."""
    resources = list(dict.fromkeys(NODE_RESOURCES[demand.role] for demand in plan))
    for size in range(1, len(resources) + 1):
        for chosen in combinations(resources, size):
            mine = [demand for demand in plan if NODE_RESOURCES[demand.role] in chosen]
            here = _nodes_for(True, set(chosen), nodes)
            for kind, _ in KINDS:
                needed, there = _needed(mine, kind), sum(node.get(kind, 0.0) for node in here)
                if needed > there + SLACK:
                    names = " or ".join(repr(name) for name in chosen)
                    yield Shortage(
                        text=f"cluster.by_role=true: {_parts(mine, kind)} need {needed:g} {kind}s on nodes with the resource "
                        f"{names}, and those have {there:g}",
                        ways_out=f"{_ways_to_lower(mine, kind)}, or add such a node",
                    )


def _ways_to_lower(plan: Sequence[Demand], kind: Kind) -> str:
    counts = [demand.count_field for demand in plan if demand.count_field and demand.each(kind)]
    return f"lower {' or '.join(dict.fromkeys([f'{plan[0].role}.{dict(KINDS)[kind]}', *counts]))}"


def _kind_of_node(demand: Demand, by_role: bool) -> str:
    return f"node with the resource {NODE_RESOURCES[demand.role]!r}" if by_role else "node"


def _nodes_for(
    by_role: bool, resources: set[str], nodes: Sequence[Mapping[str, float]]
) -> Sequence[Mapping[str, float]]:
    return [node for node in nodes if resources & node.keys()] if by_role else nodes


def _needed(plan: Sequence[Demand], kind: Kind) -> float:
    return sum(demand.count * demand.each(kind) for demand in plan)


def _parts(plan: Sequence[Demand], kind: Kind) -> str:
    return ", ".join(f"{d.role} {d.count} x {d.each(kind):g}" for d in plan if d.each(kind))


def node_resources(nodes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, float]]:
    """What each living node has, of what `ray.nodes()` gives."""
    return [node["Resources"] for node in nodes if node["Alive"]]
