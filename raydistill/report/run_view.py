"""Everything that a record says about its run, sorted by kind, and what follows from it: how it ended, what is not default."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from raydistill.config import Config
from raydistill.messages import Span
from raydistill.results.names import STANDARD_ERROR
from raydistill.results.query import higher_is_better
from raydistill.results.record_lines import Line, read_record, spans_of
from raydistill.results.tables import COMPARISON, SummaryRow, with_error
from raydistill.results.timeline import wall_seconds
from raydistill.results.translate import leaves

NOT_SHOWN = ("run.name",)  # what a run is called says its title
_STUDY = re.compile(r"(\d{8}-\d{6})-(.+)")  # a study's runs share their time: 20260131-235959-student


@dataclass(frozen=True, kw_only=True)
class RunView:
    """One run; every list is in the order of the record."""

    folder: Path
    lines: Sequence[Line] = field(repr=False)

    @cached_property
    def start(self) -> Line:
        return next((line for line in self.lines if line["kind"] == "start"), {"kind": "start", "time_s": 0.0})

    @cached_property
    def name(self) -> str:
        return str(self.start.get("name") or self.folder.name)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The settings as a tree; `{}` where the record has none."""
        return self.start.get("config") or {}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings by dotted field."""
        return leaves(self.config)

    @cached_property
    def end(self) -> Line | None:
        """The line that ended the run's last life; None while it runs (or if it was killed)."""
        ended = None
        for line in self.lines:
            ended = line if line["kind"] == "end" else None if line["kind"] == "resume" else ended
        return ended

    @property
    def status(self) -> str:
        """finished, failed, interrupted, or running (nobody said that it ended)."""
        return str(self.end["status"]) if self.end else "running"

    @cached_property
    def last_s(self) -> float:
        """When the record's last line was written, in seconds since the epoch."""
        return float(self.lines[-1]["time_s"]) if self.lines else 0.0

    @property
    def seconds(self) -> float:
        """From the first line to the last one."""
        return self.last_s - float(self.start["time_s"])

    def of_kind(self, kind: str) -> list[Line]:
        return [line for line in self.lines if line["kind"] == kind]

    @cached_property
    def steps(self) -> list[Line]:
        return self.of_kind("step")

    @cached_property
    def evaluations(self) -> list[Line]:
        return sorted(self.of_kind("evaluation"), key=lambda line: int(line["version"]))

    @cached_property
    def samples(self) -> list[Line]:
        return sorted(self.of_kind("samples"), key=lambda line: int(line["version"]))

    @cached_property
    def warnings(self) -> list[str]:
        return [line["text"] for line in self.of_kind("warning")]

    @cached_property
    def tables(self) -> dict[str, Line]:
        """The last table of each name."""
        return {line["name"]: line for line in self.of_kind("table")}

    @cached_property
    def artifacts(self) -> dict[str, Path]:
        """Name -> where it was written."""
        return {line["name"]: Path(line["path"]) for line in self.of_kind("artifact")}

    @cached_property
    def spans(self) -> list[Span]:
        return spans_of(self.lines)

    @cached_property
    def training_seconds(self) -> float:
        """Wall time of all work, without the time between two lives of a resumed run."""
        return wall_seconds(self.spans)

    @cached_property
    def changed_settings(self) -> list[tuple[str, Any, Any]]:
        """(field, value, default) of each setting that is not the default; a field that is not known has default None."""
        defaults = leaves(Config().model_dump(mode="json"))
        return [
            (name, value, defaults.get(name))
            for name, value in self.settings.items()
            if name not in NOT_SHOWN and (name not in defaults or value != defaults[name])
        ]

    @cached_property
    def quality(self) -> list[MetricHistory]:
        """Held-out metrics over the versions."""
        names = dict.fromkeys(name for line in self.evaluations for name in line["metrics"])
        return [MetricHistory.of(name, self.evaluations) for name in names if not name.endswith(STANDARD_ERROR)]

    @cached_property
    def comparison(self) -> list[SummaryRow]:
        """The rows of the comparison that this run recorded; empty where there is none."""
        return summary_rows(self.tables[COMPARISON]) if COMPARISON in self.tables else []


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A metric of one version, with its standard error where there is one."""

    version: int
    value: float
    se: float | None

    def __str__(self) -> str:
        return with_error(self.value, self.se)


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricHistory:
    """A held-out metric: at the first evaluation, at its best, at the last."""

    name: str
    first: Measured
    best: Measured
    last: Measured

    @classmethod
    def of(cls, name: str, evaluations: Sequence[Line]) -> MetricHistory:
        points = [
            Measured(
                version=line["version"], value=line["metrics"][name], se=line["metrics"].get(name + STANDARD_ERROR)
            )
            for line in evaluations
            if name in line["metrics"]
        ]
        choose = max if higher_is_better(name) else min
        return cls(name=name, first=points[0], best=choose(points, key=lambda one: one.value), last=points[-1])


def view_of(lines: Iterable[Line], folder: Path) -> RunView:
    """The view of a record's lines."""
    return RunView(folder=folder, lines=list(lines))


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The table that a run is measured against."""

    rows: Sequence[SummaryRow]
    source: str | None  # the record that holds it, if not the run's own
    is_about_this_run: bool  # its student is this run's


def comparison_of(view: RunView) -> Comparison | None:
    """The run's own comparison, else that of the study which it was an arm of."""
    if view.comparison:
        return Comparison(rows=view.comparison, source=None, is_about_this_run=True)
    arm = _STUDY.fullmatch(view.name)
    if arm is None:
        return None
    beside = view.folder.parent / f"{arm[1]}-{COMPARISON}"
    found = next((line for line in read_record(beside) if line["kind"] == "table" and line["name"] == COMPARISON), None)
    rows = summary_rows(found) if found else []
    is_student = any(row.name == arm[2] and row.role == "student" for row in rows)
    return Comparison(rows=rows, source=beside.name, is_about_this_run=is_student) if rows else None


def summary_rows(table: Line) -> list[SummaryRow]:
    """A recorded comparison as rows, without what a study's lines say beyond them and without models that are not there;
    empty if the table is another one."""
    names = {one.name for one in fields(SummaryRow)}
    try:
        return [
            SummaryRow(**{name: value for name, value in row.items() if name in names})
            for row in table["rows"]
            if "bytes" in row
        ]
    except TypeError:
        return []
