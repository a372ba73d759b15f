"""The pool replaces what dies or hangs, re-issues what it held, and gives up in the end."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any

import pytest
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from raydistill.actors import give_up
from raydistill.actors import pool as pool_module
from raydistill.actors.pool import ActorPool
from raydistill.errors import LostError, ModelError, RunError

HANG, DIE = object(), object()


class FakeRef:
    """An object reference that resolves through a concurrent future, as Ray's do."""

    def __init__(self) -> None:
        self.result: Future[Any] = Future()

    def future(self) -> Future[Any]:
        return self.result


class FakeMethod:
    def __init__(self, actor: "FakeActor", name: str) -> None:
        self.actor, self.name, self.num_returns = actor, name, 1

    def options(self, num_returns: int) -> "FakeMethod":
        self.num_returns = num_returns
        return self

    def remote(self, *args: Any) -> Any:
        refs = [FakeRef() for _ in range(self.num_returns)]
        self.actor.call(self.name, args, refs[0].result)
        return refs[0] if self.num_returns == 1 else refs


class FakeActor:
    """Answers by `behave(actor, method, args)`: a value, an exception to raise, HANG or DIE."""

    def __init__(self, cluster: "Cluster", index: int, life: int) -> None:
        self.cluster, self.index, self.life, self.is_dead = cluster, index, life, False
        self.pending: list[Future[Any]] = []

    def __getattr__(self, name: str) -> FakeMethod:
        return FakeMethod(self, name)

    def call(self, method: str, args: tuple[Any, ...], result: Future[Any]) -> None:
        if self.is_dead:
            result.set_exception(RayActorError())
            return
        if method == "__ray_ready__":
            if self.life not in self.cluster.unplaced:
                result.set_result(True)
            return
        self.cluster.log.append((self.index, self.life, method, *args))
        answer = self.cluster.behave(self, method, args)
        self.pending.append(result)
        if answer is DIE:
            self.die()
        elif isinstance(answer, BaseException):
            result.set_exception(answer)
        elif answer is not HANG:
            result.set_result(answer)

    def die(self) -> None:
        self.is_dead = True
        for result in self.pending:
            if not result.done():
                result.set_exception(RayActorError())


class Cluster:
    """Makes actors, kills them, and notes every call as (index, life, method, *arguments)."""

    def __init__(self, behave: Callable[[FakeActor, str, tuple[Any, ...]], Any]) -> None:
        self.behave, self.log = behave, []  # type: ignore[var-annotated]
        self.made: list[FakeActor] = []
        self.killed: list[FakeActor] = []
        self.unplaced: tuple[int, ...] = ()  # lives that never get a place

    def create(self, index: int) -> FakeActor:
        self.made.append(FakeActor(self, index, sum(a.index == index for a in self.made)))
        return self.made[-1]

    def kill(self, actor: FakeActor, no_restart: bool) -> None:
        assert no_restart
        self.killed.append(actor)
        actor.die()

    async def revive(self, actor: FakeActor, index: int) -> None:
        await asyncio.wrap_future(actor.start.remote().future())


MakePool = Callable[..., ActorPool[Any]]


@pytest.fixture
def make_pool(monkeypatch: pytest.MonkeyPatch) -> MakePool:
    def make(cluster: Cluster, size: int = 2, timeout_s: float = 5.0) -> ActorPool[Any]:
        monkeypatch.setattr(pool_module.ray, "kill", cluster.kill)
        return ActorPool("teacher", size, cluster.create, cluster.revive, timeout_s, {"GPU": 1.0, "CPU": 0.5})

    return make


def run(whole: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(whole(), 10)

    asyncio.run(limited())


def dies_first(method_that_kills: str, answer: Any = DIE) -> Callable[..., Any]:
    """Actor 0's first life ends at `method_that_kills`; everything else answers with its name."""

    def behave(actor: FakeActor, method: str, args: tuple[Any, ...]) -> Any:
        return (
            answer if (actor.index, actor.life, method) == (0, 0, method_that_kills) else f"{actor.index}.{actor.life}"
        )

    return behave


def test_an_actor_that_dies_is_replaced_revived_and_its_work_re_issued_once(make_pool: MakePool) -> None:
    cluster = Cluster(dies_first("score"))

    async def whole() -> None:
        pool = make_pool(cluster)
        report, reference = await pool.work(10, 1, "score", "samples", index=0)
        assert report == "0.1"
        assert isinstance(reference, FakeRef)  # never fetched
        assert not reference.result.done()
        assert pool.actors()[0] is cluster.made[-1]

    run(whole)
    assert cluster.log == [(0, 0, "score", "samples"), (0, 1, "start"), (0, 1, "score", "samples")]
    assert cluster.killed == [cluster.made[0]]


@pytest.mark.parametrize("said", [RunError("cannot write the export: No space left"), ModelError("no such model")])
def test_what_an_actor_says_in_one_line_is_raised_as_that_line(make_pool: MakePool, said: Exception) -> None:
    answer = RayTaskError("export_checkpoint", "Traceback (most recent call last):\n...", said).as_instanceof_cause()
    assert "\n" in str(answer)
    cluster = Cluster(dies_first("export", answer))

    async def whole() -> None:
        with pytest.raises(type(said)) as error:
            await make_pool(cluster).call(0, "export")
        assert str(error.value) == str(said)

    run(whole)
    assert not cluster.killed


def test_a_call_that_hangs_counts_as_a_dead_actor(make_pool: MakePool) -> None:
    cluster = Cluster(dies_first("load", answer=HANG))

    async def whole() -> None:
        assert await make_pool(cluster, timeout_s=0.05).call(0, "load", 3) == "0.1"

    run(whole)
    assert cluster.log == [(0, 0, "load", 3), (0, 1, "start"), (0, 1, "load", 3)]
    assert cluster.killed == [cluster.made[0]]


@pytest.mark.parametrize("method", ["work", "call"])
def test_a_call_survives_two_hangs_in_a_row_each_time(make_pool: MakePool, method: str) -> None:
    """The count is the call's own: what another call met does not shorten its patience."""

    def behave(actor: FakeActor, name: str, args: tuple[Any, ...]) -> Any:
        return HANG if name == "score" and actor.life % 3 < 2 else actor.life

    cluster = Cluster(behave)

    async def whole() -> None:
        pool = make_pool(cluster, size=1, timeout_s=0.02)
        for life in (2, 5, 8):
            answer = await (pool.work(1, 1, "score") if method == "work" else pool.call(0, "score"))
            assert (answer[0] if method == "work" else answer) == life
            cluster.made[-1].die()
            assert await pool.call(0, "counts") == life + 1

    run(whole)


@pytest.mark.parametrize("method", ["work", "call"])
def test_a_call_that_hangs_every_time_ends_the_run_with_the_field_of_its_limit(
    make_pool: MakePool, method: str
) -> None:
    cluster = Cluster(lambda actor, name, args: HANG if name == "score" else "ok")
    way_out = r"'score' within rollout.timeout_s=0.02, 3 times in a row.* raise rollout.timeout_s, or .*eval_rows"

    async def whole() -> None:
        pool = make_pool(cluster, size=1, timeout_s=0.02)
        with pytest.raises(RunError, match=f"teacher-0 did not answer {way_out}"):
            await (pool.work(1, 1, "score") if method == "work" else pool.call(0, "score"))
        assert await pool.call(0, "counts") == "ok"  # another run need not wait behind it

    run(whole)
    assert [call[1:] for call in cluster.log if call[2] == "score"] == [(life, "score") for life in range(3)]
    assert len(cluster.made) == 4


def test_a_start_that_hangs_every_time_names_no_field(make_pool: MakePool) -> None:
    cluster = Cluster(lambda actor, name, args: HANG)

    async def whole() -> None:
        pool = make_pool(cluster, size=1)
        pool._revive = revive_at_once
        with pytest.raises(RunError, match=r"'start' within 0.02 s, 3 times in a row.*Ray's logs"):
            await pool.call(0, "start", timeout_s=0.02)

    run(whole)


async def revive_at_once(actor: Any, index: int) -> None: ...


def test_replacements_that_hang_when_they_start_end_the_run(make_pool: MakePool) -> None:
    cluster = Cluster(lambda actor, name, args: DIE)

    async def hang(actor: Any, index: int) -> None:
        raise TimeoutError

    async def whole() -> None:
        pool = make_pool(cluster, size=1)
        pool._revive = hang
        with pytest.raises(RunError, match="teacher-0 did not answer 'start' within 900 s, 3 times in a row"):
            await pool.call(0, "score")

    run(whole)
    assert set(cluster.killed) == set(cluster.made) and len(cluster.made) == 4


@pytest.mark.parametrize("life", [0, 1])
def test_an_actor_without_a_place_ends_the_run_at_once(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch, life: int
) -> None:
    """Another could not be placed either. life 1: the place went to somebody else when the first actor died."""
    monkeypatch.setattr(give_up.ray, "available_resources", lambda: {"CPU": 7.5})
    cluster = Cluster(lambda actor, name, args: HANG if actor.life == life else DIE)
    cluster.unplaced = (life,)

    async def revive(actor: FakeActor, index: int) -> None:
        await asyncio.wait_for(asyncio.wrap_future(actor.start.remote().future()), 0.02)

    async def whole() -> None:
        pool = make_pool(cluster, size=1)
        pool._revive = revive
        says = r"teacher-0 found no place on the cluster: it needs 1 GPU \(0 free\); wait for .*teacher.num_actors"
        with pytest.raises(RunError, match=says):
            await pool.call(0, "start", timeout_s=0.02)

    run(whole)
    assert len(cluster.made) == life + 1


def test_an_actor_that_is_slow_where_there_is_room_is_replaced(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No GPU is free, because the actor itself has it; or one is free, and its process does not come up."""
    free = {"CPU": 4.0}
    monkeypatch.setattr(give_up.ray, "available_resources", lambda: free)
    cluster = Cluster(lambda actor, name, args: HANG if actor.life < 2 else "ok")
    cluster.unplaced = (1,)

    async def lets_go(actor: Any, index: int) -> None:
        free["GPU"] = 1.0

    async def whole() -> None:
        pool = make_pool(cluster, size=1)
        pool._revive = lets_go
        assert await pool.call(0, "start", timeout_s=0.02) == "ok"

    run(whole)


class OneAtATime:
    """Answers after `seconds` of work, one call after another; `stop` is SIGSTOP."""

    def __init__(self, seconds: Callable[[tuple[Any, ...]], float]) -> None:
        self.seconds, self.waiting, self.is_stopped = seconds, asyncio.Queue[Any](), False
        self.task = asyncio.create_task(self.serve())

    async def serve(self) -> None:
        while True:
            actor, args = await self.waiting.get()
            await asyncio.sleep(self.seconds(args))
            if not self.is_stopped:
                actor.pending.pop(0).set_result(args[0])

    def __call__(self, actor: FakeActor, method: str, args: tuple[Any, ...]) -> Any:
        if actor.life:
            return args[0] if args else "started"
        self.waiting.put_nowait((actor, args))
        return HANG


def test_a_call_that_waits_behind_others_is_no_hang(make_pool: MakePool) -> None:
    async def whole() -> None:
        cluster = Cluster(OneAtATime(lambda args: 0.1))
        pool = make_pool(cluster, size=1, timeout_s=0.25)
        answers = await asyncio.gather(*(pool.work(1, 1, "score", name) for name in "abcdef"))
        assert [report for report, _ in answers] == list("abcdef")
        assert len(cluster.made) == 1 and not cluster.killed

    run(whole)


def test_a_call_waits_as_long_as_the_one_before_it_may_take(make_pool: MakePool) -> None:
    async def whole() -> None:
        cluster = Cluster(OneAtATime(lambda args: args[1]))
        pool = make_pool(cluster, size=1, timeout_s=0.1)
        export = pool.call(0, "export", "export", 0.4, timeout_s=5)
        assert await asyncio.gather(export, pool.call(0, "evaluate", "report", 0.0)) == ["export", "report"]
        assert len(cluster.made) == 1

    run(whole)


def test_an_actor_that_stops_after_an_answer_hangs_from_then_on(make_pool: MakePool) -> None:
    async def whole() -> None:
        serving = OneAtATime(lambda args: 0.1)
        cluster = Cluster(serving)
        pool = make_pool(cluster, size=1, timeout_s=0.3)
        start = time.monotonic()
        calls = [asyncio.create_task(pool.call(0, "score", name)) for name in "abc"]
        assert await calls[0] == "a"
        serving.is_stopped = True
        assert await asyncio.gather(*calls[1:]) == ["b", "c"]
        assert 0.35 < time.monotonic() - start < 2
        assert len(cluster.made) == 2

    run(whole)


def test_a_broadcast_answers_in_order_though_one_actor_dies(make_pool: MakePool) -> None:
    cluster = Cluster(dies_first("load"))

    async def whole() -> None:
        assert await make_pool(cluster, size=3).broadcast("load", 1) == ["0.1", "1.0", "2.0"]

    run(whole)


def test_all_work_of_a_dead_actor_is_re_issued_and_it_is_replaced_once(make_pool: MakePool) -> None:
    def behave(actor: FakeActor, method: str, args: tuple[Any, ...]) -> Any:
        if actor.life == 0 and method == "score":
            return DIE if args == ("c",) else HANG
        return "done"

    cluster = Cluster(behave)

    async def whole() -> None:
        pool = make_pool(cluster, size=1)
        answers = await asyncio.gather(*(pool.work(1, 1, "score", name) for name in "abc"))
        assert [report for report, _ in answers] == ["done"] * 3

    run(whole)
    assert sorted(call[3] for call in cluster.log if call[1:3] == (1, "score")) == ["a", "b", "c"]
    assert len(cluster.made) == 2


def test_no_work_reaches_a_replacement_before_it_is_revived(make_pool: MakePool) -> None:
    revived = asyncio.Event()
    cluster = Cluster(dies_first("score"))

    async def revive(actor: FakeActor, index: int) -> None:
        await revived.wait()
        await cluster.revive(actor, index)

    async def whole() -> None:
        pool = make_pool(cluster, size=1)
        pool._revive = revive
        first = asyncio.create_task(pool.work(1, 1, "score", "a"))
        await asyncio.sleep(0.01)
        second = asyncio.create_task(pool.work(1, 1, "score", "b"))  # arrives while the actor is being replaced
        await asyncio.sleep(0.01)
        assert cluster.log == [(0, 0, "score", "a")]
        revived.set()
        await asyncio.gather(first, second)

    run(whole)
    assert [call[1:] for call in cluster.log] == [
        (0, "score", "a"),
        (1, "start"),
        (1, "score", "a"),
        (1, "score", "b"),
    ]


@pytest.mark.parametrize("method", ["work", "call"])
def test_too_many_replacements_end_the_run(make_pool: MakePool, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    monkeypatch.setattr(pool_module, "MAX_REPLACEMENTS", 3)
    cluster = Cluster(lambda actor, name, args: DIE if name == "score" else "ok")

    async def whole() -> None:
        pool = make_pool(cluster, size=1)
        with pytest.raises(RunError, match="teacher-0 died again after 3 replacements"):
            await (pool.work(1, 1, "score") if method == "work" else pool.call(0, "score"))

    run(whole)
    assert len(cluster.made) == 4


def test_a_replacement_that_dies_before_it_is_ready_is_replaced_too(make_pool: MakePool) -> None:
    def behave(actor: FakeActor, method: str, args: tuple[Any, ...]) -> Any:
        return DIE if actor.life == 0 or (actor.life == 1 and method == "start") else actor.life

    cluster = Cluster(behave)

    async def whole() -> None:
        assert await make_pool(cluster, size=1).call(0, "score") == 2

    run(whole)
    assert cluster.log == [(0, 0, "score"), (0, 1, "start"), (0, 2, "start"), (0, 2, "score")]
    assert set(cluster.killed) == set(cluster.made[:2])


def test_replacements_that_always_die_end_the_run(make_pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "MAX_REPLACEMENTS", 3)
    cluster = Cluster(lambda actor, name, args: DIE)

    async def whole() -> None:
        with pytest.raises(RunError, match="teacher-0 died again after 3 replacements"):
            await make_pool(cluster, size=1).call(0, "score")

    run(whole)
    assert len(cluster.made) == 4


def test_a_replacement_whose_weights_are_gone_ends_the_attempt(make_pool: MakePool) -> None:
    """No other replacement could load them either; the next attempt publishes new ones."""
    gone = ObjectLostError("00" * 28, None, "")
    cluster = Cluster(lambda actor, method, args: DIE if actor.life == 0 else gone)

    async def whole() -> None:
        with pytest.raises(LostError, match="lost with their node"):
            await make_pool(cluster, size=1).call(0, "score")

    run(whole)
    assert [actor.life for actor in cluster.made] == [0, 1]


def test_an_error_of_the_work_itself_is_not_retried(make_pool: MakePool) -> None:
    cluster = Cluster(lambda actor, name, args: ValueError("no such token"))

    async def whole() -> None:
        pool = make_pool(cluster)
        with pytest.raises(ValueError, match="no such token"):
            await pool.work(5, 1, "score")
        assert pool._load == [0, 0]

    run(whole)
    assert len(cluster.log) == 1
    assert cluster.killed == []


def test_work_goes_to_the_actor_with_the_fewest_tokens_outstanding(make_pool: MakePool) -> None:
    cluster = Cluster(lambda actor, name, args: HANG)

    async def whole() -> None:
        pool = make_pool(cluster, size=3)
        tasks = []
        for weight in (100, 30, 20, 15, 10, 60, 1):
            tasks.append(asyncio.create_task(pool.work(weight, 1, "score", weight)))
            await asyncio.sleep(0)
        # 100 | 30 | 20 -> 15 joins 20 -> 10 joins 30 -> 60 joins 20 + 15 -> 1 joins 30 + 10
        assert [(call[0], call[3]) for call in cluster.log] == [
            (0, 100), (1, 30), (2, 20), (2, 15), (1, 10), (2, 60), (1, 1),
        ]  # fmt: skip
        cluster.made[0].pending[0].set_result("done")
        assert (await tasks[0])[0] == "done"
        tasks.append(asyncio.create_task(pool.work(5, 1, "score", 5)))
        await asyncio.sleep(0)
        assert cluster.log[-1] == (0, 0, "score", 5)  # answered work weighs nothing
        for task in tasks:
            task.cancel()

    run(whole)


def test_work_that_dies_with_the_pool_starts_no_new_actor(make_pool: MakePool) -> None:
    cluster = Cluster(lambda actor, name, args: HANG)

    async def whole() -> None:
        pool = make_pool(cluster)
        task = asyncio.create_task(pool.work(5, 1, "score"))
        await asyncio.sleep(0)
        pool.shutdown()
        with pytest.raises(RunError, match="teacher-0 was shut down while it worked"):
            await task

    run(whole)
    assert len(cluster.made) == 2
    assert len(cluster.killed) == 2
