"""One run as a row: its settings, last metrics and tags, from a results store or from its own record."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydistill.config.fields import config_fields
from raydistill.results.record_lines import Line
from raydistill.results.translate import Parcel, leaves

RUN_TAG = "path.run"  # the run's folder, as the machine that trained it names it
FACTS = ("run", "id", "status", "started", "seconds", "parent")
"""What every run has beside settings, metrics and tags; names in `--where`, `--sort` and `--columns`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRow:
    """One run; numbers are the last ones that it reported."""

    name: str
    id: str  # in the store; of a run that was read from its folder, the record's
    record_id: str
    status: str  # running, finished, failed or killed (interrupted, or its driver died)
    started_s: float | None  # seconds since the epoch
    seconds: float | None  # None while it runs
    parent: str | None  # name of the run that it belongs to, such as a sweep
    settings: Mapping[str, Any]  # by dotted field, typed
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    folder: Path | None  # where the run wrote its record; may lie on another machine

    @property
    def started(self) -> str | None:
        """`2026-01-31 23:59`, local time."""
        if self.started_s is None:
            return None
        return datetime.datetime.fromtimestamp(self.started_s).strftime("%Y-%m-%d %H:%M")

    def fact(self, name: str) -> Any:
        """One of `FACTS`."""
        return self.name if name == "run" else getattr(self, name)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; a number that is not finite becomes null."""
        facts = {name: self.fact(name) for name in FACTS} | {"folder": str(self.folder) if self.folder else None}
        metrics = {key: value if math.isfinite(value) else None for key, value in self.metrics.items()}
        return facts | {"settings": dict(self.settings), "metrics": metrics, "tags": dict(self.tags)}


def typed_setting(name: str, text: str) -> Any:
    """A setting that the store keeps as text, as the config's field has it."""
    field = config_fields().get(name)
    if text == "":
        return None
    if field is not None and field.takes_text:
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def row_of_record(lines: Iterable[Line], folder: Path) -> RunRow:
    """A run by its own record, without a store; the same row that the store would give, but for its id."""
    parcel, start, last_s, ended = Parcel(), {}, 0.0, False
    for line in lines:
        parcel.add(line)
        last_s = line["time_s"]
        if line["kind"] == "start":
            start = line
        ended = line["kind"] == "end" or (ended and line["kind"] != "resume")
    record_id = start.get("record_id", "")
    warnings = {"num_warnings": str(parcel.num_warnings)} if parcel.num_warnings else {}
    return RunRow(
        name=start.get("name", folder.name),
        id=record_id,
        record_id=record_id,
        status=(parcel.status or "RUNNING").lower(),
        started_s=start.get("time_s"),
        seconds=last_s - start["time_s"] if ended and start else None,
        parent=None,
        settings=leaves(start.get("config", {})),
        metrics={point.key: point.value for point in parcel.points},
        tags=parcel.tags | warnings,
        folder=folder,
    )
