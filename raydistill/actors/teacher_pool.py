"""The teacher pool: M teacher actors that several runs can share; what they answer depends on the request alone."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

from raydistill.actors.give_up import needs_of
from raydistill.actors.pool import ActorPool, PoolOfRuns
from raydistill.actors.starting import START_TIMEOUT_S, actor_options, start_actor, torch_environment
from raydistill.actors.teacher import TeacherActor, TeacherRequest
from raydistill.config import ObjectiveSection, TeacherSection
from raydistill.messages import StageReport, TokenRows
from raydistill.roles import Handle


class TeacherPool(PoolOfRuns):
    """M teacher actors; a piece of work goes to the actor with the fewest tokens outstanding, or to the one at home."""

    def __init__(self, section: TeacherSection, timeout_s: float, by_role: bool = False) -> None:
        self._section = section
        self._options = actor_options("teacher", section, torch_environment(section), by_role)
        self._pool: ActorPool[Any] = ActorPool(
            "teacher", section.num_actors, self._create, self._revive, timeout_s, needs_of(self._options)
        )
        self._runs: set[str] = set()
        self._held: TeacherSection | None = None  # what the actors were told to load

    def _create(self, index: int) -> Any:
        return start_actor(TeacherActor, self._options, f"teacher-{index}")

    async def _revive(self, actor: Any, index: int) -> None:
        if self._held is not None:
            await asyncio.wait_for(actor.start.remote(self._held), START_TIMEOUT_S)

    async def begin(
        self, name: str, section: TeacherSection, objective: ObjectiveSection, vocab_size: int
    ) -> RunTeachers:
        """Arm the pool for one run: load the teacher on every actor (those that hold it already keep it)."""
        self._pool.begin_run(is_alone=not self._runs)
        self._runs.add(name)
        self._held = section
        class_names = await self._pool.broadcast("start", section, timeout_s=START_TIMEOUT_S)
        request = TeacherRequest.of(objective, vocab_size)
        return RunTeachers(pool=self._pool, request=request, class_names=class_names, keeps=section.cache_gib > 0)

    async def end(self, name: str) -> None:
        """A run is over; answers that are kept stay for the next."""
        self._runs.discard(name)

    async def counts(self) -> dict[str, int]:
        """Rows that the teachers computed and rows that were answered from those kept, since the actors started."""
        counts = await self._pool.broadcast("counts")
        return {name: sum(count[name] for count in counts) for name in ("computed_rows", "kept_rows")}


@dataclass(kw_only=True)
class RunTeachers:
    """One run's view of the pool: the role `Teachers`."""

    pool: ActorPool[Any] = field(repr=False)
    request: TeacherRequest
    class_names: list[str]
    keeps: bool  # answers to rows of the data set are kept by the actor that gave them

    async def score(self, samples: Handle, num_tokens: int, home: int | None = None) -> tuple[StageReport, Handle]:
        """See `Teachers.score`."""
        report, scored = await self.pool.work(num_tokens, 1, "score", samples, self.request, index=home)
        return report, scored

    async def answer(self, prompts: TokenRows, eos_ids: Sequence[int], max_new_tokens: int) -> list[list[int]]:
        """Greedy completions of a few prompts."""
        ids: list[list[int]] = await self.pool.call(0, "answer", prompts, eos_ids, max_new_tokens)
        return ids

    def homes(self, row_ids: Sequence[str]) -> list[int | None]:
        """The actor that keeps the answer to each row of the data set; None where none keeps any."""
        return [crc32(row_id.encode()) % len(self.pool) if self.keeps else None for row_id in row_ids]
