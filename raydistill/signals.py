"""Ctrl-C and SIGTERM: checkpoint, then stop; within a bounded time, and at once when asked a second time."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress

from rich.console import Console

from raydistill.progress import say

STOP_WITHIN_S = 25.0  # Kubernetes, for one, kills 30 s after SIGTERM
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_on_signals(stop: Callable[[], Awaitable[None]], console: Console) -> Iterator[None]:
    """While the body runs, a signal calls `stop`; if the body has not ended by itself in time, it is cancelled.

    Only in the main thread of a process: elsewhere signals are somebody else's.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    requests: set[asyncio.Task[None]] = set()

    async def request(name: str) -> None:
        say(console, f"{name}: writing a checkpoint, then stopping (again: stop at once)", style="yellow")
        with suppress(Exception):  # if the trainer cannot be asked, the deadline below ends the run
            await stop()
        await asyncio.sleep(STOP_WITHIN_S)
        task.cancel()

    def on_signal(number: signal.Signals) -> None:
        if requests:
            task.cancel()
        else:
            requests.add(asyncio.ensure_future(request(number.name)))

    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        for number in SIGNALS:
            loop.add_signal_handler(number, on_signal, number)
    except (ValueError, RuntimeError):  # not the main thread
        yield
        return
    try:
        yield
    finally:
        for number in SIGNALS:
            loop.remove_signal_handler(number)
            signal.signal(number, before[number])
        for waiting in requests:
            waiting.cancel()
