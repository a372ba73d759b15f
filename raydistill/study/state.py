"""What a study has done so far, so that the same command goes on with it: `study.json` in its folder.

A study's runs carry its name, so they are found again: finished ones are kept, an unfinished one goes on from its last
checkpoint. A study that has finished, or one with other settings, is no hindrance: the next one starts anew.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from raydistill.config import Config
from raydistill.errors import UserError
from raydistill.ptq.baselines import Baseline
from raydistill.recovery.resume import NEUTRAL, flat_settings, is_listed

FILE = "study.json"
MAY_CHANGE = (
    *NEUTRAL,
    *("study.tasks", "study.task_data", "study.task_limit", "study.num_fewshot"),  # of the final evaluation alone
)
"""Fields that a study may go on with although they differ."""


@dataclass(slots=True, kw_only=True)
class StudyState:
    """One study; `save` after every change."""

    folder: Path
    name: str  # its runs are called NAME-ARM
    settings: Mapping[str, Any]
    is_resumed: bool = False
    is_finished: bool = False
    baselines: dict[str, list[Baseline]] = field(default_factory=dict)  # by method, once all its widths are there

    def save(self) -> None:
        """Write the file; it is whole whenever the process ends."""
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = {
            "name": self.name,
            "is_finished": self.is_finished,
            "settings": self.settings,
            "baselines": {method: [one.to_json() for one in found] for method, found in self.baselines.items()},
        }
        temporary = self.folder / f".{FILE}.partial"
        temporary.write_text(json.dumps(kept, indent=1) + "\n")
        temporary.replace(self.folder / FILE)

    def add(self, method: str, found: Sequence[Baseline]) -> None:
        """Keep what a method made."""
        self.baselines[method] = list(found)
        self.save()

    def finish(self) -> None:
        """The table is written: the same command starts a new study."""
        self.is_finished = True
        self.save()


def open_study(folder: Path, config: Config) -> StudyState:
    """The unfinished study of the same settings in this folder, or a new one (always with run.resume=never)."""
    settings = _comparable(config)
    state = None if config.run.resume == "never" else _read(folder)
    named = config.run.name
    if state is not None and not state.is_finished and state.settings == settings and named in (None, state.name):
        state.is_resumed = True
        return state
    if state is not None and named == state.name:
        what = "has finished" if state.is_finished else "was started with other settings"
        raise UserError(
            f"run.name={named!r}: the study {what} (see {folder}); choose another run.name, or start it anew with "
            "--resume never"
        )
    new = StudyState(folder=folder, name=named or time.strftime("%Y%m%d-%H%M%S"), settings=settings)
    new.save()
    return new


@contextmanager
def study_lock(folder: Path) -> Iterator[None]:
    """Hold a study's folder; UserError if another process is at work there."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".study.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(
            f"another process is at work on the study in {folder}; wait for it, or choose another run.output"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _comparable(config: Config) -> dict[str, Any]:
    """Every setting that must be the same, as JSON keeps it."""
    return _that_count(flat_settings(json.loads(config.model_dump_json())))


def _that_count(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if not is_listed(name, MAY_CHANGE)}


def _read(folder: Path) -> StudyState | None:
    try:
        kept = json.loads((folder / FILE).read_text())
        return StudyState(
            folder=folder,
            name=kept["name"],
            settings=_that_count(kept["settings"]),
            is_finished=kept["is_finished"],
            baselines={
                method: [Baseline.from_json(one) for one in found] for method, found in kept["baselines"].items()
            },
        )
    except (OSError, ValueError, KeyError, TypeError):  # none, or of another version
        return None
