"""Ctrl-C and SIGTERM: what is called, what is cancelled, and how long everything behind it may take."""

import asyncio
import io
import signal
import time
from collections.abc import Awaitable, Callable

import pytest
from rich.console import Console

from raydistill.signals import StopClock, cancel_on_signals, stop_on_signals

PATIENCE_S = 20.0  # far above what a busy machine needs, far below what a hanging trainer would take
SOON_S = 0.1


async def forever() -> None:
    await asyncio.Event().wait()


def interrupted(
    body: Callable[[], Awaitable[str]], stop: Callable[[], Awaitable[None]], clock: StopClock, num_signals: int = 1
) -> str:
    """What becomes of a body that gets signals as soon as it runs."""

    async def main() -> str:
        loop = asyncio.get_running_loop()
        with stop_on_signals(stop, Console(file=io.StringIO()), clock):
            for number in range(num_signals):
                loop.call_later(SOON_S * (number + 1), signal.raise_signal, signal.SIGTERM)
            return await body()

    async def within_patience() -> str:
        return await asyncio.wait_for(main(), PATIENCE_S)

    return asyncio.run(within_patience())


def test_a_stop_that_hangs_does_not_hold_up_the_deadline() -> None:
    """The trainer's feed does not answer: asking it may take trainer.timeout_s, half an hour."""
    events: list[str] = []

    async def stop() -> None:
        events.append("asked")
        await forever()

    async def body() -> str:
        try:
            await forever()
        finally:
            events.append("cancelled")
        return "never"

    with pytest.raises(asyncio.CancelledError):
        interrupted(body, stop, StopClock(body_s=SOON_S, all_s=PATIENCE_S))
    assert events == ["asked", "cancelled"]


def test_a_body_that_ends_in_time_is_not_cancelled() -> None:
    stopped = asyncio.Event()

    async def stop() -> None:
        stopped.set()

    async def body() -> str:
        await stopped.wait()
        return "checkpoint"

    assert interrupted(body, stop, StopClock(body_s=PATIENCE_S, all_s=PATIENCE_S)) == "checkpoint"


def test_an_error_of_the_stop_leaves_it_to_the_deadline() -> None:
    async def stop() -> None:
        raise RuntimeError("the feed is gone")

    async def body() -> str:
        await forever()
        return "never"

    with pytest.raises(asyncio.CancelledError):
        interrupted(body, stop, StopClock(body_s=SOON_S, all_s=PATIENCE_S))


def test_a_second_signal_ends_the_body_at_once() -> None:
    async def body() -> str:
        await forever()
        return "never"

    with pytest.raises(asyncio.CancelledError):
        interrupted(body, forever, StopClock(body_s=2 * PATIENCE_S, all_s=2 * PATIENCE_S), num_signals=2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_before_there_is_anything_to_save_the_first_signal_ends_the_body(number: signal.Signals) -> None:
    async def body() -> None:
        with cancel_on_signals():
            asyncio.get_running_loop().call_later(SOON_S, signal.raise_signal, number)
            await forever()

    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(asyncio.wait_for(body(), PATIENCE_S))
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_signal_ends_what_does_not_heed_the_first() -> None:
    async def body() -> None:
        with cancel_on_signals():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("it goes on")

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(body())


def test_once_there_is_something_to_save_the_first_signal_asks_for_it() -> None:
    stopped = asyncio.Event()

    async def stop() -> None:
        stopped.set()

    async def body() -> str:
        with cancel_on_signals(), stop_on_signals(stop, Console(file=io.StringIO()), StopClock()):
            asyncio.get_running_loop().call_later(SOON_S, signal.raise_signal, signal.SIGINT)
            await stopped.wait()
            return "checkpoint"

    assert asyncio.run(body()) == "checkpoint"


def test_what_ends_after_a_stop_gets_what_is_left_of_the_time() -> None:
    clock = StopClock(all_s=10.0)
    assert not clock.is_started
    assert clock.limit(60.0) == 60.0
    clock.start()
    assert clock.is_started
    assert clock.limit(5.0) == 5.0
    assert 0 < clock.limit(60.0) <= 10.0
    late = StopClock(all_s=0.0)
    late.start()
    time.sleep(0.01)
    assert 0 < late.limit(60.0) < 1.0
