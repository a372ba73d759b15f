"""What a sweep file says, checked before anything starts: base config, search space, sampler, scheduler.

# tune/lr_offpolicy.toml
base = ["@configs/demo.toml"]               # config files, unless the command line names some
metric = "evaluate/kl_nats"                 # what trials are ranked by (the last evaluation of each)

[settings]                                  # of every trial
"objective.on_policy_fraction" = 0.0

[space]                                     # what varies
"trainer.learning_rate" = { log_range = [1e-3, 1e-2], num = 4 }
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from raydistill.config import Config
from raydistill.config.fields import config_fields, config_sections, did_you_mean
from raydistill.config.load import load_config, with_values
from raydistill.config.problems import unknown_field
from raydistill.errors import ConfigError
from raydistill.results.query import higher_is_better
from raydistill.sweep.space import (
    Values,
    corner_points,
    grid_points,
    parse_together,
    parse_values,
    random_points,
    with_seeds,
)

DEFAULT_METRIC = "evaluate/kl_nats"
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
NOT_SWEPT = ("run.name", "run.output", "run.storage", "run.resume", "run.verbose")
"""Fields that are the sweep's own, or that make no sense for one trial alone."""
NOT_SWEPT_SECTIONS = {
    "results": "all trials are recorded in one place",
    "cluster": "all trials run on one cluster",
    "world": "a world is made once, for all trials: run a sweep of its own, with --name, for each",
    "study": "no trial reads it; sweep what an arm sets (objective.on_policy_fraction, objective.beta), or use `raydistill "
    "compare`",
}
"""Sections whose fields would make no difference between trials, and what to do about it."""


class AshaSection(BaseModel):
    """Asynchronous successive halving (ASHA, arXiv 1810.05934): trials that lag behind at a rung are stopped."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    grace_steps: int = Field(50, ge=1, description="no trial is stopped before this optimizer step")
    reduction_factor: float = Field(3, gt=1, description="at each rung the best 1/factor go on; rungs are factor apart")


class SweepFile(BaseModel):
    """The keys of a sweep file."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str | None = Field(None, pattern=NAME_PATTERN, description="of the sweep's folder; unset: the file's name")
    description: str = Field("", description="one line about what is asked")
    base: tuple[str, ...] = Field(
        (), description="config files where the command line names none: '@configs/demo.toml'"
    )
    metric: str = Field(DEFAULT_METRIC, description="what trials are ranked by: a metric of an evaluation")
    mode: Literal["min", "max"] | None = Field(None, description="which end is best; unset: follows from the metric")
    sampler: Literal["grid", "random", "optuna"] = Field("grid", description="how points of the space are chosen")
    num_samples: int | None = Field(None, ge=1, description="points that random and optuna try")
    seeds: tuple[int, ...] = Field((), description="run.seed of the repetitions of every point; empty: the base's")
    scheduler: Literal["none", "asha"] = Field("none", description="asha: stop trials that lag behind")
    asha: AshaSection = Field(default_factory=AshaSection)
    parallel: int = Field(1, ge=1, description="trials at the same time")
    cache_gib: float = Field(2.0, ge=0, description="teacher.cache_gib of all trials, unless a setting says otherwise")
    settings: dict[str, Any] = Field(default_factory=dict, description="dotted config fields of every trial")
    space: dict[str, Any] = Field(default_factory=dict, description="dotted config fields that vary")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """A sweep that can start: every config it may try was checked."""

    name: str
    file: SweepFile
    space: Mapping[str, Values]
    varying: tuple[str, ...]  # dotted fields, also of those that vary together
    base: Config  # the settings of every trial
    points: tuple[Mapping[str, Any], ...] | None  # None: chosen one after another (optuna)

    @property
    def mode(self) -> Literal["min", "max"]:
        return self.file.mode or ("max" if higher_is_better(self.file.metric) else "min")

    @property
    def folder(self) -> Path:
        return (self.base.run.output / "sweeps" / self.name).absolute()

    @property
    def num_trials(self) -> int:
        """Of the whole sweep."""
        if self.points is not None:
            return len(self.points)
        return (self.file.num_samples or 0) * max(1, len(self.file.seeds))

    @property
    def note(self) -> str | None:
        """What to say before it starts."""
        asked, repeats = self.file.num_samples or 0, max(1, len(self.file.seeds))
        if self.points is None or len(self.points) >= asked * repeats:
            return None
        found = len(self.points) // repeats
        return f"num_samples={asked}, and the space has only {found} different points: each is tried once"

    @property
    def fields(self) -> list[str]:
        """The dotted fields that vary, seeds last."""
        return [*self.varying, *(["run.seed"] if self.file.seeds else [])]

    def config_of(self, point: Mapping[str, Any], run: str) -> Config:
        """The config of one trial; ConfigError if the point's values do not fit together."""
        return with_values(self.base, {**point, "run.name": run}, f"sweep {self.name}")

    def identity(self) -> dict[str, Any]:
        """What may not change when an interrupted sweep goes on. points: in their order, which names the trials; None where
        a searcher chooses them."""
        return {
            "points": self.points,
            "space": {field: repr(values) for field, values in self.space.items()},
            "settings": json.loads(
                self.base.model_dump_json(
                    exclude={"run": {"output", "storage", "verbose", "resume"}, "cluster": True, "results": True}
                )
            ),
            **self.file.model_dump(include={"metric", "mode", "sampler", "num_samples", "seeds", "scheduler", "asha"}),
        }


def load_sweep(path: Path, arguments: Sequence[str] = (), **changes: Any) -> Sweep:
    """Read a sweep file. An @file.toml of `arguments` replaces its base; its settings stay, --section.field values win.

    changes: keys of the file that the command line sets (name, parallel, num_samples, ...); None leaves the file's.
    """
    file = _read(path, {key: value for key, value in changes.items() if value is not None})
    together = {name: written for name, written in file.space.items() if name in config_sections()}
    alone = [name for name in file.space if name not in together]
    alone += [f"{name}.{leaf}" for name, tables in together.items() for leaf in _leaves(tables)]
    parts = (("settings", file.settings), ("space", alone))
    problems = [
        unknown_field(f"{path}: {part}", name) for part, names in parts for name in names if _field_of(name) is None
    ]
    problems += [f"{path}: space: {name} {reason}" for name in alone if (reason := _not_swept(name)) is not None]
    problems += [f"{path}: {name} stands in both settings and space" for name in alone if name in file.settings]
    if file.seeds and "run.seed" in alone:
        problems.append(f"{path}: run.seed stands in space, and seeds are given; keep one of them")
    if problems:
        raise ConfigError("\n".join(problems))
    if not file.space and not file.seeds:
        raise ConfigError(f"{path}: nothing varies; name fields and their values in [space], or seeds")
    # The models, data and world of a base are one whole: of two bases neither would be what somebody asked for.
    base_files = () if any(argument.startswith("@") for argument in arguments) else file.base
    given = (*base_files, *override({"teacher.cache_gib": file.cache_gib} | dict(file.settings)), *arguments)
    base = load_config(given).config
    space: dict[str, Values] = {}
    for name, written in file.space.items():
        where = f"{path}: space: {name}"
        if name in together:
            space[name] = parse_together(where, written, getattr(base, name).model_dump())
        else:
            space[name] = parse_values(where, written, file.sampler == "grid")
    sweep = Sweep(
        name=file.name or path.stem,
        file=file,
        space=space,
        base=base,
        varying=tuple(alone),
        points=_points(path, file, space),
    )
    _check_points(path, sweep)
    return sweep


def _not_swept(name: str) -> str | None:
    """Why a field cannot differ between trials; None if it can."""
    reason = NOT_SWEPT_SECTIONS.get(name.partition(".")[0])
    if reason is not None:
        return f"cannot differ between trials: {reason}. One value for all stands in [settings] or on the command line"
    return "is the sweep's own; leave it out" if name in NOT_SWEPT else None


def override(values: Mapping[str, Any]) -> list[str]:
    """Dotted fields and their values as command-line arguments."""
    return [f"--{field}={_text(value)}" for field, value in values.items()]


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, str):
        return value
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def _leaves(tables: Any) -> list[str]:
    """The fields of a section that vary together; none where it is no list of tables, which is refused later."""
    one_by_one = tables if isinstance(tables, list) else []
    return list(dict.fromkeys(leaf for table in one_by_one if isinstance(table, dict) for leaf in table))


def _field_of(name: str) -> Any:
    section, _, rest = name.partition(".")
    leaf, _, key = rest.partition(".")
    found = config_fields().get(f"{section}.{leaf}")
    return found if found is None or not key or found.is_table else None


def _read(path: Path, changes: Mapping[str, Any]) -> SweepFile:
    try:
        written = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror or error}; the shipped sweeps are tune/*.toml"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no TOML: {error}") from error
    written["settings"] = _flat(written.get("settings", {}))
    written["space"] = _flat(written.get("space", {}), stop=("range", "log_range", "num"))
    try:
        return SweepFile.model_validate({**written, **changes})
    except ValidationError as error:
        known = ", ".join(SweepFile.model_fields)
        lines = []
        for one in error.errors():
            place = ".".join(str(part) for part in one["loc"])
            hint = f"; a sweep file has {known}" if one["type"] == "extra_forbidden" else ""
            lines.append(f"{path}: {place}: {one['msg']}{hint}")
        raise ConfigError("\n".join(lines)) from error


def _flat(table: Any, stop: tuple[str, ...] = (), prefix: str = "") -> Any:
    """`[space.trainer] learning_rate = ...` means the same as `"trainer.learning_rate" = ...`."""
    if not isinstance(table, dict):
        return table
    flat: dict[str, Any] = {}
    for name, value in table.items():
        is_section = isinstance(value, dict) and not (set(value) & set(stop)) and _field_of(f"{prefix}{name}") is None
        flat |= _flat(value, stop, f"{prefix}{name}.") if is_section and value else {f"{prefix}{name}": value}
    return flat


def _points(path: Path, file: SweepFile, space: Mapping[str, Values]) -> tuple[Mapping[str, Any], ...] | None:
    if file.sampler == "grid":
        if file.num_samples is not None:
            raise ConfigError(f"{path}: a grid tries every combination; num_samples is for sampler random or optuna")
        return tuple(with_seeds(grid_points(space), file.seeds))
    if file.num_samples is None:
        raise ConfigError(f"{path}: sampler = {file.sampler!r} needs num_samples, the number of points to try")
    if file.sampler == "random":
        return tuple(with_seeds(random_points(space, file.num_samples, seed=0), file.seeds))
    if file.seeds:
        raise ConfigError(f"{path}: optuna chooses each point by those before it; seeds are for grid and random")
    return None


def _check_points(path: Path, sweep: Sweep) -> None:
    """Every config that is known beforehand has to be one; the same mistake is told once."""
    points = list(sweep.points) if sweep.points is not None else corner_points(sweep.space)
    problems: dict[str, str] = {}
    for point in points:
        try:
            config = sweep.config_of(point, "trial")
        except ConfigError as error:
            values = ", ".join(f"{field}={value}" for field, value in point.items())
            problems.setdefault(str(error), f"{path}: with {values}: {error}")
            continue
        if not config.data.eval_rows:
            raise ConfigError(
                f"{path}: data.eval_rows=0 leaves no {sweep.file.metric} to rank trials by; set it above 0"
            )
        problem = _metric_problem(sweep.file.metric, config)
        if problem is not None:
            problems.setdefault(problem, f"{path}: {problem}")
        if sweep.file.scheduler == "asha" and config.trainer.num_steps <= sweep.file.asha.grace_steps:
            raise ConfigError(
                f"{path}: asha.grace_steps={sweep.file.asha.grace_steps} is not below "
                f"trainer.num_steps={config.trainer.num_steps}: no trial would be stopped; lower it"
            )
    if problems:
        raise ConfigError("\n".join(list(problems.values())[:10]))


def _metric_problem(metric: str, config: Config) -> str | None:
    """Why no evaluation of a trial would have this metric; None if one has (see `EvaluatorActor.evaluate`)."""
    match = ("evaluate/exact_match", "evaluate/exact_match_se")
    there = {  # by name, why it is not among those that a trial's evaluations have
        "evaluate/perplexity": None,
        DEFAULT_METRIC: None if config.needs_teacher else "objective.distill_weight=0 asks no teacher",
        **dict.fromkeys(match, "evaluation.exact_match='off'" if config.evaluation.exact_match == "off" else None),
    }
    reported = ", ".join(name for name, reason in there.items() if reason is None)
    if metric not in there:
        near = did_you_mean(get_close_matches(metric, there, n=1), f"evaluations report {reported}")
        return f"metric={metric!r} is none that trials are evaluated by; {near}"
    reason = there[metric]
    return None if reason is None else f"metric={metric!r} is not measured with {reason}; evaluations report {reported}"
