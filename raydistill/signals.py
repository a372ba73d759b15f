"""Ctrl-C and SIGTERM: checkpoint, then stop; within a bounded time, and at once when asked a second time.

clock = StopClock()
with stop_on_signals(stop, console, clock):     # the first signal calls `stop` and starts the clock
    ...                                         # cancelled when BODY_S are over
delivery.finish(clock.limit(5.0))               # whatever still ends afterwards asks how long it may take
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress

from rich.console import Console

from raydistill.progress import say

BODY_S = 18.0  # for the checkpoint
ALL_S = 23.0  # with all that ends behind it, but Ray itself; Kubernetes, for one, kills 30 s after SIGTERM
LEAST_S = 0.5  # what is left for each thing that ends after the time is up
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopClock:
    """How much time is left for an orderly end. Without a signal: all that anybody wants."""

    def __init__(self, body_s: float = BODY_S, all_s: float = ALL_S) -> None:
        self.body_s, self._all_s = body_s, all_s
        self._end_s: float | None = None

    @property
    def is_started(self) -> bool:
        """Whether somebody asked for the end."""
        return self._end_s is not None

    def start(self) -> None:
        """Somebody asked for the end."""
        self._end_s = time.monotonic() + self._all_s

    def limit(self, wanted_s: float) -> float:
        """`wanted_s`, or what is left of the time where that is less."""
        if self._end_s is None:
            return wanted_s
        return min(wanted_s, max(self._end_s - time.monotonic(), LEAST_S))


@contextmanager
def _taken(
    take: Callable[[signal.Signals], object], leave: Callable[[signal.Signals], object] = lambda number: None
) -> Iterator[None]:
    """While the body runs, the signals are taken; afterwards who had them before has them again.

    Only in the main thread of a process: elsewhere signals are somebody else's.
    """
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        for number in SIGNALS:
            take(number)
    except (ValueError, RuntimeError):  # not the main thread
        yield
        return
    try:
        yield
    finally:
        for number in SIGNALS:
            leave(number)
            signal.signal(number, before[number])


@contextmanager
def cancel_on_signals() -> Iterator[None]:
    """While the body runs, a signal cancels it: there is nothing to save yet. A second one raises KeyboardInterrupt.

    A `stop_on_signals` within it goes first.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    is_asked = False

    def on_signal(*_: object) -> None:
        nonlocal is_asked
        if is_asked:
            raise KeyboardInterrupt
        is_asked = True
        loop.call_soon_threadsafe(task.cancel)  # wakes the loop as well

    with _taken(lambda number: signal.signal(number, on_signal)):
        yield


@contextmanager
def stop_on_signals(stop: Callable[[], Awaitable[None]], console: Console, clock: StopClock) -> Iterator[None]:
    """While the body runs, a signal calls `stop`; if the body has not ended by itself in time, it is cancelled."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    asking: list[asyncio.Task[None]] = []
    deadline: asyncio.TimerHandle | None = None

    async def ask() -> None:
        with suppress(Exception):  # if the trainer cannot be asked, the deadline ends the run
            await stop()

    def on_signal(number: signal.Signals) -> None:
        nonlocal deadline
        if clock.is_started:
            task.cancel()
            return
        clock.start()
        deadline = loop.call_later(clock.body_s, task.cancel)  # beside `stop`, which may wait for a trainer that hangs
        asking.append(loop.create_task(ask()))
        say(console, f"{number.name}: writing a checkpoint, then stopping (again: stop at once)", style="yellow")

    try:
        with _taken(lambda number: loop.add_signal_handler(number, on_signal, number), loop.remove_signal_handler):
            yield
    finally:
        if deadline is not None:
            deadline.cancel()
        for waiting in asking:
            waiting.cancel()
