"""The distillation loop: reads like the algorithm, knows roles only.

            plan(step): a pure function of (seed, step)
                 |
      prompts    |    references
        v        |        |
    rollouts.sample       |            one task per step, started S steps ahead of the trainer;
        |                 |            each part is scored as soon as it is sampled
        v                 v
    teachers.score ---> trainer.offer(step) ---> trainer.outcome(step) ---> records
                                                        |
    rollouts.load(version) <--- probes, hashes ---------+---> evaluator (beside training, before the next load)

With S = 0 everything is serial: step n is sampled by the weights that n steps made. With S = 1 the rollouts and the
teacher work on step n + 1 while the trainer works on n.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict
from dataclasses import dataclass, field

from raydistill.config import Config
from raydistill.errors import PolicyGapError, RunError, StaleWeightsError
from raydistill.health import health_warning
from raydistill.messages import EvalReport, LoadReport, StageReport, StepOutcome, reduce_metrics
from raydistill.roles import Handle, Roles, Sampled

INITIAL = -1  # the "step" whose outcome announces version 0


@dataclass(kw_only=True)
class LoopSummary:
    """What the loop knows when it ends; small numbers only."""

    steps: int = 0
    skipped: int = 0
    largest_gap_nats: float = 0.0
    codes_hash: str | None = None  # of the last version, equal on trainer and engines
    evaluations: list[EvalReport] = field(default_factory=list)


class DistillationLoop:
    """One run's loop. `run` returns when the last step is trained and evaluated, or raises what went wrong."""

    def __init__(self, config: Config, roles: Roles, first_step: int = 0, skipped: int = 0) -> None:
        """A resumed run starts at `first_step`, with the steps that were `skipped` before it."""
        self._config, self._roles, self._first_step = config, roles, first_step
        self._version = first_step
        self._summary = LoopSummary(skipped=skipped)
        self._reports: dict[int, list[StageReport]] = defaultdict(list)
        self._history: list[dict[str, float]] = []
        self._last_warning: str | None = None
        self._last_outcome_s = time.time()

    async def run(self) -> LoopSummary:
        """Train up to step `trainer.num_steps`; raises RunStopped where somebody asked to stop before."""
        try:
            async with asyncio.TaskGroup() as tasks:
                await self._run(tasks)
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        return self._summary

    async def _run(self, tasks: asyncio.TaskGroup) -> None:
        num_steps = self._config.trainer.num_steps
        await self._sync(await self._roles.trainer.outcome(INITIAL))
        self._evaluate(tasks, self._version)
        started = self._first_step
        for step in range(self._first_step, num_steps):
            while started <= min(step + self._config.sync.max_staleness, num_steps - 1):
                tasks.create_task(self._prepare(started, self._version))
                started += 1
            outcome = await self._roles.trainer.outcome(step)
            self._record(outcome)
            await self._sync(outcome)
            self._evaluate(tasks, outcome.version)

    async def _prepare(self, step: int, version: int) -> None:
        """Sample and score one step, then hand it to the trainer."""
        plan = self._roles.prompts.plan(step)
        work = []
        if plan.references is not None:
            work += [self._score(step, part) for part in self._roles.reference_parts(plan.references)]
        scoring = [asyncio.ensure_future(coroutine) for coroutine in work]
        by_rank: list[list[Handle]] = [[] for _ in range(self._config.trainer.num_workers)]
        try:
            if plan.prompts is not None:
                assert self._roles.rollouts is not None
                async for report, parts in self._roles.rollouts.sample(plan.prompts, version):
                    self._reports[step].append(report)
                    scoring += [asyncio.ensure_future(self._score(step, part)) for part in parts]
            for rank, scored in await asyncio.gather(*scoring):
                by_rank[rank].append(scored)
        finally:
            for task in scoring:
                task.cancel()
        await self._roles.trainer.offer(step, by_rank)

    async def _score(self, step: int, part: Sampled) -> tuple[int, Handle]:
        if self._roles.teachers is None:
            return part.rank, part.samples
        report, scored = await self._roles.teachers.score(part.samples, part.num_tokens, part.home)
        self._reports[step].append(report)
        return part.rank, scored

    async def _sync(self, outcome: StepOutcome) -> None:
        """Bring the engines to the trainer's version and make sure that they compute the same function."""
        self._version = outcome.version
        if self._roles.rollouts is None or not self._config.publishes(outcome.version):
            return
        weights = self._roles.trainer.weights(outcome.version)
        reports = await self._roles.rollouts.load(weights, outcome.version, self._config.checks_codes(outcome.version))
        for report in reports:
            self._check_sync(report, outcome)
            self._roles.records.sync(report)

    def _check_sync(self, report: LoadReport, outcome: StepOutcome) -> None:
        if report.weights_hash != outcome.weights_hash:
            raise StaleWeightsError(
                f"{report.actor} holds adapter {report.weights_hash} at version {report.version}, the trainer published "
                f"{outcome.weights_hash}: the sync delivered other weights"
            )
        if report.codes_hash != outcome.codes_hash:
            raise PolicyGapError(
                f"{report.actor} rebuilt quantized codes {report.codes_hash} at version {report.version}, the trainer has "
                f"{outcome.codes_hash}: both sides must quantize the same way"
            )
        self._summary.codes_hash = report.codes_hash or self._summary.codes_hash
        if report.gap_mean_nats is None:
            return
        bound = self._config.policy_gap_bound_nats
        self._summary.largest_gap_nats = max(self._summary.largest_gap_nats, report.gap_mean_nats)
        if not report.gap_mean_nats <= bound:  # also catches NaN
            raise PolicyGapError(
                f"{report.actor} and the trainer disagree by {report.gap_mean_nats:.2e} nats per probe token at version "
                f"{report.version}, the bound is sync.max_policy_gap_nats={bound:.0e}: the engine does not compute the "
                "function that is trained. Check rollout.engine and student.dtype, or raise the bound if you know why"
            )

    def _evaluate(self, tasks: asyncio.TaskGroup, version: int) -> None:
        if self._roles.evaluator is not None and self._config.evaluates(version):
            # The reference is taken now: the trainer lets versions go that are a few steps old.
            tasks.create_task(self._evaluation(version, self._roles.trainer.weights(version)))

    async def _evaluation(self, version: int, weights: Handle) -> None:
        """The answers are asked for before the next load can be: an actor's calls run in order."""
        assert self._roles.evaluator is not None
        answers: list[Handle] = []
        if self._config.evaluation.exact_match != "off" and self._roles.rollouts is not None:
            answers = await self._roles.rollouts.answer_held_out()
        report = await self._roles.evaluator.evaluate(weights, version, answers)
        self._summary.evaluations.append(report)
        self._roles.records.evaluation(report)
        if report.stale_answers:
            self._roles.records.warning(
                f"version {version}: {report.stale_answers} held-out answers were written by other weights; its exact match is "
                "left out"
            )
        if self._config.shows(version):
            self._roles.records.samples(version, await self._roles.evaluator.show(weights, version))

    def _record(self, outcome: StepOutcome) -> None:
        self._summary.steps += 1
        reports = self._reports.pop(outcome.step, [])
        now = time.time()
        metrics = step_metrics(outcome, reports, now - self._last_outcome_s)
        self._last_outcome_s = now
        self._roles.records.step(outcome, metrics)
        self._roles.records.spans([r.span for r in reports if r.span is not None] + list(outcome.spans))
        self._history.append(metrics)
        warning = health_warning(self._history, self._config.rollout.max_new_tokens)
        if warning is not None and warning.split("%")[-1] != (self._last_warning or "").split("%")[-1]:
            self._roles.records.warning(f"step {outcome.step}: {warning}")
            self._last_warning = warning
        if outcome.skipped is not None:
            self._skip(outcome)

    def _skip(self, outcome: StepOutcome) -> None:
        self._summary.skipped += 1
        self._roles.records.warning(f"step {outcome.step} was skipped: {outcome.skipped}")
        section = self._config.trainer
        # 0.29 * 100 is 28.999...: the nudge keeps a whole product whole.
        allowed = math.floor(section.max_skipped_fraction * section.num_steps + 1e-9)
        if self._summary.skipped > allowed:
            raise RunError(
                f"{self._summary.skipped} steps were skipped, the last (step {outcome.step}) because {outcome.skipped}; "
                f"trainer.max_skipped_fraction={section.max_skipped_fraction} allows {allowed} of {section.num_steps}. "
                "Lower trainer.learning_rate, or check the teacher's precision (teacher.dtype)"
            )


def step_metrics(outcome: StepOutcome, reports: list[StageReport], wall_s: float) -> dict[str, float]:
    """One step's metrics: the trainer's, the actors', and for each stage the busy seconds and tokens per busy second.

    Seconds of rollouts and teachers are those of their actors added up, the trainer's those of rank 0: its ranks work at the
    same time, so its tokens per second are those of the whole group.
    """
    metrics = dict(outcome.metrics) | reduce_metrics([m for report in reports for m in report.metrics])
    metrics["loop/step_s"] = wall_s
    stages: dict[str, list[StageReport]] = defaultdict(list)
    for report in reports:
        if report.span is not None:
            stages[report.span.stage].append(report)
    for stage, members in stages.items():
        busy = sum(r.span.seconds for r in members if r.span is not None)
        num_actors = len({r.span.actor for r in members if r.span is not None})
        metrics[f"{stage}/busy_s"] = busy
        metrics[f"{stage}/wait_s"] = max(wall_s * num_actors - busy, 0.0)
        metrics[f"{stage}/tokens_per_s"] = sum(r.num_tokens for r in members) / busy if busy else 0.0
    if "trainer/tokens" in metrics:
        busy = metrics.get("trainer/busy_s", 0.0)
        metrics["trainer/tokens_per_s"] = metrics["trainer/tokens"] / busy if busy else 0.0
    return metrics
