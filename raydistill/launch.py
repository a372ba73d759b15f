"""The one place that wires: config -> checks -> cluster -> pools, trainer group, records -> loop -> export.

    summary = run(load_config([...]).config)

Pools are made apart from runs, so a study or a sweep hands the same actors to several runs: `run(config, pools=...)`.
"""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from raydistill.config import Config
from raydistill.errors import RunError, UserError
from raydistill.messages import Samples
from raydistill.progress import spinner


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


@dataclass(slots=True)
class Pools:
    """Actors that outlive a run; None where no run needs them."""

    rollouts: Any = None
    teachers: Any = None
    evaluator: Any = None

    def shutdown(self) -> None:
        """End every actor."""
        for pool in (self.rollouts, self.teachers, self.evaluator):
            if pool is not None:
                pool.shutdown()


def start_cluster(config: Config) -> None:
    """Join the Ray cluster, or start a local one. Does nothing if this process is connected already."""
    import ray

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {} if address else {"num_cpus": config.cluster.num_cpus}
    try:
        ray.init(
            address=address,
            log_to_driver=config.run.verbose,
            logging_level="INFO" if config.run.verbose else "ERROR",
            configure_logging=True,
            **options,
        )
    except ConnectionError as error:
        raise UserError(
            f"cluster.address={address!r} does not answer ({str(error).splitlines()[0]}); start it with "
            "`ray start --head`, or leave the field out for a local cluster"
        ) from error


def make_pools(config: Config) -> Pools:
    """Start the actors of a config's pools; engines and teachers are built when a run begins."""
    from raydistill.actors.pools import EvaluatorRole, RolloutPool, TeacherPool

    return Pools(
        rollouts=RolloutPool(config.rollout) if config.needs_rollout_pool else None,
        teachers=TeacherPool(config.teacher, config.rollout.timeout_s) if config.needs_teacher else None,
        evaluator=EvaluatorRole(config.evaluation, config.rollout.timeout_s),
    )


def run(config: Config, pools: Pools | None = None, console: Console | None = None) -> RunSummary:
    """Distil one student; returns when it is exported. Raises UserError before anything starts, RunError afterwards."""
    return asyncio.run(Launch(config, pools, console or Console(stderr=True)).run())


def run_name(config: Config) -> str:
    """The configured name, or a unique one from the time."""
    return config.run.name or f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"


class Launch:
    """One run from config to export."""

    def __init__(self, config: Config, pools: Pools | None, console: Console) -> None:
        self._console, self._own_pools = console, pools is None
        self._pools = pools
        self._seconds: dict[str, float] = {}
        self._config = config

    async def run(self) -> RunSummary:
        """See `run`."""
        import ray

        from raydistill.inputs import load_inputs
        from raydistill.placement import check_placement, placement_plan
        from raydistill.results.recorded import recorded

        start = time.time()
        self._inputs = load_inputs(self._config, self._console)
        config = self._config = self._inputs.config
        self._folder = (config.run.output / "runs" / run_name(config)).absolute()
        if self._folder.exists():
            raise UserError(f"run.name={self._folder.name!r}: {self._folder} exists; choose another run.name")
        start_cluster(config)
        check_placement(placement_plan(config), ray.cluster_resources())
        self._seconds["checks"] = time.time() - start
        # Everything from here on is in the run's record, failures included.
        with recorded(self._folder, config, self._console, self._inputs.data.fingerprint) as record:
            return await self._train(record)

    async def _train(self, record: Any) -> RunSummary:
        import ray

        from raydistill.actors.feed import Feed
        from raydistill.checkpoint import CheckpointKeeper
        from raydistill.driver_records import DriverRecords
        from raydistill.loop import DistillationLoop
        from raydistill.trainer.group import TrainerGroup

        config, start = self._config, time.time()
        if self._pools is None:
            self._pools = make_pools(config)
        feed = ray.remote(Feed).options(num_cpus=0, max_concurrency=1000).remote(config.sync.max_staleness + 2)
        trainer = TrainerGroup(config, feed, self._inputs.probes(), self._folder)
        evaluator = self._pools.evaluator
        trainer.start()
        try:
            with spinner(self._console, "starting engines, teachers and trainer workers"):
                await self._arm(evaluator)
                await trainer.outcome(-1)
            self._seconds["start"] = time.time() - start
            keeper = CheckpointKeeper(self._folder / "checkpoints")
            self._record_engines(record)
            with DriverRecords(record, self._console, config.trainer.num_steps, self._folder.name, keeper) as records:
                outcome = await DistillationLoop(config, self._roles(trainer, evaluator, records)).run()
            await trainer.finish()
            self._seconds["train"] = time.time() - start - self._seconds["start"]
            return await self._export(record, evaluator, keeper, outcome)
        except BaseException as error:
            await trainer.abort(str(error).splitlines()[0] if str(error) else type(error).__name__)
            raise
        finally:
            ray.kill(feed)
            if self._own_pools:
                self._pools.shutdown()

    async def _arm(self, evaluator: Any) -> None:
        """Bring pools and evaluator up, all at the same time."""
        from raydistill.data.schedule import held_out_prompts, held_out_references, sampling_seed
        from raydistill.models import StudentSpec

        config, pools, held_out = self._config, self._pools, self._inputs.data.held_out
        assert pools is not None
        work = []
        if config.needs_rollout_pool:
            prompts = held_out_prompts(held_out) if config.evaluation.exact_match != "off" else None
            seed = config.run.seed
            spec = self._inputs.engine_spec()
            work.append(pools.rollouts.begin(config, spec, prompts, lambda s, i: sampling_seed(seed, s, i)))
        work.append(self._arm_evaluator(evaluator, StudentSpec.of(config), held_out_references(held_out)))
        await asyncio.gather(*work)

    async def _arm_evaluator(self, evaluator: Any, spec: Any, references: Samples | None) -> None:
        config, pools = self._config, self._pools
        assert pools is not None
        scored = []
        if config.needs_teacher:
            await pools.teachers.begin(config.teacher, config.objective, self._inputs.facts.vocab_size)
        if references is not None:
            if config.needs_teacher:
                _, handle = await pools.teachers.score(references, references.completions.num_tokens)
            else:
                import ray

                from raydistill.messages import Scored

                handle = ray.put(Scored(samples=references, target=None))
            scored.append(handle)
        await evaluator.begin(spec, config.objective, references, scored)

    def _roles(self, trainer: Any, evaluator: Any, records: Any) -> Any:
        from raydistill.data.schedule import StepSchedule
        from raydistill.roles import Roles

        config, pools = self._config, self._pools
        assert pools is not None
        schedule = StepSchedule(
            self._inputs.data.train,
            config.run.seed,
            config.trainer.sequences_per_step,
            config.objective.on_policy_fraction,
            config.objective.mixing,
        )
        return Roles(
            prompts=schedule,
            rollouts=pools.rollouts if config.needs_rollout_pool else None,
            teachers=pools.teachers if config.needs_teacher else None,
            trainer=trainer,
            evaluator=evaluator if self._inputs.data.held_out else None,
            records=records,
            reference_parts=self._reference_parts,
        )

    def _reference_parts(self, references: Samples) -> list[Any]:
        """References for each trainer rank; without a teacher they are wrapped as the trainer expects them."""
        import ray

        from raydistill.actors.pools import rank_of
        from raydistill.messages import Scored
        from raydistill.roles import Sampled

        workers = self._config.trainer.num_workers
        parts = []
        for rank in range(workers):
            rows = [r for r, index in enumerate(references.indices) if rank_of(index, workers) == rank]
            if rows:
                samples = references.take(rows)
                handle = samples if self._config.needs_teacher else ray.put(Scored(samples=samples, target=None))
                parts.append(Sampled(rank=rank, num_tokens=samples.completions.num_tokens, samples=handle))
        return parts

    def _record_engines(self, record: Any) -> None:
        pools = self._pools
        assert pools is not None
        rows = []
        if self._config.needs_rollout_pool:
            rows += [{"role": f"rollout-{i}", "class": name} for i, name in enumerate(pools.rollouts.engine_names)]
        if self._config.needs_teacher:
            rows += [{"role": f"teacher-{i}", "class": name} for i, name in enumerate(pools.teachers.class_names)]
        record.table("engines", rows)

    async def _export(self, record: Any, evaluator: Any, keeper: Any, outcome: Any) -> RunSummary:
        """Write the best checkpoint as a folder that stands alone and check that its codes are the trained ones."""
        from raydistill.checkpoint import read_description
        from raydistill.results.plots import plot_spans, plot_training
        from raydistill.results.record import read_record, read_spans
        from raydistill.results.timeline import bottleneck, stage_times

        start, config = time.time(), self._config
        version = keeper.best_version if keeper.best_version is not None else config.trainer.num_steps
        checkpoint, export = keeper.folder(version), self._folder / "export"
        extra = {"run": self._folder.name, "version": version}
        codes_hash = await evaluator.actor.export_checkpoint.remote(checkpoint, export, extra)
        trained = read_description(checkpoint).get("codes_hash")
        if trained is not None and codes_hash != trained:
            raise RunError(f"export {export} has codes {codes_hash}, version {version} was trained with {trained}")
        record.artifact("checkpoint", checkpoint)
        record.artifact("export", export)
        plots = self._folder / "plots"
        plots.mkdir(exist_ok=True)
        spans = read_spans(self._folder)
        record.artifact("training", plot_training(read_record(self._folder), plots / "training.png"))
        record.artifact("spans", plot_spans(spans, plots / "spans.png"))
        line, times = bottleneck(spans), stage_times(spans)
        rate = await self._pools.rollouts.tokens_per_cpu_second() if config.needs_rollouts else None  # type: ignore[union-attr]
        self._console.print(line, style="dim")
        self._seconds["export"] = time.time() - start
        metrics: dict[str, float] = next((e.metrics for e in outcome.evaluations if e.version == version), {})
        return RunSummary(
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
