"""The evaluation actor as runs see it; replaced and armed again if it dies."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray.exceptions import ObjectLostError

from raydistill.actors.evaluator import EvaluatorActor
from raydistill.actors.give_up import needs_of
from raydistill.actors.pool import ActorPool, PoolOfRuns
from raydistill.actors.starting import START_TIMEOUT_S, actor_options, start_actor, torch_environment
from raydistill.config import EvaluationSection, ObjectiveSection
from raydistill.messages import EvalReport, Exported, Samples, TokenRows
from raydistill.models import StudentSpec
from raydistill.recovery.storage import Storage
from raydistill.roles import Handle


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownRows:
    """A few held-out rows whose answers people look at."""

    rows: list[dict[str, str]]  # of each: row_id, prompt, reference, teacher
    prompts: TokenRows
    eos_ids: tuple[int, ...]
    max_new_tokens: int
    text_of: Callable[[Iterable[int]], str]  # the driver's tokenizer


ScoreHeldOut = Callable[[], Awaitable[list[Handle]]]
"""Asks the teachers for their answers on the held-out references."""


class EvaluatorPool(PoolOfRuns):
    """One evaluation actor that several runs can share."""

    def __init__(self, section: EvaluationSection, timeout_s: float, by_role: bool = False) -> None:
        # Held-out rows are scored where the teachers are: no node type of its own for one small actor.
        self._options = actor_options("teacher", section, torch_environment(section), by_role)
        self._pool: ActorPool[Any] = ActorPool(
            "evaluator", 1, self._create, self._revive, timeout_s, needs_of(self._options)
        )
        self._runs: dict[str, RunEvaluator] = {}

    def _create(self, index: int) -> Any:
        return start_actor(EvaluatorActor, self._options, f"evaluator-{index}")

    async def _revive(self, actor: Any, index: int) -> None:
        for run in list(self._runs.values()):
            await asyncio.wait_for(actor.start.remote(run.name, run.spec, run.objective), START_TIMEOUT_S)
            try:
                await asyncio.wait_for(actor.hold_out.remote(run.name, *run.scored), START_TIMEOUT_S)
            except ObjectLostError:  # the node of the teacher that made them is gone too
                run.scored = await run.score()
                await asyncio.wait_for(actor.hold_out.remote(run.name, *run.scored), START_TIMEOUT_S)

    async def begin(
        self,
        name: str,
        spec: StudentSpec,
        objective: ObjectiveSection,
        references: Samples | None,
        score: ScoreHeldOut,
        shown: ShownRows | None = None,
    ) -> RunEvaluator:
        """Build the student and keep the teacher's answers on the held-out references, which `score` asks for."""
        self._pool.begin_run(is_alone=not self._runs)
        scored = await score()
        run = self._runs[name] = RunEvaluator(
            name=name,
            pool=self._pool,
            spec=spec,
            objective=objective,
            references=references,
            score=score,
            scored=scored,
            shown=shown,
        )
        await self._pool.call(0, "start", name, spec, objective, timeout_s=START_TIMEOUT_S)
        await self._pool.call(0, "hold_out", name, *scored)
        return run

    async def end(self, name: str) -> None:
        """Let go of what the actor keeps for a run."""
        if self._runs.pop(name, None) is not None:
            await self._pool.tell("end", name)


@dataclass(kw_only=True)
class RunEvaluator:
    """One run's view of the evaluation actor: the role `Evaluator`."""

    name: str
    pool: ActorPool[Any] = field(repr=False)
    spec: StudentSpec
    objective: ObjectiveSection
    references: Samples | None
    score: ScoreHeldOut
    scored: list[Handle]
    shown: ShownRows | None
    # One version after another: the answers and the weights of a version belong together.
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def evaluate(self, weights: Handle, version: int, answers: list[Handle]) -> EvalReport:
        """See `Evaluator.evaluate`. Versions are evaluated one after another."""
        async with self.lock:
            report: EvalReport = await self.pool.call(0, "evaluate", self.name, weights, self.references, *answers)
        assert report.version == version, f"evaluated {report.version}, wanted {version}"
        return report

    async def show(self, weights: Handle, version: int) -> list[dict[str, str]]:
        """See `Evaluator.show`."""
        shown = self.shown
        if shown is None:
            return []
        answers = await self.pool.call(
            0, "answer", self.name, weights, shown.prompts, shown.eos_ids, shown.max_new_tokens
        )
        return [row | {"student": shown.text_of(ids)} for row, ids in zip(shown.rows, answers, strict=True)]

    async def export_checkpoint(
        self, checkpoint: Path, folder: Path, extra: dict[str, Any], storage: Storage | None = None
    ) -> Exported:
        """See `EvaluatorActor.export_checkpoint`."""
        exported: Exported = await self.pool.call(
            0, "export_checkpoint", self.name, checkpoint, folder, extra, storage, timeout_s=START_TIMEOUT_S
        )
        return exported
