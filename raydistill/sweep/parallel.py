"""Whether the trials that run at the same time have room on the cluster, whichever of them these are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from raydistill.config import Config
from raydistill.errors import ConfigError, ResourceError
from raydistill.preflight.placement import placement_plan
from raydistill.sweep.shared import pool_needs
from raydistill.sweep.space import corner_points, random_points
from raydistill.sweep.spec import Sweep

NUM_DRAWS = 64  # of the points that a searcher may choose: enough to meet every value that matters here
TRAINERS = "trainers"
POOL_OF = {"trainer": TRAINERS, "rollout": "rollouts", "teacher": "teachers", "evaluation": "evaluator"}
SLACK = 1e-6  # of sums of fractions
RESOURCES = {"CPU": "num_cpus", "GPU": "num_gpus"}


@dataclass(kw_only=True)
class _Actors:
    """Actors of one kind, in one pool or one trainer group: what a set of them books, and who needs a set of its own."""

    pool: str
    kind: object
    books: dict[str, float]
    holders: list[object] = field(default_factory=list)  # different engines or teachers; of trainers, trials

    def most(self, resource: str, at_once: int) -> float:
        """What they book together if no two of so many trials can share a set."""
        return min(at_once, len(self.holders)) * self.books[resource]


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


def check_parallel(configs: Sequence[Config], parallel: int, resources: Mapping[str, float]) -> None:
    """ResourceError if so many of the trials at a time may not fit the cluster; it names the most that always do.

    Each trial has trainer workers of its own, pools are shared by those that need the same. Actors that were started wait
    idle for a trial that needs their kind, and keep what they booked: every kind that occurs counts.
    """
    actors = _actors_of(configs)
    for resource, name in RESOURCES.items():
        there = resources.get(resource, 0.0)
        shared, own = _booked(actors, resource, parallel)
        if shared + own <= there + SLACK:
            continue
        fitting = (n for n in range(parallel - 1, 0, -1) if sum(_booked(actors, resource, n)) <= there + SLACK)
        most = next(fitting, 0)
        text = (
            f"parallel={parallel} trials need up to {shared + own:g} {resource}s ({shared:g} for what they share, {own:g} for "
            f"their trainers), the cluster has {there:g}"
        )
        if most == 0:
            raise ResourceError(
                f"{text}; not even one at a time fits, since actors of every kind that the sweep starts stay until its end: "
                "vary fewer of *.num_actors, trainer.num_workers, *.num_cpus and *.num_gpus in one sweep, or add nodes"
            )
        raise ResourceError(
            f"{text}; the most that fit are {most}: set --parallel {most}, lower <role>.{name}, or add nodes"
        )


def _booked(actors: Sequence[_Actors], resource: str, at_once: int) -> tuple[float, float]:
    """The most of a resource that so many trials at a time book: for what they share, and for their trainers."""
    own = sum(one.most(resource, at_once) for one in actors if one.pool == TRAINERS)
    return sum(one.most(resource, at_once) for one in actors) - own, own


def _actors_of(configs: Sequence[Config]) -> list[_Actors]:
    found: list[_Actors] = []
    for number, config in enumerate(configs):
        plan = {POOL_OF[demand.role]: demand for demand in placement_plan(config)}
        trainer = config.trainer
        needs = pool_needs(config) | {TRAINERS: (number, (trainer.num_workers, trainer.num_gpus, trainer.num_cpus))}
        for pool, demand in plan.items():
            holder, kind = needs[pool]
            books = {resource: demand.count * getattr(demand, name) for resource, name in RESOURCES.items()}
            actors = next((one for one in found if (one.pool, one.kind) == (pool, kind)), None)
            if actors is None:
                found.append(actors := _Actors(pool=pool, kind=kind, books=books))
            actors.books = {resource: max(actors.books[resource], books[resource]) for resource in RESOURCES}
            if holder not in actors.holders:
                actors.holders.append(holder)
    return found
