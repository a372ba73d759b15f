"""The roles the loop knows: what each does, in the loop's words, without Ray, engines or files.

`launch` fills them with the real parts; a unit test fills them with simple ones. An opaque `Handle` stands for tensors
that lie elsewhere: the loop passes handles on and never opens one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Protocol

from raydistill.background import run_to_end
from raydistill.messages import (
    EvalReport,
    LoadReport,
    PromptBatch,
    Span,
    StageReport,
    StepOutcome,
)

PATIENCE_S = 30.0
"""How long trainer ranks may take to leave by themselves."""
Handle = Any
"""A reference to an object in another process (a Ray ObjectRef)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """Completions on their way to one trainer rank."""

    rank: int
    num_tokens: int
    samples: Handle
    home: int | None = None  # the teacher actor that keeps the answers to these rows; None: any


class PromptSource(Protocol):
    """Which sequences each step trains on: a pure function of (seed, step)."""

    def plan(self, step: int) -> Any:
        """A `StepPlan`: prompts for the student to answer, references used as they are."""


class Rollouts(Protocol):
    """The rollout pool."""

    def sample(self, prompts: PromptBatch, version: int) -> AsyncIterator[tuple[StageReport, list[Sampled]]]:
        """Answer prompts with policy `version`; yields each actor's parts as soon as they are there."""

    async def load(self, weights: Handle, version: int, want_codes: bool) -> list[LoadReport]:
        """Bring every engine to `version`; running samples end first."""

    async def answer_held_out(self) -> list[Handle]:
        """Greedy completions of the held-out prompts with the version held now."""


class Teachers(Protocol):
    """The teacher pool."""

    async def score(self, samples: Handle, num_tokens: int, home: int | None = None) -> tuple[StageReport, Handle]:
        """The teacher's answer for each completion token, by the actor `home` or the least loaded one."""


class Trainer(Protocol):
    """The trainer group."""

    async def offer(self, step: int, parts: list[list[Handle]]) -> None:
        """Hand over a step's scored parts, a list for each rank."""

    async def outcome(self, step: int) -> StepOutcome:
        """Wait until a step is trained."""

    def weights(self, version: int) -> Handle:
        """A version that the trainer publishes."""


class Evaluator(Protocol):
    """Held-out quality of versions, beside training."""

    async def evaluate(self, weights: Handle, version: int, answers: list[Handle]) -> EvalReport:
        """KL to the teacher, perplexity, and exact match of the answers if there are any."""

    async def show(self, weights: Handle, version: int) -> list[dict[str, str]]:
        """What a version writes for a few held-out prompts, beside the reference and the teacher."""


class Records(Protocol):
    """Where the run is written down; never blocks the loop for long."""

    def step(self, outcome: StepOutcome, metrics: dict[str, float]) -> None: ...

    def spans(self, spans: list[Span]) -> None: ...

    def sync(self, report: LoadReport) -> None: ...

    def evaluation(self, report: EvalReport) -> None: ...

    def samples(self, version: int, rows: list[dict[str, str]]) -> None: ...

    def warning(self, text: str) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """Everyone who takes part in a run; those a run does not need are None."""

    prompts: PromptSource
    rollouts: Rollouts | None
    teachers: Teachers | None
    trainer: Trainer
    evaluator: Evaluator | None
    records: Records
    reference_parts: Any  # (Samples) -> list[Sampled]: references split over ranks


@dataclass(slots=True)
class Pools:
    """Actors that outlive a run; None where no run needs them."""

    rollouts: Any = None
    teachers: Any = None
    evaluator: Any = None
    trainers: Any = None
    num_adapters: int = 1  # runs that may use the rollout pool at once, each with an adapter of its own

    def queue_depths(self) -> dict[str, int]:
        """Calls handed out and not answered, by stage."""
        pools = {"rollout": self.rollouts, "teacher": self.teachers}
        return {stage: pool.queue_depth for stage, pool in pools.items() if pool is not None}

    async def end(self, run: str) -> None:
        """Let go of what the actors keep for a run; they stay for the next."""
        for pool in (self.rollouts, self.teachers, self.evaluator, self.trainers):
            if pool is not None:
                await pool.end(run)

    def shutdown(self) -> None:
        """`close`, for callers that do not await it."""
        run_to_end(self.close)

    async def close(self, patience_s: float = PATIENCE_S) -> None:
        """End every actor. patience_s: how long trainer ranks may take to leave by themselves."""
        for pool in (self.rollouts, self.teachers, self.evaluator):
            if pool is not None:
                await pool.close()
        if self.trainers is not None:
            await self.trainers.close(patience_s)
