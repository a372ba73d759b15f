"""A pool of equal actors: spreads work, limits its time, replaces actors that die, re-issues what they held.

The one place that retries. Work is a method call whose first result is a small report and whose other results stay
references. A replacement is brought up by the `revive` coroutine of the owner (start, newest weights) before it gets
work.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError

from raydistill.actors.give_up import hangs_every_time, no_place
from raydistill.actors.starting import START_TIMEOUT_S
from raydistill.errors import LostError, RunError, UserError

log = logging.getLogger(__name__)
Actor = TypeVar("Actor")
MAX_REPLACEMENTS = 20  # of one pool; a pool that needs more has a cause that restarting does not cure
MAX_HANGS = 3  # of one call, each with a fresh actor; one that meets more takes longer than its limit, or always hangs
TELL_TIMEOUT_S = 10.0
DEATHS = (RayActorError, GetTimeoutError, TimeoutError)


@dataclass(eq=False, slots=True)
class _Member:
    """One actor, and what its pool knows about its health."""

    actor: Any
    started: Future[Any]  # done when its process runs (or died); until then it waits for a place on the cluster
    answered_s: float = 0.0  # when it last answered anything
    limits_s: list[float] = field(default_factory=list)  # of the calls that it has not answered


class ActorPool(Generic[Actor]):
    """`size` actors made by `create(index)`; `revive(actor, index)` arms a fresh replacement."""

    def __init__(
        self,
        role: str,
        size: int,
        create: Callable[[int], Any],
        revive: Callable[[Any, int], Awaitable[None]],
        timeout_s: float,
        needs: Mapping[str, float] | None = None,
    ) -> None:
        """needs: what Ray books for one actor, by resource."""
        self._role, self._create, self._revive, self._timeout_s = role, create, revive, timeout_s
        self._needs = needs or {}
        self._members = [self._new_member(index) for index in range(size)]
        self._load = [0] * size  # tokens handed out and not answered yet
        self.queue_depth = 0  # calls with tokens handed out and not answered yet
        self._locks = [asyncio.Lock() for _ in range(size)]
        self._replacements = 0
        self._is_shut_down = False

    def _new_member(self, index: int) -> _Member:
        actor = self._create(index)
        return _Member(actor=actor, started=actor.__ray_ready__.remote().future())

    def begin_run(self, is_alone: bool = True) -> None:
        """A run begins; if it `is_alone`, usually in an event loop of its own: locks belong to a loop. Replacements are
        counted anew: a pool that many runs share may lose actors to each of them."""
        if is_alone:
            self._locks = [asyncio.Lock() for _ in self._members]
        self._replacements = 0

    def __len__(self) -> int:
        return len(self._members)

    def name(self, index: int) -> str:
        return f"{self._role}-{index}"

    async def broadcast(self, method: str, *args: Any, timeout_s: float | None = None) -> list[Any]:
        """Call a method on every actor; small results, in order."""
        calls = (self.call(index, method, *args, timeout_s=timeout_s) for index in range(len(self)))
        return list(await asyncio.gather(*calls))

    async def call(self, index: int, method: str, *args: Any, timeout_s: float | None = None) -> Any:
        """Call one actor for a small result; a dead or hanging actor is replaced and asked again.

        timeout_s: another limit than the pool's, for a call that reads a model from the disk.
        """
        hangs = 0
        while True:
            member = self._members[index]
            try:
                return await self._within(member, getattr(member.actor, method).remote(*args), timeout_s)
            except DEATHS as error:
                hangs = self._count_hangs(hangs, error, index, member, method, timeout_s)
                await self._replace(index, member, error)

    async def tell(self, method: str, *args: Any) -> None:
        """Call a method on every actor, if it is alive; nobody waits for more than a moment, and a death is no matter."""
        calls = [getattr(actor, method).remote(*args) for actor in self.actors()]
        waiting = [asyncio.wait_for(asyncio.wrap_future(call.future()), TELL_TIMEOUT_S) for call in calls]
        await asyncio.gather(*waiting, return_exceptions=True)

    async def work(self, weight: int, num_objects: int, method: str, *args: Any, index: int | None = None) -> list[Any]:
        """Give work to the least loaded actor (or to `index`); returns [report, reference, ...].

        `weight` is the work's size in tokens. The method must return 1 + num_objects values.
        """
        hangs = 0
        while True:
            chosen = self._load.index(min(self._load)) if index is None else index
            member = self._members[chosen]
            self._load[chosen] += weight
            self.queue_depth += 1
            try:
                refs = getattr(member.actor, method).options(num_returns=1 + num_objects).remote(*args)
                report = await self._within(member, refs[0])
                return [report, *refs[1:]]
            except DEATHS as error:
                hangs = self._count_hangs(hangs, error, chosen, member, method)
                await self._replace(chosen, member, error)
            finally:
                self._load[chosen] -= weight
                self.queue_depth -= 1

    async def _within(self, member: _Member, ref: Any, timeout_s: float | None = None) -> Any:
        """The answer within the time limit; see `_deaths_of`.

        An actor does one call after another, so the time runs from its last answer, and as long as the most patient of the
        calls before this one may take.
        """
        limit, submitted = timeout_s or self._timeout_s, time.monotonic()
        patience = max([limit, *member.limits_s])
        answer = asyncio.wrap_future(ref.future())
        member.limits_s.append(limit)
        try:
            with self._deaths_of(member.actor):
                while True:
                    since = max(submitted, member.answered_s)
                    left = since + patience - time.monotonic()
                    done, _ = await asyncio.wait({answer}, timeout=max(left, 0.0))
                    if done:
                        member.answered_s = time.monotonic()
                        return answer.result()
                    # Late only if looked at after the limit once more: this process itself may have stood still.
                    if left <= 0 and since >= member.answered_s:
                        raise TimeoutError(f"no answer for {patience:g} s")
        finally:
            answer.cancel()
            member.limits_s.remove(limit)

    @contextmanager
    def _deaths_of(self, actor: Any) -> Iterator[None]:
        """LostError where an argument is gone, because whoever was to make or keep it died: another actor lacks it too.

        What the actor itself says in one line is raised as that line, without Ray's traceback in its text.
        """
        try:
            yield
        except ObjectLostError as error:  # it lay on a node that died
            raise LostError(f"tensors for {self._role} actors were lost with their node") from error
        except RayActorError as error:
            # An argument that a dead actor was to return raises that actor's death here: ours is alive.
            if error.actor_id is not None and error.actor_id != actor._actor_id.hex():
                raise LostError(f"tensors for {self._role} actors were lost with the actor that made them") from error
            raise
        except RayTaskError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, (RunError, UserError)):
                raise cause from error
            raise

    def _count_hangs(
        self,
        hangs: int,
        error: BaseException,
        index: int,
        member: _Member,
        method: str,
        timeout_s: float | None = None,
    ) -> int:
        """How often one call hung, now that it ended with `error` too. RunError where another actor would not mend it."""
        if isinstance(error, RayActorError):
            return hangs
        name = self.name(index)
        if not member.started.done() and (without_place := no_place(self._role, name, self._needs)) is not None:
            raise without_place from error
        if hangs + 1 < MAX_HANGS:
            return hangs + 1
        ray.kill(member.actor, no_restart=True)  # whoever uses the pool next need not wait behind this call
        limit_s, is_of_pool = timeout_s or self._timeout_s, timeout_s is None
        raise hangs_every_time(self._role, name, method, limit_s, is_of_pool, MAX_HANGS) from error

    async def _replace(self, index: int, dead: _Member, error: BaseException) -> None:
        async with self._locks[index]:
            hangs = 0
            while self._members[index] is dead:  # else another waiting call replaced it already
                fresh = self._next_after(index, error)
                try:
                    with self._deaths_of(fresh.actor):
                        await self._revive(fresh.actor, index)
                except DEATHS as again:  # the replacement died too
                    error = again
                    try:
                        hangs = self._count_hangs(hangs, again, index, fresh, "start", START_TIMEOUT_S)
                    finally:
                        ray.kill(fresh.actor, no_restart=True)
                else:
                    self._members[index] = fresh

    def _next_after(self, index: int, error: BaseException) -> _Member:
        """A fresh actor in place of the one that ended with `error`, as long as the pool may have one."""
        if self._is_shut_down:
            raise RunError(f"{self.name(index)} was shut down while it worked") from error
        self._replacements += 1
        reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        if self._replacements > MAX_REPLACEMENTS:
            raise RunError(f"{self.name(index)} died again after {MAX_REPLACEMENTS} replacements: {reason}") from error
        log.warning("%s is replaced: %s", self.name(index), reason)
        ray.kill(self._members[index].actor, no_restart=True)
        return self._new_member(index)

    def actors(self) -> list[Any]:
        return [member.actor for member in self._members]

    def shutdown(self) -> None:
        """End every actor."""
        self._is_shut_down = True
        for actor in self.actors():
            ray.kill(actor, no_restart=True)


class PoolOfRuns:
    """What the pools of all roles have in common: actors that several runs share."""

    _pool: ActorPool[Any]

    @property
    def queue_depth(self) -> int:
        """Calls handed out and not answered."""
        return self._pool.queue_depth

    async def close(self) -> None:
        """End every actor."""
        self._pool.shutdown()
