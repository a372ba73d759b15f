"""Whether the trials that run at the same time have room on the cluster, whichever of them these are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from raydistill.config import Config
from raydistill.errors import ConfigError, ResourceError
from raydistill.preflight.placement import Demand, Shortage, placement_plan, shortage
from raydistill.sweep.shared import pool_needs
from raydistill.sweep.space import corner_points, random_points
from raydistill.sweep.spec import Sweep

NUM_DRAWS = 64  # of the points that a searcher may choose: enough to meet every value that matters here
TRAINERS = "trainers"
POOL_OF = {"trainer": TRAINERS, "rollout": "rollouts", "teacher": "teachers", "evaluation": "evaluator"}


@dataclass(kw_only=True)
class _Actors:
    """Actors of one kind, in one pool or one trainer group: what a set of them books, and who needs a set of its own."""

    kind: object
    demand: Demand  # of one set
    holders: list[object] = field(default_factory=list)  # different engines or teachers; of trainers, trials

    def demand_of(self, at_once: int) -> Demand:
        """What they book together if no two of so many trials can share a set."""
        return replace(self.demand, count=self.demand.count * min(at_once, len(self.holders)))


def configs_of(sweep: Sweep) -> list[Config]:
    """The config of every trial; where a searcher chooses the points, those at the ends of the space and some draws."""
    if sweep.points is not None:
        return [sweep.config_of(point, "trial") for point in sweep.points]
    return list(_some_configs(sweep))


def _some_configs(sweep: Sweep) -> Iterator[Config]:
    for point in [*corner_points(sweep.space), *random_points(sweep.space, NUM_DRAWS, seed=0)]:
        try:
            yield sweep.config_of(point, "trial")
        except ConfigError:  # drawn values that do not fit together: such a trial fails alone
            continue


def check_parallel(configs: Sequence[Config], parallel: int, nodes: Sequence[Mapping[str, float]]) -> None:
    """ResourceError if so many of the trials at a time may not fit the nodes (see `node_resources`); it names the most that
    always do.

    Each trial has trainer workers of its own, pools are shared by those that need the same. Actors that were started wait
    idle for a trial that needs their kind, and keep what they booked: every kind that occurs counts.
    """
    actors = _actors_of(configs)
    by_role = any(config.cluster.by_role for config in configs)

    def missing(at_once: int) -> Shortage | None:
        return shortage([one.demand_of(at_once) for one in actors], nodes, by_role, "so many trials may need")

    found = missing(parallel)
    if found is None:
        return
    text = f"parallel={parallel}: {found.text}"
    most = next((n for n in range(parallel - 1, 0, -1) if missing(n) is None), 0)
    if most == 0:
        raise ResourceError(
            f"{text}; not even one at a time fits, since actors of every kind that the sweep starts stay until its end: "
            "vary fewer of *.num_actors, trainer.num_workers, *.num_cpus and *.num_gpus in one sweep, or add nodes"
        )
    raise ResourceError(f"{text}; the most that fit are {most}: set --parallel {most}, or {found.ways_out}")


def _actors_of(configs: Sequence[Config]) -> list[_Actors]:
    found: list[_Actors] = []
    for number, config in enumerate(configs):
        plan = {POOL_OF[demand.role]: demand for demand in placement_plan(config)}
        trainer = config.trainer
        needs = pool_needs(config) | {TRAINERS: (number, (trainer.num_workers, trainer.num_gpus, trainer.num_cpus))}
        for pool, demand in plan.items():
            holder, kind = needs[pool]
            actors = next((one for one in found if (one.demand.role, one.kind) == (demand.role, kind)), None)
            if actors is None:
                found.append(actors := _Actors(kind=kind, demand=demand))
            # Actors that are started as the same may still book different CPUs: whose trial comes first is not known.
            cpus = max(actors.demand.num_cpus, demand.num_cpus)
            actors.demand = replace(actors.demand, count=max(actors.demand.count, demand.count), num_cpus=cpus)
            if holder not in actors.holders:
                actors.holders.append(holder)
    return found
