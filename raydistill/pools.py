"""Start the actors of all pools that a config needs. Only this module knows which class each pool is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from raydistill.config import Config
from raydistill.roles import Pools


def _make_rollouts(config: Config) -> Any:
    from raydistill.actors.rollout_pool import RolloutPool

    return RolloutPool(config.rollout, config.cluster.by_role)


def _make_teachers(config: Config) -> Any:
    from raydistill.actors.teacher_pool import TeacherPool

    return TeacherPool(config.teacher, config.rollout.timeout_s, config.cluster.by_role)


def _make_evaluator(config: Config) -> Any:
    from raydistill.actors.evaluator_pool import EvaluatorPool

    return EvaluatorPool(config.evaluation, config.rollout.timeout_s, config.cluster.by_role)


def _make_trainers(config: Config) -> Any:
    from raydistill.trainer.crew import TrainerPool

    return TrainerPool()


POOL_MAKERS: Mapping[str, Callable[[Config], Any]] = {
    "rollouts": _make_rollouts,
    "teachers": _make_teachers,
    "evaluator": _make_evaluator,
    "trainers": _make_trainers,
}
"""Each starts the actors of one of a config's pools; engines and teachers are built when a run begins."""


def make_pools(config: Config) -> Pools:
    """Start the actors of all pools that a config needs."""
    needs = {
        "rollouts": config.needs_rollout_pool,
        "teachers": config.needs_teacher,
        "evaluator": True,
        "trainers": True,
    }
    return Pools(**{name: make(config) for name, make in POOL_MAKERS.items() if needs[name]})
