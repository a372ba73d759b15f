"""Driver side of the trainer: a crew of ranks with one job, the feed in between.

One group is one attempt. When a rank, the feed or Ray Train's controller dies or hangs, `LostError` says that a
new attempt from the last checkpoint may succeed; any other error would come again.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError, RayError

from raydistill.config import Config
from raydistill.errors import LostError, RunError, RunStopped
from raydistill.messages import StepOutcome, TokenRows
from raydistill.trainer.crew import GIVE_UP_S, TrainerCrew, last_line
from raydistill.trainer.job import TrainerJob

START_TIMEOUT_S = 1800.0  # imports and a large model from a cold disk
BEFORE_THE_FIRST = -1  # the "step" whose outcome is the version that training starts from


class TrainerGroup:
    """Start with `start`; then `offer` steps, wait for `outcome`s, pass on `weights` references, `finish`."""

    def __init__(
        self,
        config: Config,
        crew: TrainerCrew,
        probes: TokenRows,
        run_folder: Path,
        resume_from: Path | None,
    ) -> None:
        self._config, self._crew, self._feed = config, crew, crew.feed
        self._job = TrainerJob(
            config=config, probes=probes, feed=crew.feed, run_folder=run_folder, resume_from=resume_from
        )
        self._offered: dict[int, float] = {}  # when the ranks got a step's parts
        self.is_done = False  # every rank has left the job in good order

    async def start(self) -> StepOutcome:
        """Hand the job to the crew; returns when the first version is published."""
        try:
            await asyncio.wait_for(self._crew.start(self._job), START_TIMEOUT_S)
        except (RayActorError, TimeoutError) as error:
            raise LostError(f"the trainer's feed did not start: {last_line(error)}") from error
        self._crew.keep(*await self._within(self._feed.started.remote(), START_TIMEOUT_S))
        return await self.outcome(BEFORE_THE_FIRST)

    async def offer(self, step: int, parts: list[list[Any]]) -> None:
        """Hand a step's references to the ranks."""
        await self._within(self._feed.offer.remote(step, parts))
        self._offered[step] = time.monotonic()

    async def outcome(self, step: int) -> StepOutcome:
        """Wait until a step is trained (-1: until the first version is published). RunStopped after `stop`."""
        try:
            outcome: StepOutcome | None
            if step == BEFORE_THE_FIRST:
                outcome = await self._within(self._feed.outcome.remote(step), START_TIMEOUT_S)
            else:
                outcome = await self._trained(step, self._feed.outcome.remote(step))
        except RunError as error:
            raise await self._cause(error, f"step {step}: " if step >= 0 else "") from error
        if outcome is None:
            raise RunStopped(step)
        return outcome

    def weights(self, version: int) -> Any:
        """A reference to a published version; the driver never fetches it."""
        return self._feed.weights.remote(version)

    async def stop(self) -> None:
        """Ask the ranks to checkpoint and leave before the next step that none has begun."""
        await self._within(self._feed.stop.remote())

    async def finish(self) -> None:
        """Wait until every rank is done."""
        limit = self._config.trainer.timeout_s
        try:
            self.is_done = await asyncio.wait_for(self._crew.wait_done(), limit)
        except TimeoutError:
            raise LostError(f"the trainer group did not end within trainer.timeout_s={limit:g}") from None
        if not self.is_done:
            failure = self._crew.failure or LostError("its feed was lost")
            raise await self._cause(failure, "the trainer group failed: ") from failure

    async def _trained(self, step: int, ref: Any) -> Any:
        """The answer; its time runs while the ranks have the step's parts: actors that make them have limits of their own."""
        limit, start = self._config.trainer.timeout_s, time.monotonic()
        answer = asyncio.ensure_future(self._answer(ref))
        try:
            while True:
                since = self._offered.get(step)
                left = limit if since is None else max(since, start) + limit - time.monotonic()
                done, _ = await asyncio.wait({answer}, timeout=max(left, 0.0))
                if done:
                    return answer.result()
                if since is not None:
                    raise _silent(limit)
        finally:
            answer.cancel()
            self._offered.pop(step, None)

    async def _within(self, ref: Any, timeout_s: float | None = None) -> Any:
        limit = timeout_s or self._config.trainer.timeout_s
        try:
            return await asyncio.wait_for(self._answer(ref), limit)
        except TimeoutError as error:
            raise _silent(limit) from error

    async def _answer(self, ref: Any) -> Any:
        try:
            return await asyncio.wrap_future(ref.future())
        except RayActorError as error:
            raise LostError(f"the trainer's feed died: {last_line(error)}") from error
        except RayError as error:
            raise RunError(last_line(error)) from error

    async def _cause(self, error: BaseException, where: str) -> RunError:
        """Why the group failed: an error that a rank met would come again, a death is worth another attempt."""
        fatal: str | None = None
        with suppress(RayError, TimeoutError):
            fatal = await asyncio.wait_for(asyncio.wrap_future(self._feed.fatal.remote().future()), GIVE_UP_S)
        if fatal is not None:
            return RunError(f"{where}{fatal}")
        return LostError(f"{where}{last_line(self._crew.failure or error)}")


def _silent(limit_s: float) -> LostError:
    return LostError(f"the trainer did not answer within {limit_s:g} s (trainer.timeout_s)")
