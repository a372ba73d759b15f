"""What a sweep knows of its trials, in `<sweep folder>/sweep.json`: written by its driver after every change, read by
whoever shows it. A trial's own record has the rest."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from raydistill.errors import RunError
from raydistill.sweep.spec import Sweep

STATE_FILE = "sweep.json"
TUNE_FOLDER = "tune"  # what Ray Tune writes; of no use to a later life
Status = Literal["pending", "running", "finished", "stopped", "failed"]
OVER = ("finished", "stopped", "failed")
SHARES = "shares"
"""Of a trial's summary as its host tells it: what the host's trials shared so far."""


@dataclass(kw_only=True)
class Trial:
    """One run of the sweep. metrics: of its newest evaluation, at the end of the version it exports."""

    run: str
    values: dict[str, Any]
    status: Status = "pending"
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    error: str | None = None


class SweepState:
    """The trials of one sweep, in the order they were begun."""

    def __init__(self, folder: Path, head: Mapping[str, Any]) -> None:
        """head: name, metric, mode, fields (that vary), log_fields (of these, those on a log scale), num_trials."""
        self._path, self._head = folder / STATE_FILE, dict(head)
        self._shares: dict[str, Any] = {}  # by life of the host
        self._is_paused = False
        self.trials: dict[str, Trial] = {}
        if self._path.exists():
            found = read_state(folder)
            self.trials = {one["run"]: Trial(**one) for one in found["trials"]}
            self._shares = found.get(SHARES, {})

    @classmethod
    def of(cls, sweep: Sweep) -> SweepState:
        """The state of a sweep as its file has it."""
        head = {
            "name": sweep.name,
            "metric": sweep.file.metric,
            "mode": sweep.mode,
            "fields": sweep.fields,
            "log_fields": [field for field, values in sweep.space.items() if values.is_log],
            "num_trials": sweep.num_trials,
        }
        return cls(sweep.folder, head)

    def change(self, run: str, **facts: Any) -> Trial:
        """Note something about a trial; a new one needs its `values`."""
        if run not in self.trials:
            self.trials[run] = Trial(run=run, values=facts.pop("values"))
        trial, self._is_paused = self.trials[run], False
        for name, value in facts.items():
            setattr(trial, name, value)
        self.save()
        return trial

    def pause(self) -> None:
        """Nothing runs any more: the trials that did go on when the sweep does."""
        self._is_paused = True
        for trial in self.trials.values():
            if trial.status == "running":
                trial.status = "pending"
        self.save()

    def share(self, shares: Mapping[str, Any]) -> None:
        """Take in what a host says of one of its lives; its newest word counts."""
        self._shares[shares["life"]] = dict(shares)
        self.save()

    @property
    def shared(self) -> dict[str, Any]:
        """What the trials shared: the teachers' rows over all lives of the host, else its newest life."""
        lives = list(self._shares.values())
        rows = [life["teacher_rows"] for life in lives]
        return (
            {**lives[-1], "teacher_rows": {name: sum(one[name] for one in rows) for name in rows[0]}} if lives else {}
        )

    def save(self) -> None:
        """Write the file; whole or not at all."""
        partial = self._path.with_suffix(".partial")
        trials = [asdict(trial) for trial in self.trials.values()]
        content = {
            **self._head,
            "paused": self._is_paused,
            "trials": trials,
            "shared": self.shared,
            SHARES: self._shares,
        }
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(content, indent=1) + "\n")
            os.replace(partial, self._path)
        except OSError as error:
            raise RunError(f"cannot write {self._path}: {error.strerror or error}") from error

    def counts(self) -> Mapping[str, int]:
        """Status -> number of trials."""
        statuses = [trial.status for trial in self.trials.values()]
        return {status: statuses.count(status) for status in dict.fromkeys(statuses)}


def run_name(sweep_name: str, number: int | str) -> str:
    """Of a trial's run: the number of its point, or the name that a searcher gave it."""
    return f"{sweep_name}-{number:03d}" if isinstance(number, int) else f"{sweep_name}-{number}"


def named_runs(sweep: Sweep) -> list[Path]:
    """The run folders of all trials that have a name: those whose points are known beforehand, and those that have begun."""
    planned = [run_name(sweep.name, number) for number in range(len(sweep.points or ()))]
    begun = [str(trial["run"]) for trial in trials_of(sweep.folder)]
    return [sweep.folder.parent.parent / "runs" / name for name in dict.fromkeys([*planned, *begun])]


def trials_of(folder: Path) -> list[dict[str, Any]]:
    """The trials of a sweep's file; none where it was stopped before its first."""
    try:
        trials: list[dict[str, Any]] = read_state(folder)["trials"]
    except (OSError, ValueError):
        return []
    return trials


def read_state(folder: Path) -> dict[str, Any]:
    """The content of a sweep's file."""
    found: dict[str, Any] = json.loads((folder / STATE_FILE).read_text())
    return found
