"""The end of a crew: in which order its processes go, and how long that may take."""

import asyncio
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from raydistill.processes import Member
from raydistill.trainer import crew as crew_module
from raydistill.trainer.controller import CONTROLLER
from raydistill.trainer.crew import TrainerCrew

PATIENCE_S = 0.1
MEMBERS = [Member(name=name, node_id="n", pid=1) for name in (CONTROLLER, "trainer-0", "trainer-1")]


def remote(answer: Any) -> Any:
    """A method of an actor; with `...` as its answer it never comes."""
    future: Future[Any] = Future()
    if answer is not ...:
        future.set_result(answer)
    return SimpleNamespace(remote=lambda *_: SimpleNamespace(future=lambda: future))


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was ended, in order, and how long other nodes had for it."""
    found: list[Any] = []

    def end(members: list[Member], timeout_s: float) -> None:
        found.append(([member.name for member in members], timeout_s))

    monkeypatch.setattr(crew_module, "end_processes", end)
    monkeypatch.setattr(crew_module, "ray", SimpleNamespace(kill=lambda feed: found.append("feed")))
    return found


def crew_of(close: Any, members: Any) -> TrainerCrew:
    """A crew whose Ray Train never returns."""
    crew = TrainerCrew.__new__(TrainerCrew)
    crew.feed = SimpleNamespace(close=remote(close), members=remote(members), booking=remote(None))
    crew.failure = None
    crew._thread = threading.Thread(target=threading.Event().wait, daemon=True)
    crew._thread.start()
    return crew


def test_ranks_that_do_not_leave_are_ended_before_their_controller_within_the_patience(ended: list[Any]) -> None:
    start = time.monotonic()
    asyncio.run(crew_of(None, MEMBERS).end(PATIENCE_S))
    assert ended == [(["trainer-0", "trainer-1"], PATIENCE_S), ([CONTROLLER], PATIENCE_S), "feed"]
    assert time.monotonic() - start < 6 * PATIENCE_S + 1.0


@pytest.mark.parametrize(("close", "members"), [(..., MEMBERS), (None, ...)])
def test_a_feed_that_does_not_answer_is_asked_once_and_ended(ended: list[Any], close: Any, members: Any) -> None:
    start = time.monotonic()
    asyncio.run(crew_of(close, members).end(PATIENCE_S))
    assert ended == ["feed"]
    assert time.monotonic() - start < 2 * PATIENCE_S + 1.0
