"""The feed between driver and ranks, as a plain class in one event loop."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import numpy as np
import pytest

from raydistill.errors import RunError
from raydistill.messages import StepOutcome, StudentWeights
from raydistill.processes import Member
from raydistill.trainer.feed import KEEP_VERSIONS, Feed


def outcome(step: int) -> StepOutcome:
    return StepOutcome(
        step=step, version=step + 1, weights_hash="", codes_hash=None, skipped=None, metrics={}, spans=()
    )


def weights(version: int) -> StudentWeights:
    return StudentWeights(version=version, tensors={"a": np.zeros(1, np.float32)}, probe=None)


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 5))


async def still_waits(task: asyncio.Task[Any]) -> bool:
    for _ in range(5):
        await asyncio.sleep(0)
    return not task.done()


def test_a_lease_waits_for_its_offer_and_each_rank_gets_its_own() -> None:
    async def whole() -> None:
        feed = Feed()
        first, second = (asyncio.create_task(feed.lease(0, rank)) for rank in (0, 1))
        await feed.offer(1, [["later"], ["later"]])
        assert await still_waits(first)
        await feed.offer(0, [["a", "b"], ["c"]])
        assert await first == ["a", "b"]
        assert await second == ["c"]

    run(whole())


def test_a_lease_can_be_repeated_until_the_rank_leases_a_later_step() -> None:
    async def whole() -> None:
        feed = Feed()
        for step in range(3):
            await feed.offer(step, [[f"{step}-0"], [f"{step}-1"]])
        assert await feed.lease(0, 0) == await feed.lease(0, 0) == ["0-0"]
        assert await feed.lease(1, 0) == ["1-0"]
        assert await still_waits(asyncio.create_task(feed.lease(0, 0)))
        assert await feed.lease(0, 1) == ["0-1"]  # the other rank is behind and keeps its own
        assert await feed.lease(2, 0) == ["2-0"]

    run(whole())


def test_offering_or_reporting_a_step_twice_is_harmless() -> None:
    async def whole() -> None:
        feed = Feed()
        await feed.offer(0, [["a"]])
        await feed.offer(0, [["a"]])
        await feed.report(outcome(0))
        await feed.report(outcome(0))
        assert await feed.lease(0, 0) == ["a"]
        assert (await feed.outcome(0)).version == 1

    run(whole())


def test_an_outcome_is_waited_for_and_earlier_ones_are_let_go() -> None:
    async def whole() -> None:
        feed = Feed()
        waiting = asyncio.create_task(feed.outcome(1))
        await feed.report(outcome(-1))
        await feed.report(outcome(0))
        assert await still_waits(waiting)
        assert (await feed.outcome(-1)).version == (await feed.outcome(-1)).version == 0
        await feed.report(outcome(1))
        assert (await waiting).step == 1
        assert await still_waits(asyncio.create_task(feed.outcome(0)))

    run(whole())


def test_weights_are_waited_for_and_only_the_newest_are_kept() -> None:
    async def whole() -> None:
        feed = Feed()
        waiting = asyncio.create_task(feed.weights(1))
        await feed.publish(weights(0))
        assert await still_waits(waiting)
        await feed.publish(weights(1))
        assert (await waiting).version == 1
        for version in range(2, KEEP_VERSIONS + 2):
            await feed.publish(weights(version))
        for version in range(2, KEEP_VERSIONS + 2):
            assert (await feed.weights(version)).version == version

    run(whole())


def test_a_version_that_was_let_go_is_an_error_and_not_a_wait_for_ever() -> None:
    async def whole() -> None:
        feed = Feed()
        await feed.assign(0, "job", keep_versions=2)
        waiting = asyncio.create_task(feed.weights(5))
        for version in (0, 10, 20):
            await feed.publish(weights(version))
        with pytest.raises(RunError, match=r"version 0 is not kept; the feed holds \[10, 20\]"):
            await feed.weights(0)
        with pytest.raises(RunError, match="version 5 is not kept"):  # was never published
            await waiting

    run(whole())


def test_a_trainer_that_runs_ahead_by_the_staleness_loses_no_version_the_driver_still_asks_for() -> None:
    async def whole(staleness: int) -> None:
        feed = Feed()
        await feed.assign(0, "job", keep_versions=staleness + 2)
        published = -1
        for step in range(10):  # the driver is about to ask for version `step`; steps up to step - 1 + S are offered
            while published < step + staleness:
                published += 1
                await feed.publish(weights(published))
            assert (await feed.weights(step)).version == step

    for staleness in range(5):
        run(whole(staleness))


def test_closing_wakes_everyone_with_the_reason() -> None:
    async def whole() -> None:
        feed = Feed()
        waiting = [asyncio.create_task(c) for c in (feed.lease(0, 0), feed.outcome(0), feed.weights(0))]
        assert await still_waits(waiting[0])
        await feed.close("the teacher died")
        for task in waiting:
            with pytest.raises(RunError, match="the feed is closed: the teacher died"):
                await task
        with pytest.raises(RunError, match="the teacher died"):
            await feed.lease(3, 0)

    run(whole())


def test_what_was_there_before_closing_can_still_be_had() -> None:
    async def whole() -> None:
        feed = Feed()
        await feed.report(outcome(0))
        await feed.publish(weights(1))
        await feed.close("over")
        assert (await feed.outcome(0)).step == 0
        assert (await feed.weights(1)).version == 1

    run(whole())


def test_a_stop_ends_all_ranks_before_the_same_step() -> None:
    """Rank 0 has begun step 1 and rank 1 has not: both train it, and neither begins step 2."""

    async def whole() -> None:
        feed = Feed()
        for step in range(3):
            await feed.offer(step, [[f"{step}-0"], [f"{step}-1"]])
        await feed.lease(0, 0)
        await feed.lease(0, 1)
        await feed.lease(1, 0)
        assert await feed.stop() == 2
        assert await feed.lease(1, 1) == ["1-1"]
        assert await feed.lease(2, 0) is None
        assert await feed.lease(2, 1) is None
        await feed.report(outcome(1))
        assert (await feed.outcome(1)) is not None
        assert await feed.outcome(2) is None
        assert await feed.stop() == 2  # asking again moves nothing

    run(whole())


def test_a_stop_wakes_those_who_wait_for_a_step_nobody_began() -> None:
    async def whole() -> None:
        feed = Feed()
        rank, driver = asyncio.create_task(feed.lease(0, 0)), asyncio.create_task(feed.outcome(0))
        assert await still_waits(rank)
        assert await feed.stop() == 0
        assert await rank is None
        assert await driver is None

    run(whole())


def test_the_first_fatal_error_is_remembered() -> None:
    async def whole() -> None:
        feed = Feed()
        assert await feed.fatal() is None
        await feed.fail("the disk is full")
        await feed.fail("a neighbour died")
        assert await feed.fatal() == "the disk is full"

    run(whole())


def test_what_ranks_meet_because_the_feed_is_closed_is_not_fatal() -> None:
    async def whole() -> None:
        feed = Feed()
        await feed.close("the trainer group failed: its controller died")
        await feed.fail("the feed is closed: the trainer group failed")
        assert await feed.fatal() is None

        feed = Feed()
        await feed.fail("the disk is full")
        await feed.close("the trainer group failed: a rank raised an error")
        await feed.fail("the feed is closed: the trainer group failed")
        assert await feed.fatal() == "the disk is full"

    run(whole())


def test_the_driver_hears_who_is_to_end_when_the_last_rank_has_joined() -> None:
    members = [
        Member(name=name, node_id="n", pid=pid) for pid, name in enumerate(("controller", "trainer-1", "trainer-0"))
    ]

    async def whole() -> None:
        feed = Feed(num_ranks=2)
        waiting = asyncio.create_task(feed.started())
        await feed.join(members[0])
        await feed.book("booking")
        await feed.join(members[1])
        assert await still_waits(waiting)
        await feed.join(members[2])
        assert await waiting == (members, "booking")
        assert await feed.started() == (members, "booking")  # the next job's driver asks too

    run(whole())


def test_a_closed_feed_tells_who_has_joined_so_far() -> None:
    async def whole() -> None:
        feed = Feed(num_ranks=2)
        waiting = asyncio.create_task(feed.started())
        assert await still_waits(waiting)
        await feed.close("the crew is dismissed")
        assert await waiting == ([], None)

    run(whole())


def test_a_crew_takes_one_job_after_another_and_nothing_of_the_last_is_left() -> None:
    async def whole() -> None:
        feed = Feed(num_ranks=2)
        waiting = [asyncio.ensure_future(feed.next_job(0)) for _ in range(2)]
        await feed.assign(0, "first")
        assert [await one for one in waiting] == ["first", "first"]
        await feed.offer(0, [["a"], ["b"]])
        await feed.fail("too many skipped steps")
        over = asyncio.ensure_future(feed.wait_done())
        await feed.done(0, 0)
        await asyncio.sleep(0)
        assert not over.done()  # the other rank is at work
        await feed.done(0, 1)
        assert await over
        next_one = asyncio.ensure_future(feed.next_job(1))
        await feed.assign(1, "second")
        assert await next_one == "second"
        assert await feed.fatal() is None
        lease = asyncio.ensure_future(feed.lease(0, 0))
        await asyncio.sleep(0)
        assert not lease.done()  # step 0 of the first job is no step of this one
        lease.cancel()

    asyncio.run(whole())


def test_a_closed_feed_has_no_more_jobs() -> None:
    async def whole() -> None:
        feed = Feed(num_ranks=2)
        waiting = asyncio.ensure_future(feed.next_job(0))
        over = asyncio.ensure_future(feed.wait_done())
        await asyncio.sleep(0)
        await feed.close("the crew is dismissed")
        assert await waiting is None
        assert not await over

    asyncio.run(whole())
