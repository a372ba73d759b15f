"""What a line of the record becomes in the results store; pure, knows no MLflow."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raydistill.results.record_lines import Line

MAX_PARAM_CHARACTERS = 6000  # MLflow's limit
_FINAL = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
_SYNC_NUMBERS = ("gap_mean_nats", "gap_p99_nats", "size_bytes", "seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One metric value."""

    key: str
    value: float
    step: int
    time_ms: int


@dataclass(slots=True, kw_only=True)
class Parcel:
    """What a few lines of the record mean for the store, merged."""

    points: list[Point] = field(default_factory=list)
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)  # artifact path in the store -> content
    files: dict[str, Path] = field(default_factory=dict)  # artifact name -> file here
    status: str | None = None
    num_warnings: int = 0
    parent: str | None = None  # record id of the run that this one belongs to

    def add(self, line: Line) -> None:
        """Merge one line; an unknown kind is left out, so an older deliverer reads a newer record."""
        time_ms = int(line["time_s"] * 1000)
        kind = line["kind"]
        if kind == "start":
            self._add_start(line)
        elif kind == "step":
            self._add_points(line["metrics"], line["step"], time_ms)
        elif kind == "evaluation":
            self._add_points(line["metrics"], line["version"], time_ms)
        elif kind == "samples":
            self.texts[f"samples/version-{line['version']:06d}.json"] = json.dumps(line["rows"], indent=1)
        elif kind == "sync":
            numbers = {f"sync/{line['actor']}/{key}": line.get(key) for key in _SYNC_NUMBERS}
            self._add_points(numbers, line["version"], time_ms)
        elif kind == "warning":
            self.num_warnings += 1
            self.tags["last_warning"] = line["text"]
        elif kind == "table":
            self.texts[f"tables/{line['name']}.json"] = json.dumps(line["rows"], indent=1)
            if line.get("markdown"):
                self.texts[f"tables/{line['name']}.md"] = line["markdown"]
        elif kind == "artifact":
            self._add_artifact(line["name"], Path(line["path"]))
        elif kind == "resume":
            self.status = "RUNNING"
            self.tags["resumed_at_step"] = str(line["step"])
        elif kind == "end":
            self.status = _FINAL[line["status"]]
            if line.get("message"):
                self.tags["end_message"] = line["message"]

    def _add_start(self, line: Line) -> None:
        self.params |= {clean_key(key): text for key, text in flatten(line["config"]).items()}
        self.tags |= {clean_key(key): text for key, text in flatten(line["provenance"]).items() if text}
        self.tags |= {str(k): str(v) for k, v in (line["config"].get("results", {}).get("tags") or {}).items()}
        self.tags["seed"] = str(line["seed"])
        self.parent = line.get("parent")
        if line.get("data_fingerprint"):
            self.tags["data_fingerprint"] = line["data_fingerprint"]
        git = line["provenance"].get("git")
        if git:
            self.tags["mlflow.source.git.commit"] = git["revision"]

    def _add_points(self, metrics: Mapping[str, Any], step: int, time_ms: int) -> None:
        for key, value in metrics.items():
            if isinstance(value, (bool, int, float)):
                self.points.append(Point(key=clean_key(key), value=float(value), step=step, time_ms=time_ms))

    def _add_artifact(self, name: str, path: Path) -> None:
        self.tags[f"path.{clean_key(name)}"] = str(path)
        if path.is_file():
            self.files[name] = path


def flatten(tree: Mapping[str, Any]) -> dict[str, str]:
    """`{"trainer": {"zero_stage": 2}}` becomes `{"trainer.zero_stage": "2"}`; empty sections and None stay readable."""
    return {key: _as_text(value) for key, value in leaves(tree).items()}


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"trainer": {"zero_stage": 2}}` becomes `{"trainer.zero_stage": 2}`; an empty section is a leaf."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= leaves(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    return (value if isinstance(value, str) else json.dumps(value))[:MAX_PARAM_CHARACTERS]


def clean_key(key: str) -> str:
    """A name that MLflow takes: letters, digits and `_-. /`, at most 250 characters, no leading slash or `..`."""
    cleaned = re.sub(r"[^A-Za-z0-9_\-./ ]", "_", key)[:250].replace("..", "_").strip("/")
    return re.sub(r"/+", "/", cleaned) or "_"
