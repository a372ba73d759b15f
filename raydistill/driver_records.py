"""The loop's records role: the run's record on disk, checkpoints worth keeping, Ray's metrics, the bar on the console."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from raydistill.messages import EvalReport, LoadReport, Span, StepOutcome
from raydistill.progress import say
from raydistill.ray_metrics import RayMetrics
from raydistill.recovery.keeper import CheckpointKeeper
from raydistill.recovery.run_storage import RunStorage
from raydistill.results.record import RunRecord

OnEvaluation = Callable[[EvalReport], None]
"""Told of each evaluated version as soon as it is recorded."""


class DriverRecords:
    """Appends to the record and moves the bar; both take microseconds."""

    def __init__(
        self,
        record: RunRecord,
        console: Console,
        num_steps: int,
        title: str,
        keeper: CheckpointKeeper,
        metrics: RayMetrics,
        first_step: int = 0,
        on_evaluation: OnEvaluation | None = None,
        storage: RunStorage | None = None,
    ) -> None:
        self._storage = storage
        self._record, self._console, self._keeper, self._metrics = record, console, keeper, metrics
        self._on_evaluation = on_evaluation
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
        )
        self._task = self._progress.add_task(title, total=num_steps, completed=first_step, note="")

    def __enter__(self) -> DriverRecords:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def step(self, outcome: StepOutcome, metrics: dict[str, float]) -> None:
        depths = {f"{stage}/queue_depth": float(depth) for stage, depth in self._metrics.queue_depths().items()}
        self._record.step(outcome.step, metrics | depths)
        if self._storage is not None:
            self._follow(self._storage, outcome)
        self._keeper.remove_the_rest()
        self._metrics.step(outcome.step, metrics)
        note = f"loss {metrics.get('trainer/loss', float('nan')):.4f}"
        if "rollout/completion_tokens" in metrics:
            note += f", {metrics['rollout/completion_tokens']:.0f} tokens/completion"
        self._progress.update(self._task, advance=1, note=note)

    def _follow(self, storage: RunStorage, outcome: StepOutcome) -> None:
        """What the ranks say of run.storage; a storage that is away is worth one line until it is back."""
        storage.took(outcome.stored)
        if outcome.storage_problem is not None:
            storage.mirror.note(outcome.storage_problem)
        problem = storage.mirror.new_problem()
        if problem is not None:
            self.warning(f"step {outcome.step}: {problem}; training goes on, what is missing there is brought later")

    def spans(self, spans: list[Span]) -> None:
        self._record.spans(spans)

    def sync(self, report: LoadReport) -> None:
        self._record.sync(report)
        self._metrics.sync(report)

    def evaluation(self, report: EvalReport) -> None:
        self._record.evaluation(report)
        self._metrics.evaluation(report)
        self._record.spans([report.span])
        self._keeper.evaluated(report.version, report.metrics)
        if self._storage is not None:
            self._storage.push_record()
        numbers = ", ".join(
            f"{k.removeprefix('evaluate/')} {v:.4g}" for k, v in report.metrics.items() if not k.endswith("_se")
        )
        say(self._console, f"  version {report.version}: {numbers}", style="dim")
        if self._on_evaluation is not None:
            self._on_evaluation(report)

    def samples(self, version: int, rows: list[dict[str, str]]) -> None:
        if rows:
            self._record.samples(version, rows)

    def warning(self, text: str) -> None:
        self._record.warning(text)
        say(self._console, f"warning: {text}", style="yellow")
