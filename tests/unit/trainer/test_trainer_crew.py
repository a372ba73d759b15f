"""The end of a crew: in which order its processes go, and how long that may take."""

import asyncio
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from raydistill.config import Config
from raydistill.errors import LostError
from raydistill.processes import Member
from raydistill.trainer import controller as controller_module
from raydistill.trainer import crew as crew_module
from raydistill.trainer.controller import CONTROLLER, TellsFeed
from raydistill.trainer.crew import TrainerCrew

PATIENCE_S = 0.1
FEED = Member(name="feed", node_id="n", pid=2)
MEMBERS = [Member(name=name, node_id="n", pid=1) for name in (CONTROLLER, "trainer-0", "trainer-1")]
RANKS_AND_CONTROLLER = [(["trainer-0", "trainer-1"], PATIENCE_S), ([CONTROLLER], PATIENCE_S)]


def remote(answer: Any) -> Any:
    """A method of an actor, which may answer with an error; with `...` its answer never comes."""
    future: Future[Any] = Future()
    if isinstance(answer, Exception):
        future.set_exception(answer)
    elif answer is not ...:
        future.set_result(answer)
    return SimpleNamespace(remote=lambda *_: SimpleNamespace(future=lambda: future))


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was ended or given back, in order, and how long other nodes had for it."""
    found: list[Any] = []

    def end(members: list[Member], timeout_s: float) -> None:
        found.append(([member.name for member in members], timeout_s))

    monkeypatch.setattr(crew_module, "end_processes", end)
    monkeypatch.setattr(crew_module, "remove_placement_group", found.append)
    monkeypatch.setattr(crew_module, "ray", SimpleNamespace(kill=lambda feed: found.append("feed")))
    return found


def crew_of(close: Any, started: Any, failure: BaseException | None = None) -> TrainerCrew:
    """A crew in the midst of a job, whose Ray Train never returns."""
    crew = TrainerCrew.__new__(TrainerCrew)
    crew.feed = SimpleNamespace(close=remote(close), started=remote(started), process=remote(FEED), assign=remote(None))
    crew.failure, crew._number, crew._feed_process = failure, -1, None
    crew.keep([], None)
    crew._thread = threading.Thread(target=threading.Event().wait, daemon=True)
    crew._thread.start()
    asyncio.run(crew.start(SimpleNamespace(config=Config())))  # type: ignore[arg-type]
    return crew


def test_ranks_that_do_not_leave_are_ended_before_their_controller_within_the_patience(ended: list[Any]) -> None:
    start = time.monotonic()
    asyncio.run(crew_of(None, (MEMBERS, None)).end(PATIENCE_S))
    assert ended == [*RANKS_AND_CONTROLLER, "feed"]
    assert time.monotonic() - start < 6 * PATIENCE_S + 1.0


@pytest.mark.parametrize(("close", "started"), [(..., (MEMBERS, None)), (None, ...)])
def test_a_feed_that_hangs_is_asked_once_and_ended_and_so_is_everyone_whom_the_driver_knows(
    ended: list[Any], close: Any, started: Any
) -> None:
    crew = crew_of(close, started)
    crew.keep(MEMBERS, None)
    start = time.monotonic()
    asyncio.run(crew.end(PATIENCE_S))
    assert ended == [(["feed"], PATIENCE_S), *RANKS_AND_CONTROLLER, "feed"]
    assert time.monotonic() - start < 6 * PATIENCE_S + 1.0


def test_ranks_are_ended_and_their_booking_given_back_when_the_feed_is_dead(ended: list[Any]) -> None:
    crew = crew_of(ActorDiedError(), ..., failure=ActorDiedError())
    crew.keep(MEMBERS, "booking")  # type: ignore[arg-type]
    asyncio.run(crew.end(PATIENCE_S))
    assert ended == [*RANKS_AND_CONTROLLER, "booking", "feed"]


@pytest.mark.parametrize("failure", [None, ActorDiedError()])
def test_ranks_of_a_killed_controller_are_ended_though_ray_train_has_returned(
    ended: list[Any], failure: BaseException | None
) -> None:
    crew = crew_of(None, (MEMBERS, None), failure)
    crew._thread = threading.Thread(target=lambda: None)
    crew._thread.start()
    asyncio.run(crew.end(PATIENCE_S))
    assert ended == [
        *(RANKS_AND_CONTROLLER if failure else []),
        "feed",
    ]  # without a failure they have left by themselves


def test_a_hanging_feed_of_a_crew_whose_ranks_never_came_is_ended(ended: list[Any]) -> None:
    asyncio.run(crew_of(..., ...).end(PATIENCE_S))
    assert ended == [(["feed"], PATIENCE_S), "feed"]


def test_ray_train_starts_no_ranks_by_itself(monkeypatch: pytest.MonkeyPatch, ended: list[Any]) -> None:
    """Ranks of a second group would take a job that is half done."""
    given: dict[str, Any] = {}

    class Trainer:
        def __init__(self, _: Any, **settings: Any) -> None:
            given.update(settings)

        def fit(self) -> None: ...

    monkeypatch.setattr(crew_module, "_LeanTrainer", Trainer)
    crew = crew_of(None, ...)
    crew._config, crew._name = Config(), "crew"
    crew._fit()
    failures = given["run_config"].failure_config
    assert (failures.max_failures, failures.max_preemption_failures) == (0, 0)


def test_a_feed_that_dies_while_ranks_start_is_no_reason_to_start_them_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Train tries again, for ever, after a RayActorError at this point."""

    def get(*_: Any, **__: Any) -> None:
        raise ActorDiedError

    monkeypatch.setattr(controller_module, "ray", SimpleNamespace(get=get))
    group: Any = SimpleNamespace(
        get_worker_group_state=lambda: SimpleNamespace(placement_group_handle=SimpleNamespace(placement_group=None))
    )
    with pytest.raises(LostError, match="the trainer's feed died"):
        TellsFeed(SimpleNamespace(book=remote(None))).after_worker_group_start(group)
