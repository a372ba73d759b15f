"""The driver's side of the trainer group: when it counts as lost."""

import asyncio
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raydistill.config import Config
from raydistill.errors import LostError
from raydistill.messages import TokenRows
from raydistill.trainer.group import TrainerGroup

TIMEOUT_S = 0.3


class Feed:
    """Takes every offer; its outcomes never come unless `outcomes` has them."""

    def __init__(self) -> None:
        self.outcomes: dict[int, Any] = {}
        self.offer = SimpleNamespace(remote=lambda step, parts: self.ref(None))
        self.outcome = SimpleNamespace(remote=self._outcome)
        self.fatal = SimpleNamespace(remote=lambda: self.ref(None))
        self.started = SimpleNamespace(remote=lambda: self.ref((["trainer-0"], "booking")))

    def ref(self, value: Any) -> Any:
        answer: Future[Any] = Future()
        answer.set_result(value)
        return SimpleNamespace(future=lambda: answer)

    def _outcome(self, step: int) -> Any:
        return self.ref(self.outcomes[step]) if step in self.outcomes else SimpleNamespace(future=Future)


def group(feed: Feed) -> TrainerGroup:
    config = Config.model_validate({"trainer": {"timeout_s": TIMEOUT_S}})
    crew: Any = SimpleNamespace(feed=feed, failure=None)
    return TrainerGroup(config, crew, TokenRows.from_rows([]), Path("run"), None)


def test_a_trainers_time_runs_from_the_offer_of_a_step() -> None:
    async def whole() -> None:
        trainer = group(Feed())
        waiting = asyncio.ensure_future(trainer.outcome(0))
        await asyncio.sleep(3 * TIMEOUT_S)  # a rollout actor is being replaced
        assert not waiting.done()
        start = asyncio.get_running_loop().time()
        await trainer.offer(0, [[]])
        with pytest.raises(LostError, match="did not answer within"):
            await asyncio.wait_for(waiting, 10)
        assert asyncio.get_running_loop().time() - start >= TIMEOUT_S

    asyncio.run(whole())


def test_a_step_that_was_offered_early_has_its_time_from_when_it_is_waited_for() -> None:
    """With sync.max_staleness = 1 a step lies ready while the one before it is trained."""

    async def whole() -> None:
        feed = Feed()
        trainer = group(feed)
        await trainer.offer(1, [[]])
        await asyncio.sleep(2 * TIMEOUT_S)
        feed.outcomes[1] = "trained"
        assert await trainer.outcome(1) == "trained"

    asyncio.run(whole())


def test_the_crew_knows_whom_to_end_before_the_first_version_is_there() -> None:
    async def whole() -> None:
        trainer, kept = group(Feed()), list[Any]()
        crew: Any = trainer._crew
        crew.start, crew.keep = lambda job: asyncio.sleep(0), lambda *known: kept.extend(known)
        waiting = asyncio.ensure_future(trainer.start())
        while not kept:
            await asyncio.sleep(0.01)
        assert kept == [["trainer-0"], "booking"]
        assert not waiting.done()
        waiting.cancel()

    asyncio.run(asyncio.wait_for(whole(), 10))
