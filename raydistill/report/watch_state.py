"""What `raydistill watch` knows of a run: folded from the record's lines as they come, bounded however long the run is."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from raydistill.messages import Span
from raydistill.report.run_view import Measured
from raydistill.results.names import STANDARD_ERROR
from raydistill.results.record_lines import Line, spans_of
from raydistill.results.timeline import stage_times, wall_seconds

RECENT_STEPS = 20  # over which stages and the time of a step are looked at
_KEPT_STEPS = 400  # for the sparklines
_KEPT_SPANS = 4000
_SHOWN_EVALUATIONS = 5
STAGES = ("rollout", "teacher", "trainer", "sync", "evaluate")


@dataclass(frozen=True, slots=True, kw_only=True)
class StageShare:
    """Of the recent wall time of a stage's actors."""

    stage: str
    busy: float
    waiting: float


@dataclass(slots=True)
class WatchState:
    """One run so far."""

    start: Line | None = None
    end: Line | None = None
    last_s: float = 0.0  # of the last line, in seconds since the epoch
    steps: deque[Line] = field(default_factory=lambda: deque(maxlen=_KEPT_STEPS))
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    samples: Line | None = None
    warnings: Counter[str] = field(default_factory=Counter)
    spans: deque[Span] = field(default_factory=lambda: deque(maxlen=_KEPT_SPANS))
    syncs: deque[Line] = field(default_factory=lambda: deque(maxlen=_KEPT_STEPS))
    num_resumes: int = 0

    def add(self, lines: Iterable[Line]) -> None:
        """Take up more lines of the same record."""
        for line in lines:
            self.last_s = line["time_s"]
            match line["kind"]:
                case "start":
                    self.start = line
                case "step":
                    self.steps.append(line)
                case "evaluation":
                    self.evaluations[line["version"]] = line["metrics"]
                    self.spans.extend(spans_of([line]))
                case "spans":
                    self.spans.extend(spans_of([line]))
                case "sync":
                    self.syncs.append(line)
                case "samples":
                    self.samples = line
                case "warning":
                    self.warnings[line["text"]] += 1
                case "resume":
                    self.end, self.num_resumes = None, self.num_resumes + 1
                case "end":
                    self.end = line

    @property
    def config(self) -> dict[str, Any]:
        return (self.start or {}).get("config") or {}

    @property
    def num_steps(self) -> int | None:
        """How many steps the run will make."""
        return self.config.get("trainer", {}).get("num_steps")

    @property
    def steps_done(self) -> int:
        return self.steps[-1]["step"] + 1 if self.steps else 0

    @property
    def status(self) -> str:
        return self.end["status"] if self.end else "running"

    @property
    def seconds_per_step(self) -> float | None:
        """Mean over the recent steps, all waiting included; None before there are two in a row."""
        recent = list(self.steps)[-RECENT_STEPS:]
        if len(recent) < 2:
            return None
        return float(recent[-1]["time_s"] - recent[0]["time_s"]) / (len(recent) - 1)

    @property
    def eta_s(self) -> float | None:
        """Seconds to the last step, from the recent ones; None where that says nothing."""
        if self.end or self.num_steps is None or self.seconds_per_step is None:
            return None
        return max(self.num_steps - self.steps_done, 0) * self.seconds_per_step

    def history(self, metric: str) -> list[float]:
        """The last values of a step's metric, oldest first."""
        return [line["metrics"][metric] for line in self.steps if metric in line["metrics"]]

    def evaluation_rows(self) -> list[dict[str, Any]]:
        """The first evaluation and the last ones: version and each metric with its standard error."""
        versions = sorted(self.evaluations)
        chosen = versions if len(versions) <= _SHOWN_EVALUATIONS else [versions[0], *versions[1 - _SHOWN_EVALUATIONS :]]
        rows = []
        for version in chosen:
            metrics = self.evaluations[version]
            names = [name for name in metrics if not name.endswith(STANDARD_ERROR)]
            values = {
                name: str(Measured(version=version, value=metrics[name], se=metrics.get(name + STANDARD_ERROR)))
                for name in names
            }
            rows.append({"version": version, **values})
        return rows

    def stage_shares(self) -> list[StageShare]:
        """Busy and waiting of each stage over the recent steps; the trainer says when it waits, of others it is the rest."""
        first = self.steps_done - RECENT_STEPS
        recent = [span for span in self.spans if span.step >= first]
        wall = wall_seconds(recent)
        if wall <= 0:
            return []
        times, shares = stage_times(recent), []
        for stage in STAGES:
            if stage == "sync":
                shares += self._sync_share(first, wall)
            elif stage in times:
                busy = min(times[stage].busy_share, 1.0)
                waiting = times[stage].wait_share if stage == "trainer" else 1.0 - busy
                shares.append(StageShare(stage=stage, busy=busy, waiting=min(waiting, 1.0)))
        return shares

    def _sync_share(self, first: int, wall: float) -> list[StageShare]:
        loads = [line for line in self.syncs if line["version"] > first]
        actors = {line["actor"] for line in loads}
        if not loads:
            return []
        busy = math.fsum(line["seconds"] for line in loads) / (len(actors) * wall)
        return [StageShare(stage="sync", busy=min(busy, 1.0), waiting=0.0)]
