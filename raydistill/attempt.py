"""One attempt at a run: arm the pools, start a trainer group at a checkpoint, loop to the end.

`launch` makes another attempt when the trainer group is lost. Pools and their engines stay; feed and trainer are new.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterable
from dataclasses import replace
from typing import Any

import ray
from rich.console import Console

from raydistill.actors.evaluator_pool import RunEvaluator, ShownRows
from raydistill.actors.rollout import EngineSpec
from raydistill.actors.rollout_pool import RunRollouts
from raydistill.actors.teacher_pool import RunTeachers
from raydistill.background import aside
from raydistill.data.schedule import StepSchedule, held_out_prompts, held_out_references, rank_of
from raydistill.driver_records import DriverRecords, OnEvaluation
from raydistill.errors import RunStopped
from raydistill.inputs import RunInputs
from raydistill.loop import DistillationLoop, LoopSummary
from raydistill.messages import Samples, Scored, TokenRows
from raydistill.models import StudentSpec
from raydistill.progress import spinner
from raydistill.ray_metrics import RayMetrics
from raydistill.recovery.keeper import CheckpointKeeper
from raydistill.recovery.resume import ResumePoint
from raydistill.recovery.run_storage import RunStorage
from raydistill.recovery.sampled import ReplayedRollouts, SampledTokens
from raydistill.results.record import RunRecord
from raydistill.roles import Handle, Pools, Roles, Sampled
from raydistill.trainer.crew import GIVE_UP_S, HURRY_S
from raydistill.trainer.group import TrainerGroup


async def first_error(*work: Coroutine[Any, Any, Any]) -> None:
    """Do all of it at the same time; the first error ends the rest and is raised."""
    try:
        async with asyncio.TaskGroup() as tasks:
            for part in work:
                tasks.create_task(part)
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None


class Attempt:
    """One feed, one trainer group, one loop; `run` ends with the loop's summary or with what went wrong."""

    evaluator: RunEvaluator  # these three are the run's views of the pools, once they are armed
    rollouts: RunRollouts
    teachers: RunTeachers

    def __init__(
        self,
        inputs: RunInputs,
        pools: Pools,
        record: RunRecord,
        keeper: CheckpointKeeper,
        point: ResumePoint,
        on_evaluation: OnEvaluation | None = None,
        storage: RunStorage | None = None,
    ) -> None:
        config, self._storage = inputs.config, storage
        self._on_evaluation = on_evaluation
        self._inputs, self._pools, self._record, self._keeper = inputs, pools, record, keeper
        self._config, self._point = config, point
        folder = record.path.parent
        self._crew = pools.trainers.lease(config)
        self._trainer = TrainerGroup(config, self._crew, inputs.probes(), folder, point.folder)
        self._name = folder.name
        self._patience_s = GIVE_UP_S  # for a crew that is not done

    async def run(self, console: Console, seconds: dict[str, float]) -> LoopSummary:
        """Train from the attempt's checkpoint to the end; adds its start-up and training time to `seconds`."""
        try:
            try:
                return await self._train(console, seconds)
            except RunStopped:
                await self._trainer.finish()  # the ranks write their checkpoint
                raise
        except asyncio.CancelledError:  # also while the ranks write
            self._patience_s = HURRY_S
            raise
        finally:
            if self._trainer.is_done:
                self._pools.trainers.give_back(self._crew)
            else:  # afterwards none of the ranks can write a checkpoint
                await self._crew.end(self._patience_s)

    async def _train(self, console: Console, seconds: dict[str, float]) -> LoopSummary:
        start = time.time()
        with spinner(console, "starting engines, teachers and trainer workers"):
            await first_error(self._arm(), self._trainer.start())
        self._record_engines()
        if self._storage is not None:  # the ranks may have brought the first version by now
            await aside(self._storage.look)
        armed = time.time()
        seconds["start"] = seconds.get("start", 0.0) + armed - start
        records = DriverRecords(
            self._record,
            console,
            self._config.trainer.num_steps,
            self._name,
            self._keeper,
            RayMetrics(self._name, self._pools.queue_depths),
            self._point.version,
            self._on_evaluation,
            self._storage,
        )
        with records:
            loop = DistillationLoop(self._config, self._roles(records), self._point.version, self._point.skipped)
            summary = await loop.run()
        await self._trainer.finish()
        seconds["train"] = seconds.get("train", 0.0) + time.time() - armed
        return summary

    async def stop(self) -> None:
        """Let the ranks checkpoint and leave; `run` then raises RunStopped."""
        self._patience_s = HURRY_S  # from here on somebody counts the seconds
        await self._trainer.stop()

    async def _arm(self) -> None:
        """Bring pools and evaluator up, all at the same time."""
        config, held_out = self._config, self._inputs.data.held_out
        work = []
        if config.needs_rollout_pool:
            work.append(self._arm_rollouts())
        work.append(self._arm_evaluator(StudentSpec.of(config), held_out_references(held_out)))
        await first_error(*work)

    async def _arm_rollouts(self) -> None:
        config = self._config
        prompts = held_out_prompts(self._inputs.data.held_out) if config.evaluation.exact_match != "off" else None
        self.rollouts = await self._pools.rollouts.begin(self._name, config, self._engine_spec(), prompts)

    def _engine_spec(self) -> EngineSpec:
        return replace(self._inputs.engine_spec(), num_adapters=self._pools.num_adapters)

    async def _arm_evaluator(self, spec: StudentSpec, references: Samples | None) -> None:
        config, pools = self._config, self._pools

        async def score() -> list[Handle]:
            if references is None:
                return []
            if not config.needs_teacher:
                return [ray.put(Scored(samples=references, target=None))]
            _, handle = await self.teachers.score(references, references.completions.num_tokens)
            return [handle]

        if config.needs_teacher:
            vocab_size = self._inputs.facts.vocab_size
            self.teachers = await pools.teachers.begin(self._name, config.teacher, config.objective, vocab_size)
        shown = await self._shown_rows() if config.evaluation.shown_rows else None
        self.evaluator = await pools.evaluator.begin(self._name, spec, config.objective, references, score, shown)

    async def _shown_rows(self) -> ShownRows:
        """The first held-out rows, with what the teacher writes for them."""
        config, tokenizer = self._config, self._inputs.facts.tokenizer
        examples = self._inputs.data.held_out[: config.evaluation.shown_rows]
        prompts = TokenRows.from_rows([example.prompt_ids for example in examples])
        eos_ids, max_new_tokens = self._inputs.facts.eos_ids, config.evaluation.max_new_tokens
        teacher: list[list[int]] = [[] for _ in examples]
        if config.needs_teacher and examples:
            teacher = await self.teachers.answer(prompts, eos_ids, max_new_tokens)

        def text_of(ids: Iterable[int]) -> str:
            return str(tokenizer.decode([int(token) for token in ids], skip_special_tokens=True))

        rows = [
            {
                "row_id": example.row_id,
                "prompt": text_of(example.prompt_ids),
                "reference": text_of(example.reference_ids),
                "teacher": text_of(ids),
            }
            for example, ids in zip(examples, teacher, strict=True)
        ]
        return ShownRows(rows=rows, prompts=prompts, eos_ids=eos_ids, max_new_tokens=max_new_tokens, text_of=text_of)

    def _roles(self, records: DriverRecords) -> Roles:
        config = self._config
        schedule = StepSchedule(
            self._inputs.data.train,
            config.run.seed,
            config.trainer.sequences_per_step,
            config.objective.on_policy_fraction,
            config.objective.mixing,
        )
        return Roles(
            prompts=schedule,
            rollouts=self._rollouts() if config.needs_rollout_pool else None,
            teachers=self.teachers if config.needs_teacher else None,
            trainer=self._trainer,
            evaluator=self.evaluator if self._inputs.data.held_out else None,
            records=records,
            reference_parts=self._parts,
        )

    def _rollouts(self) -> ReplayedRollouts:
        kept = SampledTokens(self._record.path.parent, self._config)
        return ReplayedRollouts(self.rollouts, kept, self._parts)

    def _parts(self, known: Samples) -> list[Sampled]:
        """Known tokens for each trainer rank; without a teacher they are wrapped as the trainer expects them.

        Rows whose answers a teacher actor keeps go to that actor.
        """
        workers, needs_teacher = self._config.trainer.num_workers, self._config.needs_teacher
        homes = self.teachers.homes(known.row_ids) if needs_teacher else [None] * len(known)
        rows_of: dict[tuple[int, int | None], list[int]] = {}
        for row, (index, home) in enumerate(zip(known.indices, homes, strict=True)):
            rows_of.setdefault((rank_of(index, workers), home), []).append(row)
        parts = []
        for (rank, home), rows in rows_of.items():
            samples = known.take(rows)
            handle = samples if needs_teacher else ray.put(Scored(samples=samples, target=None))
            parts.append(Sampled(rank=rank, num_tokens=samples.completions.num_tokens, samples=handle, home=home))
        return parts

    def _record_engines(self) -> None:
        rows = []
        if self._config.needs_rollout_pool:
            rows += [{"role": f"rollout-{i}", "class": name} for i, name in enumerate(self.rollouts.engine_names)]
        if self._config.needs_teacher:
            rows += [{"role": f"teacher-{i}", "class": name} for i, name in enumerate(self.teachers.class_names)]
        self._record.table("engines", rows)
