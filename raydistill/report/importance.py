"""How much of a sweep's outcome each of its fields decides, by Optuna's fANOVA.

A random forest is fitted through the finished points (seeds averaged); a field's importance is the share of the forest's
variance over the searched space that the field explains on its own (Hutter et al., ICML 2014). Shares sum to 1; what
only a combination of fields explains is in none of them. Fields searched on a log scale enter as logarithms.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raydistill.report.sweep import Point, Sweep

FEWEST_POINTS = 4
_NUM_TREES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Importance:
    """The shares, highest first; or none, and why."""

    shares: Mapping[str, float]
    text: str


def importance(sweep: Sweep, points: Sequence[Point]) -> Importance:
    """The importance of each field that took more than one value among the finished points."""
    finished = [point for point in points if point.status == "finished" and point.estimate is not None]
    if len(finished) < FEWEST_POINTS:
        return Importance(
            shares={},
            text=f"{len(finished)} distinct points have finished; with fewer than {FEWEST_POINTS} any number would be made up.",
        )
    columns = {
        name: _column([point.values.get(name) for point in finished], name in sweep.log_fields) for name in sweep.varied
    }
    columns = {name: column for name, column in columns.items() if len(set(column)) > 1}
    if not columns:
        return Importance(shares={}, text="no field took more than one value among the finished points.")
    targets = [point.estimate.mean for point in finished if point.estimate is not None]
    if len(set(targets)) == 1:
        return Importance(shares={}, text=f"{sweep.metric} is the same at all finished points.")
    text = (
        f"The share of {sweep.metric}'s variance over the searched space that each field explains on its own: fANOVA (a "
        f"forest of {_NUM_TREES} trees, by Optuna) through {len(finished)} finished points, seeds averaged. A hint, not a "
        "proof: the forest knows no more than these points."
    )
    return Importance(shares=_fanova(columns, targets, sweep.mode), text=text)


def _column(values: Sequence[Any], is_log: bool) -> list[float] | list[str]:
    """A field's values as the forest takes them: numbers (their logarithms), else categories."""
    numbers = [float(v) for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if len(numbers) < len(values):
        return [json.dumps(value) for value in values]
    return [math.log10(number) for number in numbers] if is_log and min(numbers) > 0 else numbers


def _fanova(columns: Mapping[str, Sequence[Any]], targets: Sequence[float], mode: str) -> dict[str, float]:
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    distributions: dict[str, BaseDistribution] = {
        name: CategoricalDistribution(sorted(set(column)))
        if isinstance(column[0], str)
        else FloatDistribution(min(column), max(column))
        for name, column in columns.items()
    }
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(direction="minimize" if mode == "min" else "maximize")
        for place, target in enumerate(targets):
            params = {name: column[place] for name, column in columns.items()}
            study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=target))
        evaluator = FanovaImportanceEvaluator(n_trees=_NUM_TREES, seed=0)
        return dict(get_param_importances(study, evaluator=evaluator, params=list(columns)))
    finally:
        optuna.logging.set_verbosity(before)
