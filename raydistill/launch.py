"""The one place that wires: config -> checks -> cluster -> pools, trainer group, records -> loop -> export.

    summary = run(load_config([...]).config)

Pools are made apart from runs, so a study or a sweep hands the same actors to several runs: `run(config, pools=...)`.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from raydistill.background import aside, run_to_end
from raydistill.config import Config
from raydistill.errors import LostError, ResourceError, RunError, RunStopped, disk_errors
from raydistill.pools import make_pools
from raydistill.progress import say
from raydistill.quant.formats import TEMPLATE
from raydistill.roles import PATIENCE_S, Pools
from raydistill.signals import StopClock, cancel_on_signals, stop_on_signals

if TYPE_CHECKING:
    from raydistill.attempt import Attempt
    from raydistill.data.dataset import Dataset
    from raydistill.driver_records import OnEvaluation
    from raydistill.preflight.findings import Finding
    from raydistill.recovery.resume import ResumePoint
    from raydistill.recovery.run_storage import RunStorage
    from raydistill.results.record import RunRecord

__all__ = ["Pools", "RunSummary", "make_pools", "run", "start_cluster"]
SUMMARY_TABLE = "summary"
"""Of a finished run's record: its `RunSummary`."""
CLOSE_S = 3.0  # for ranks that have written their checkpoint, where somebody waits for the end
MAX_FAILURES = 3  # of the trainer group without a new checkpoint in between: its cause will not go away


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """What a finished run leaves behind."""

    name: str
    folder: Path
    export: Path
    best_version: int
    metrics: dict[str, float]  # of the exported version, on held-out rows
    codes_hash: str | None  # equal on trainer, engines and export
    largest_gap_nats: float
    skipped_steps: int
    bottleneck: str
    trainer_wait_share: float  # of the wall time of all training steps
    rollout_tokens_per_cpu_s: float | None  # of the rollout processes while they sample
    seconds: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON types."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}

    @classmethod
    def of_finished(cls, folder: Path) -> RunSummary | None:
        """From the record of a run that has finished; None for any other folder."""
        from raydistill.recovery.resume import last_status
        from raydistill.results.record_lines import read_record

        if last_status(folder) != "finished":
            return None
        told = [line for line in read_record(folder) if line["kind"] == "table" and line["name"] == SUMMARY_TABLE]
        if not told:
            return None  # of a version that did not write it down
        return cls(**{**told[-1]["rows"][0], "folder": folder, "export": folder / "export"})


def start_cluster(config: Config) -> None:
    """Join the Ray cluster, or start a local one. Does nothing if this process is connected already."""
    import ray

    from raydistill.processes import check_address, no_answer, start_ray
    from raydistill.quiet import ray_speaks_on_stderr

    ray_speaks_on_stderr()
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    # One process less for each trainer group: a node that goes away is met by the next attempt, announced or not.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # A local Ray would start a process per core in advance, none of which fits an actor with environment variables of its own.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    if not config.run.verbose:
        # Nobody reads the lines that Ray's log monitor brings, for which it would go through all log files ten times a second.
        os.environ.setdefault("RAY_LOG_MONITOR_MANY_FILES_THRESHOLD", "0")
        os.environ.setdefault("LOG_NAME_UPDATE_INTERVAL_S", "3600")
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {}
    if address:
        check_address(address)
    else:
        options["num_cpus"] = config.cluster.num_cpus
        # With Ray's 5 s a machine that is busy for that long looks like a lost cluster.
        os.environ.setdefault("RAY_gcs_rpc_server_connect_timeout_s", "30")
    try:
        start_ray(
            address=address or "local",  # without one, Ray would join whatever cluster it finds on this machine
            log_to_driver=config.run.verbose,
            logging_level="INFO" if config.run.verbose else "ERROR",
            configure_logging=True,
            **options,
        )
    except ConnectionError as error:
        raise no_answer(address, error) from error


def run(config: Config, pools: Pools | None = None, console: Console | None = None) -> RunSummary:
    """Distil one student; returns when it is exported. Raises UserError before anything starts, RunError afterwards."""
    console = console or Console(stderr=True)

    async def whole() -> RunSummary:
        with cancel_on_signals():
            return await Launch(config, pools, console).run()

    try:
        return run_to_end(whole)
    except (asyncio.CancelledError, KeyboardInterrupt):  # cancelled by a signal, or because stopping took too long
        console.show_cursor()  # a bar that was left behind has hidden it
        raise KeyboardInterrupt from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Within:
    """What a run finds where it is one of many."""

    datasets: dict[str, Dataset] = field(default_factory=dict)  # read and tokenised already, by what decides them
    parent: str | None = None  # record id of the sweep that it belongs to, whose driver also delivers its record


ALONE = Within()


class Launch:
    """One run from config to export."""

    def __init__(
        self,
        config: Config,
        pools: Pools | None,
        console: Console,
        *,
        within: Within = ALONE,
        on_evaluation: OnEvaluation | None = None,
    ) -> None:
        self._console, self._own_pools = console, pools is None
        self._within, self._on_evaluation = within, on_evaluation
        self._pools = pools
        self._seconds: dict[str, float] = {}
        self._config = config
        self._attempt: Attempt | None = None
        self._clock = StopClock()
        self._storage: RunStorage | None = None

    async def run(self) -> RunSummary:
        """See `run`."""
        import ray

        from raydistill.inputs import load_inputs
        from raydistill.preflight.findings import findings_of, gpu_findings
        from raydistill.preflight.placement import check_placement, node_resources
        from raydistill.preflight.plan import make_plan
        from raydistill.preflight.storage import check_nodes_reach_storage, check_storage, check_writable
        from raydistill.recovery.lease import held_async
        from raydistill.recovery.resume import check_steps, find_checkpoint, locked, run_folder, run_storage
        from raydistill.recovery.run_storage import RunStorage, settled
        from raydistill.results.recorded import recorded

        start = time.time()
        check_writable(self._config)
        await aside(check_storage, self._config)
        # In a thread: other runs may share this event loop, and a signal is to end this one at once.
        inputs = self._inputs = await aside(load_inputs, self._config, self._console, self._within.datasets)
        config = self._config = inputs.config
        plan = await aside(make_plan, config)
        self._findings = self._judged(await aside(findings_of, inputs, plan))
        self._folder = await aside(run_folder, config, inputs.data.fingerprint, self._say)
        start_cluster(config)
        check_placement(config, node_resources(ray.nodes()))
        self._findings += self._judged(gpu_findings(config, plan, ray.nodes()))
        await aside(check_nodes_reach_storage, config)
        self._seconds["checks"] = time.time() - start
        stored = run_storage(config, self._folder)
        self._storage = None if stored is None else RunStorage(self._folder, stored)
        async with AsyncExitStack() as alone:
            alone.enter_context(locked(self._folder))
            await alone.enter_async_context(held_async(stored, self._say, self._clock.limit))
            point = await aside(find_checkpoint, self._folder, stored)
            check_steps(self._folder, point, config.trainer.num_steps)
            async with settled(self._storage, self._console, self._clock.limit) as expected:
                # Everything from here on is in the run's record, failures included.
                with (
                    recorded(
                        self._folder,
                        config,
                        self._console,
                        inputs.data.fingerprint,
                        inputs.data.held_out_fingerprint,
                        resume_at=point.version,
                        parent=self._within.parent,
                        delivers=self._within.parent is None,
                        limit=self._clock.limit,
                    ) as record,
                    stop_on_signals(self.stop, self._console, self._clock),
                ):
                    record.table("doctor", self._findings)
                    summary = await self._train(record, point)
                expected |= {summary.best_version, config.trainer.num_steps}
            return summary

    def _say(self, text: str) -> None:
        say(self._console, text, style="yellow")

    def _warn(self, record: RunRecord, text: str) -> None:
        record.warning(text)
        self._say(f"warning: {text}")

    def _judged(self, found: Sequence[Finding]) -> list[dict[str, Any]]:
        """What `raydistill doctor` would say: problems end the run, warnings are shown."""
        problems = [finding.text for finding in found if finding.status == "problem"]
        if problems:
            raise ResourceError("\n".join(problems))
        for finding in found:
            if finding.status == "warning":
                self._say(f"warning: {finding.text}")
        return [asdict(finding) for finding in found]

    async def _train(self, record: RunRecord, point: ResumePoint) -> RunSummary:
        """Attempt after attempt, until one ends; an attempt that gets no further than the one before it is the last."""
        from raydistill.attempt import Attempt
        from raydistill.recovery.checkpoint import CHECKPOINTS
        from raydistill.recovery.keeper import CheckpointKeeper
        from raydistill.recovery.resume import find_checkpoint
        from raydistill.recovery.sampled import SampledTokens
        from raydistill.results.record_lines import evaluations_of

        config = self._config
        if self._pools is None:
            self._pools = make_pools(config)
        keeping = config.checkpoint
        sampled = SampledTokens(self._folder, config)
        root = self._folder / CHECKPOINTS
        evaluates = config.evaluates if self._inputs.data.held_out else lambda _: False
        keeper = CheckpointKeeper(root, keeping.keep_last, keeping.keep_best, evaluates, sampled, storage=self._storage)
        failures = 0
        try:
            while True:
                if self._storage is not None:
                    await aside(self._storage.bring, sampled, point.version)
                self._go_on_at(point, record)
                keeper.restore(evaluations_of(self._folder), point.version)
                self._attempt = Attempt(
                    self._inputs, self._pools, record, keeper, point, self._on_evaluation, self._storage
                )
                try:
                    summary = await self._attempt.run(self._console, self._seconds)
                    sampled.forget(config.trainer.num_steps)
                    if self._storage is not None:
                        self._storage.forget_sampled(config.trainer.num_steps)
                    return await self._export(record, self._attempt, keeper, summary)
                except LostError as error:
                    stored = None if self._storage is None else self._storage.run
                    got_to, point = point.version, await aside(find_checkpoint, self._folder, stored)
                    failures = failures + 1 if point.version == got_to else 1
                    if self._clock.is_started:  # lost while it stopped: no time to start another
                        raise RunStopped(point.version) from error
                    if failures >= MAX_FAILURES:
                        raise RunError(f"{error}; it failed {failures} times without getting further") from error
                    self._warn(record, f"{error}; going on from the last checkpoint")
        finally:
            if self._own_pools:
                await self._pools.close(CLOSE_S if self._clock.is_started else PATIENCE_S)
            else:
                await self._pools.end(self._folder.name)

    def _go_on_at(self, point: ResumePoint, record: RunRecord) -> None:
        """Bring the record to where the checkpoint stands."""
        for complaint in point.complaints:
            self._warn(record, complaint)
        if record.last_step is not None and record.last_step >= point.version:
            record.cut_back(point.version)
        for step, metrics in point.steps.items():
            if step > (record.last_step if record.last_step is not None else -1):
                record.step(step, metrics)  # trained and in the checkpoint, but the driver died before it wrote it down
        if point.version > 0:
            say(self._console, f"{self._folder.name} goes on at step {point.version}", style="bold")

    async def stop(self) -> None:
        """Let the ranks checkpoint and leave; `run` then raises RunStopped."""
        if self._attempt is not None:
            await self._attempt.stop()

    async def _export(self, record: RunRecord, attempt: Attempt, keeper: Any, outcome: Any) -> RunSummary:
        """Write the best checkpoint as a folder that stands alone and check that its codes are the trained ones."""
        from raydistill.evaluate.run_defaults import EXPORT_FOLDER
        from raydistill.recovery.checkpoint import read_description
        from raydistill.report.plots import plot_spans, plot_training
        from raydistill.results.record import read_record, read_spans
        from raydistill.results.record_lines import evaluations_of
        from raydistill.results.timeline import bottleneck, stage_times

        start, config = time.time(), self._config
        version = keeper.best_version if keeper.best_version is not None else config.trainer.num_steps
        checkpoint, export = keeper.folder(version), self._folder / EXPORT_FOLDER
        extra = {"run": self._folder.name, "version": version, TEMPLATE: config.data.template}
        storage = self._storage
        written = await attempt.evaluator.export_checkpoint(
            checkpoint, export, extra, None if storage is None else storage.run
        )
        if storage is not None:
            await aside(storage.bring_finished, checkpoint, export, written)
        codes_hash = written.codes_hash
        trained = read_description(checkpoint).get("codes_hash")
        if trained is not None and codes_hash != trained:
            raise RunError(f"export {export} has codes {codes_hash}, version {version} was trained with {trained}")
        record.artifact("checkpoint", checkpoint)
        record.artifact("export", export)
        plots = self._folder / "plots"
        spans = read_spans(self._folder)
        with disk_errors(f"the run's plots to {plots}"):
            record.artifact("training", plot_training(read_record(self._folder), plots / "training.png"))
            record.artifact("spans", plot_spans(spans, plots / "spans.png"))
        line, times = bottleneck(spans), stage_times(spans)
        rate = await attempt.rollouts.tokens_per_cpu_second() if config.needs_rollouts else None
        say(self._console, line, style="dim")
        self._seconds["export"] = time.time() - start
        metrics = evaluations_of(self._folder).get(version, {})
        summary = RunSummary(
            name=self._folder.name,
            folder=self._folder,
            export=export,
            best_version=version,
            metrics=metrics,
            codes_hash=codes_hash,
            largest_gap_nats=outcome.largest_gap_nats,
            skipped_steps=outcome.skipped,
            bottleneck=line,
            trainer_wait_share=times["trainer"].wait_share,
            rollout_tokens_per_cpu_s=rate,
            seconds=dict(self._seconds),
        )
        record.table(SUMMARY_TABLE, [summary.to_json()])
        return summary
