"""What a run's record says about its own evaluation: teacher, held-out rows, rules, template.

An export that left its run's folder carries that part of the record in a file beside its weights (`source_of`). Light:
no torch here, so that a wrong path is refused at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from raydistill.config import Config, DataSection, EvaluationSection
from raydistill.errors import ModelError, UserError
from raydistill.results.record_lines import RECORD_FILE, recorded_config, require_start, start_of

EXPORT_FOLDER = "export"
"""Where a run leaves its student, inside the run's folder."""

SOURCE_FILE = "raydistill-source.json"
"""Beside an export's weights: the run's teacher, held-out rows and rules, as paths of this machine; never uploaded."""
_SOURCE_NOTE = "where this export's run found its teacher and held-out rows, for this machine only: not uploaded"
_SOURCE_SECTIONS = ("student", "teacher", "data", "objective", "evaluation")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDefaults:
    """How a run evaluated its student, from its record; paths are absolute where they exist."""

    run: str
    teacher: str | None
    data: DataSection
    evaluation: EvaluationSection
    temperature: float  # of the teacher's and the student's distributions
    held_out_fingerprint: str | None  # None: the run recorded none


def read_defaults(folder: Path) -> RunDefaults | None:
    """How the student in a run's folder or in an export was evaluated; None for a folder that does not say."""
    start, said_by = start_of(folder), folder / RECORD_FILE
    if start is None:
        start, said_by = _read_source(folder / SOURCE_FILE), folder / SOURCE_FILE
    if start is None:
        return None
    try:
        config = _with_absolute_paths(start["config"])
        return RunDefaults(
            run=start["name"],
            teacher=config["teacher"]["model"] or config["student"]["model"],
            data=DataSection.model_validate(config["data"]),
            evaluation=EvaluationSection.model_validate(config["evaluation"]),
            temperature=config["objective"]["temperature"],
            held_out_fingerprint=start.get("held_out_fingerprint"),
        )
    except (KeyError, TypeError, ValidationError) as error:
        raise UserError(
            f"{said_by} is of another version of raydistill ({type(error).__name__}); copy the model alone to another "
            "folder and evaluate that, with --teacher and --data"
        ) from error


def config_of(run: Path) -> Config:
    """The settings in a run's record; paths are absolute where they exist."""
    start = require_start(run)
    config = {**start, "config": _with_absolute_paths(start["config"])}
    return recorded_config(config, run, f"its own export is {run / EXPORT_FOLDER}")


def source_of(start: Mapping[str, Any]) -> dict[str, Any]:
    """What an export keeps of its run's record (its start line), for `read_defaults`."""
    config = _with_absolute_paths(start["config"])
    facts = {key: start.get(key) for key in ("name", "data_fingerprint", "held_out_fingerprint")}
    return {"note": _SOURCE_NOTE, **facts, "config": {name: config[name] for name in _SOURCE_SECTIONS}}


def _read_source(path: Path) -> dict[str, Any] | None:
    try:
        source: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}); remove it, and give --teacher and --data") from error
    return source


def _with_absolute_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings, found from any working directory; a hub id or what is not here stays as it is."""
    sections = {name: dict(fields) for name, fields in config.items()}
    for name, field in (("student", "model"), ("teacher", "model"), ("data", "path"), ("data", "eval_path")):
        value = sections[name][field]
        if value is not None and Path(value).exists():
            sections[name][field] = str(Path(value).absolute())
    return sections
