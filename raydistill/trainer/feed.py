"""The feed: a small actor between the driver and a crew's ranks, for one job after another.

A job: the driver assigns it, every rank takes it, and says when it is done with it. Within a job, down: the driver offers
each step's parts, one list of object references per rank; a rank leases its list and fetches the objects straight from
where they lie. Up: rank 0 reports each step's outcome and publishes weight versions; the driver gets the outcome, and for
weights a reference only. All calls are time-limited by their callers; `close` wakes everyone who waits. Offering or
reporting the same step twice is harmless: steps are idempotent by their id.
"""

from __future__ import annotations

import asyncio
from typing import Any

from raydistill.errors import RunError
from raydistill.messages import StepOutcome, StudentWeights
from raydistill.processes import Member, this_process

KEEP_VERSIONS = 3  # enough for sync.max_staleness = 1; a trainer that may run further ahead needs more


class Feed:
    """An asyncio actor: waiting calls do not block one another. Jobs are numbered from 0."""

    def __init__(self, num_ranks: int = 1) -> None:
        self._num_ranks = num_ranks
        self._changed = asyncio.Condition()
        self._members: list[Member] = []
        self._booking: Any = None
        self._closed: str | None = None
        self._begin(-1, None, KEEP_VERSIONS)

    def _begin(self, number: int, job: Any, keep_versions: int) -> None:
        self._number, self._job, self._keep_versions = number, job, keep_versions
        self._parts: dict[tuple[int, int], list[Any]] = {}
        self._outcomes: dict[int, StepOutcome] = {}
        self._weights: dict[int, StudentWeights] = {}
        self._fatal: str | None = None
        self._granted = -1  # the newest step that any rank trains on
        self._stop_at: int | None = None
        self._done: set[int] = set()

    async def process(self) -> Member:
        """Driver: which process this one is."""
        return this_process("feed")

    async def join(self, member: Member) -> None:
        """Rank, and Ray Train's controller: which process it is."""
        async with self._changed:
            self._members.append(member)
            self._changed.notify_all()

    async def book(self, placement_group: Any) -> None:
        """Ray Train's controller: what the ranks run in. It outlives a controller that is killed."""
        self._booking = placement_group

    async def started(self) -> tuple[list[Member], Any | None]:
        """Driver: wait until every rank has joined, or the feed is closed; who has joined, and what they have booked."""
        async with self._changed:
            # The controller is one more.
            await self._changed.wait_for(lambda: len(self._members) > self._num_ranks or self._closed is not None)
            return self._members, self._booking

    async def assign(self, number: int, job: Any, keep_versions: int = KEEP_VERSIONS) -> None:
        """Driver: the next job; everything of the one before is forgotten."""
        async with self._changed:
            self._begin(number, job, keep_versions)
            self._changed.notify_all()

    async def next_job(self, number: int) -> Any | None:
        """Rank: wait for a job; None: there are no more."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._number == number or self._closed is not None)
            return self._job if self._closed is None else None

    async def done(self, number: int, rank: int) -> None:
        """Rank: this job is over for it."""
        async with self._changed:
            assert number == self._number, f"rank {rank} is done with job {number}, job {self._number} is at work"
            self._done.add(rank)
            self._changed.notify_all()

    async def wait_done(self) -> bool:
        """Driver: wait until every rank is done with the job; False if the feed was closed before."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._done) == self._num_ranks or self._closed is not None)
            return len(self._done) == self._num_ranks

    async def offer(self, step: int, parts: list[list[Any]]) -> None:
        """Driver: the references of one step, for each rank."""
        async with self._changed:
            for rank, refs in enumerate(parts):
                self._parts[step, rank] = refs
            self._changed.notify_all()

    async def lease(self, step: int, rank: int) -> list[Any] | None:
        """Rank: wait for this rank's references of one step; earlier steps are let go. None: stop before this step."""
        parts: list[Any] | None = await self._wait(self._parts, (step, rank), step)
        if parts is None:
            return None
        self._granted = max(self._granted, step)
        for key in [k for k in self._parts if k[1] == rank and k[0] < step]:
            del self._parts[key]
        return parts

    async def fail(self, message: str) -> None:
        """Rank: an error that another attempt would meet again. Once the feed is closed, that is what ranks meet."""
        if self._closed is None:
            self._fatal = self._fatal or message

    async def fatal(self) -> str | None:
        """Driver: what `fail` was told first."""
        return self._fatal

    async def report(self, outcome: StepOutcome) -> None:
        """Rank 0: one optimizer step is done."""
        async with self._changed:
            self._outcomes[outcome.step] = outcome
            self._changed.notify_all()

    async def outcome(self, step: int) -> StepOutcome | None:
        """Driver: wait for a step's outcome; None if the run stops before it."""
        outcome: StepOutcome | None = await self._wait(self._outcomes, step, step)
        for old in [s for s in self._outcomes if s < step]:
            del self._outcomes[old]
        return outcome

    async def publish(self, weights: StudentWeights) -> None:
        """Rank 0: one version of the student."""
        async with self._changed:
            self._weights[weights.version] = weights
            for old in sorted(self._weights)[: -self._keep_versions]:
                del self._weights[old]
            self._changed.notify_all()

    async def weights(self, version: int) -> StudentWeights:
        """Driver (keeps the reference, never the value): one published version; RunError if it was let go."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed is not None or max(self._weights, default=-1) >= version)
            if version in self._weights:
                return self._weights[version]
            if self._closed is not None:
                raise RunError(f"the feed is closed: {self._closed}")
            raise RunError(f"version {version} is not kept; the feed holds {sorted(self._weights)}")

    async def stop(self) -> int:
        """Driver: end the run at the next step that no rank has begun; returns that step. Ranks checkpoint and leave."""
        async with self._changed:
            if self._stop_at is None:
                self._stop_at = self._granted + 1
            self._changed.notify_all()
            return self._stop_at

    async def close(self, reason: str) -> None:
        """No more jobs; wakes everyone who waits, with an error in the midst of one."""
        async with self._changed:
            self._closed = reason
            self._changed.notify_all()

    async def _wait(self, table: dict[Any, Any], key: Any, step: int) -> Any:
        def stopped() -> bool:
            return self._stop_at is not None and step >= self._stop_at

        async with self._changed:
            await self._changed.wait_for(lambda: key in table or stopped() or self._closed is not None)
            if self._closed is None and stopped():
                return None
            if key not in table:
                raise RunError(f"the feed is closed: {self._closed}")
            return table[key]
