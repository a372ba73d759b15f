"""Tune's events as the sweep's state and as lines on the console."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError
from ray.tune import Callback
from rich.console import Console

from raydistill.config import ResultsSection
from raydistill.progress import say
from raydistill.report.sweep_page import write_sweep_page
from raydistill.results.provenance import scrub
from raydistill.results.record_lines import read_record
from raydistill.sweep.spec import Sweep
from raydistill.sweep.state import OVER, SHARES, SweepState, Trial
from raydistill.sweep.stored import mirror_of
from raydistill.sweep.tuner import SUMMARY, VERSION, point_of, run_of

PLACE_S = 30.0  # for the first trial's process, which takes seconds; Ray waits for ever for a place that will never be


class SweepRecorder(Callback):
    """Writes `sweep.json` after every event. Tune keeps this callback with its own state: on the way it is rebuilt from the
    sweep, and reads what the file says."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._open()

    def _open(self) -> None:
        self.state = SweepState.of(self._sweep)
        self._mirror = mirror_of(self._sweep)
        self._console = Console(stderr=True)
        self._started: dict[str, float] = {}  # run -> when it began this time
        self._waits_since: float | None = None  # for the first trial to begin
        self._has_warned = False

    def __getstate__(self) -> Any:
        """Tune writes it to the disk: without the address of the results store, which may hold a password."""
        base = self._sweep.base.model_copy(update={"results": ResultsSection()})
        return replace(self._sweep, base=base)

    def __setstate__(self, sweep: Any) -> None:
        self._sweep = sweep
        self._open()

    def on_step_begin(self, iteration: int, trials: list[Any], **_: Any) -> None:
        self._waits_since = self._waits_since or time.monotonic()
        if self._started or self._has_warned or time.monotonic() - self._waits_since < PLACE_S:
            return
        self._has_warned = True
        text = f"no trial's process has found a place beside the sweep's own for {PLACE_S:g} s"
        say(self._console, f"warning: {text}; `ray status` says what is asked for", style="yellow")

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        run = self._run(trial)
        is_new = run not in self._started
        self._started.setdefault(run, time.time())
        one = self._change(run, values=point_of(trial.config), status="running", error=None)
        if is_new:
            say(self._console, f"{one.run} starts: {described(one)}", style="dim")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Tune tries each trial twice. The second time a run that failed answers at once, as it did before."""
        if isinstance(trial.get_pickled_error(), RayActorError):
            text = "lost the process that waits for it; another one takes its place, and the run goes on"
            say(self._console, f"warning: {self._run(trial)} {text}", style="yellow")

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        metrics = {name: value for name, value in result.items() if name.startswith("evaluate/")}
        self._change(self._run(trial), metrics=metrics)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        summary = (trial.last_result or {}).get(SUMMARY)
        if summary is None:
            at = (trial.last_result or {}).get(VERSION)
            one = self._change(self._run(trial), status="stopped", error=f"the scheduler stopped it at version {at:g}")
        else:
            self.state.share(summary[SHARES])
            one = self._change(self._run(trial), status="finished", seconds=summary["seconds"])
        value = one.metrics.get(self._sweep.file.metric)
        shown = "no value" if value is None else f"{value:.4g}"
        say(
            self._console,
            f"{one.run} {one.status}: {self._sweep.file.metric} {shown}; {described(one)}; {self._left()}",
        )
        self._draw()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        run = self._run(trial)
        folder = self._sweep.base.run.output / "runs" / run
        one = self._change(run, status="failed", error=reason_of(folder, trial, self._started.get(run, 0.0)))
        say(self._console, f"{one.run} failed: {one.error}; {described(one)}; {self._left()}", style="red")
        self._draw()

    def _change(self, run: str, **facts: Any) -> Trial:
        """Note it in the sweep's file, and bring that to run.storage with what Tune wrote beside it."""
        trial = self.state.change(run, **facts)
        if self._mirror is not None:
            self._mirror.push_tree()
        return trial

    def _draw(self) -> None:
        write_sweep_page(self._sweep.folder)

    def _left(self) -> str:
        counts = self.state.counts()
        over = sum(counts.get(status, 0) for status in OVER)
        return f"{over} of {self._sweep.num_trials} trials over"

    def _run(self, trial: Any) -> str:
        return run_of(self._sweep.name, trial.trial_id, trial.config)


def described(trial: Trial) -> str:
    """`learning_rate=0.001, beta=0.5`."""
    shown = {field: f"{value:.4g}" if isinstance(value, float) else str(value) for field, value in trial.values.items()}
    return ", ".join(f"{field.rpartition('.')[2]}={value}" for field, value in shown.items())


def reason_of(folder: Path, trial: Any, since: float) -> str:
    """Why a trial failed: as its run's record says, else as Tune heard it, without the traceback around it. What the record
    says from before `since` (seconds of the epoch) is of an earlier try."""
    told = [line for line in read_record(folder) if line["kind"] == "end" and line["status"] == "failed"]
    ends = [line for line in told if line["time_s"] >= since]
    if ends and ends[-1].get("message"):
        return str(ends[-1]["message"])
    error = trial.get_pickled_error()
    text = str(getattr(error, "cause", None) or error or "no reason is known; see its log")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return str(scrub(lines[-1]))
