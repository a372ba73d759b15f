"""A pool of equal actors: spreads work, limits its time, replaces actors that die, re-issues what they held.

The one place that retries. Work is a method call whose first result is a small report and whose other results stay
references. A replacement is brought up by the `revive` coroutine of the owner (start, newest weights) before it gets
work.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError

from raydistill.errors import LostError, RunError, UserError

log = logging.getLogger(__name__)
Actor = TypeVar("Actor")
MAX_REPLACEMENTS = 20  # of one pool; a pool that needs more has a cause that restarting does not cure
TELL_TIMEOUT_S = 10.0
DEATHS = (RayActorError, GetTimeoutError, TimeoutError)


class ActorPool(Generic[Actor]):
    """`size` actors made by `create(index)`; `revive(actor, index)` arms a fresh replacement."""

    def __init__(
        self,
        role: str,
        size: int,
        create: Callable[[int], Any],
        revive: Callable[[Any, int], Awaitable[None]],
        timeout_s: float,
    ) -> None:
        self._role, self._create, self._revive, self._timeout_s = role, create, revive, timeout_s
        self._actors = [create(index) for index in range(size)]
        self._load = [0] * size  # tokens handed out and not answered yet
        self.queue_depth = 0  # calls with tokens handed out and not answered yet
        self._locks = [asyncio.Lock() for _ in range(size)]
        self._replacements = 0
        self._is_shut_down = False

    def begin_run(self, is_alone: bool = True) -> None:
        """A run begins; if it `is_alone`, usually in an event loop of its own: locks belong to a loop. Replacements are
        counted anew: a pool that many runs share may lose actors to each of them."""
        if is_alone:
            self._locks = [asyncio.Lock() for _ in self._actors]
        self._replacements = 0

    def __len__(self) -> int:
        return len(self._actors)

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
        while True:
            actor = self._actors[index]
            try:
                return await self._within(actor, getattr(actor, method).remote(*args), timeout_s)
            except DEATHS as error:
                await self._replace(index, actor, error)

    async def tell(self, method: str, *args: Any) -> None:
        """Call a method on every actor, if it is alive; nobody waits for more than a moment, and a death is no matter."""
        calls = [getattr(actor, method).remote(*args) for actor in self._actors]
        waiting = [asyncio.wait_for(asyncio.wrap_future(call.future()), TELL_TIMEOUT_S) for call in calls]
        await asyncio.gather(*waiting, return_exceptions=True)

    async def work(self, weight: int, num_objects: int, method: str, *args: Any, index: int | None = None) -> list[Any]:
        """Give work to the least loaded actor (or to `index`); returns [report, reference, ...].

        `weight` is the work's size in tokens. The method must return 1 + num_objects values.
        """
        while True:
            chosen = self._load.index(min(self._load)) if index is None else index
            actor = self._actors[chosen]
            self._load[chosen] += weight
            self.queue_depth += 1
            try:
                refs = getattr(actor, method).options(num_returns=1 + num_objects).remote(*args)
                report = await self._within(actor, refs[0])
                return [report, *refs[1:]]
            except DEATHS as error:
                await self._replace(chosen, actor, error)
            finally:
                self._load[chosen] -= weight
                self.queue_depth -= 1

    async def _within(self, actor: Any, ref: Any, timeout_s: float | None = None) -> Any:
        """The answer within the time limit; see `_deaths_of`."""
        with self._deaths_of(actor):
            return await asyncio.wait_for(asyncio.wrap_future(ref.future()), timeout_s or self._timeout_s)

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

    async def _replace(self, index: int, dead: Any, error: BaseException) -> None:
        async with self._locks[index]:
            while self._actors[index] is dead:  # else another waiting call replaced it already
                actor = self._next_after(index, error)
                try:
                    with self._deaths_of(actor):
                        await self._revive(actor, index)
                except DEATHS as again:  # the replacement died too
                    error = again
                    ray.kill(actor, no_restart=True)
                else:
                    self._actors[index] = actor

    def _next_after(self, index: int, error: BaseException) -> Any:
        """A fresh actor in place of the one that ended with `error`, as long as the pool may have one."""
        if self._is_shut_down:
            raise RunError(f"{self.name(index)} was shut down while it worked") from error
        self._replacements += 1
        reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        if self._replacements > MAX_REPLACEMENTS:
            raise RunError(f"{self.name(index)} died again after {MAX_REPLACEMENTS} replacements: {reason}") from error
        log.warning("%s is replaced: %s", self.name(index), reason)
        ray.kill(self._actors[index], no_restart=True)
        return self._create(index)

    def actors(self) -> list[Any]:
        return list(self._actors)

    def shutdown(self) -> None:
        """End every actor."""
        self._is_shut_down = True
        for actor in self._actors:
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
