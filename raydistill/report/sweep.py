"""The file of a sweep, `<output>/sweeps/<name>/sweep.json`: what varies, and how each trial ended."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from raydistill.errors import UserError
from raydistill.results.tables import with_error

SWEEP_FILE = "sweep.json"
SEED = "run.seed"
Status = Literal["finished", "failed", "stopped", "running", "pending"]
Value = bool | int | float | str | None | list[Any]


class Trial(BaseModel):
    """One run of a sweep."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=True)

    run: str
    status: Status
    values: dict[str, Value]
    metrics: dict[str, float | None] = {}
    seconds: dict[str, float | None] = {}
    error: str | None = None


class Sweep(BaseModel):
    """Everything that `sweep.json` says."""

    model_config = ConfigDict(frozen=True)

    name: str
    metric: str
    mode: Literal["min", "max"]
    fields: list[str]
    log_fields: list[str] = []
    num_trials: int | None = None  # of the whole sweep; None: written before it was
    paused: bool = False  # whoever ran it has left
    trials: list[Trial]

    @property
    def num_left(self) -> int:
        """Trials that have not begun."""
        return max(0, (self.num_trials or 0) - len(self.trials))

    @property
    def varied(self) -> list[str]:
        """The fields that make a point of the search; seeds repeat one."""
        return [name for name in self.fields if name != SEED]

    def value_of(self, trial: Trial) -> float | None:
        """The sweep's metric of a trial, None where it has no finite one."""
        value = trial.metrics.get(self.metric)
        return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """The mean over n seeds with its standard error (None: one seed)."""

    mean: float
    se: float | None
    n: int

    @classmethod
    def of(cls, values: list[float]) -> Estimate | None:
        if not values:
            return None
        n, mean = len(values), math.fsum(values) / len(values)
        if n == 1:
            return cls(mean=mean, se=None, n=1)
        variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
        return cls(mean=mean, se=math.sqrt(variance / n), n=n)

    def __str__(self) -> str:
        return with_error(self.mean, self.se)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One point of the search: the trials that differ in their seed at most."""

    values: Mapping[str, Value]
    trials: list[Trial] = field(default_factory=list)
    estimate: Estimate | None = None  # of the sweep's metric, over the seeds of the trials that count

    @property
    def num_seeds(self) -> int:
        """Of all its trials."""
        return len({repr(trial.values.get(SEED)) for trial in self.trials})

    @property
    def status(self) -> Status:
        """finished where one of its trials is (the metric is theirs); else how far the others are."""
        statuses = [trial.status for trial in self.trials]
        order: tuple[Status, ...] = ("finished", "stopped", "running", "pending", "failed")
        return next(status for status in order if status in statuses)

    @property
    def errors(self) -> list[str]:
        """Why trials failed, each reason once."""
        failed = [trial.error or "no reason given" for trial in self.trials if trial.status == "failed"]
        return list(dict.fromkeys(failed))


def read_sweep(folder: Path) -> Sweep:
    """The sweep of a folder; UserError that names the file and what is wrong with it."""
    path = folder / SWEEP_FILE
    try:
        return Sweep.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"{folder} is no sweep's folder: {path} cannot be read ({error.strerror})") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {place}: {first['msg']}; it is written by `raydistill sweep`") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from error


def ranked(sweep: Sweep) -> list[Point]:
    """The points, best first: finished ones by their mean, then those stopped early, running, to come, and failed."""
    groups: dict[str, list[Trial]] = {}
    for trial in sweep.trials:
        key = json.dumps([trial.values.get(name) for name in sweep.varied])
        groups.setdefault(key, []).append(trial)
    points = []
    for trials in groups.values():
        bare = Point(values={name: trials[0].values.get(name) for name in sweep.varied}, trials=trials)
        estimate = Estimate.of(_by_seed(sweep, [trial for trial in trials if trial.status == bare.status]))
        points.append(Point(values=bare.values, trials=trials, estimate=estimate))
    sign = 1.0 if sweep.mode == "min" else -1.0
    order = ("finished", "stopped", "running", "pending", "failed")

    def place(point: Point) -> tuple[int, float]:
        return (order.index(point.status), sign * point.estimate.mean if point.estimate else math.inf)

    return sorted(points, key=place)


def _by_seed(sweep: Sweep, trials: list[Trial]) -> list[float]:
    """The metric of each seed, once: the same run again says nothing about how much results differ by the seed."""
    values: dict[str, list[float]] = {}
    for trial in trials:
        value = sweep.value_of(trial)
        if value is not None:
            values.setdefault(repr(trial.values.get(SEED)), []).append(value)
    return [statistics.mean(same) for same in values.values()]
