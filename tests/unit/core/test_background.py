"""Calls in threads: their answers, and what a process does about one that it leaves behind."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import TimeoutError as LateError
from typing import Any

import pytest

from raydistill.background import aside, begin, run_to_end

SOON_S = 30.0  # far above what a busy machine needs, far below what the calls take
SLEEPS = "import time; time.sleep(600)"
IN_CPP = "[fft(numbers) for _ in iter(int, 1)]"
SCRIPT = """
import asyncio
from raydistill.background import aside
from raydistill.cli import main_with_errors
from raydistill.signals import cancel_on_signals

{begin}

def work():
    print("at work", flush=True)
    {work}

async def whole():
    with cancel_on_signals():
        await aside(work)

def command(_):
    try:
        asyncio.run(whole())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None

raise SystemExit(main_with_errors(command, []))
"""


@pytest.mark.parametrize(
    ("number", "begin_with", "work"),
    [
        (signal.SIGINT, "", SLEEPS),
        (signal.SIGTERM, "", SLEEPS),
        (signal.SIGINT, "from scipy.fft import fft; numbers = [1.0] * 64", IN_CPP),
    ],
    ids=["SIGINT", "SIGTERM", "C++"],
)
def test_a_process_that_is_interrupted_does_not_wait_for_the_call(
    number: signal.Signals, begin_with: str, work: str
) -> None:
    """One that comes back from C++ again and again, as training does: at the end of an interpreter that is an abort. SciPy's is
    sooner there than torch."""
    script = SCRIPT.format(begin=begin_with, work=work)
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "at work\n"
        process.send_signal(number)
        try:
            _, complaint = process.communicate(timeout=SOON_S)
        finally:
            process.kill()
    assert (process.returncode, complaint) == (130, "interrupted\n")


def test_answers_and_errors_come_back() -> None:
    async def both() -> int:
        with pytest.raises(ZeroDivisionError):
            await aside(divmod, 1, 0)
        return await aside(int, "11", base=2)

    assert asyncio.run(both()) == 3
    with pytest.raises(LateError):
        begin(lambda: time.sleep(1)).result(0.01)


def test_a_call_that_was_left_behind_ends_without_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    go, threads = threading.Event(), list[threading.Thread]()

    def work() -> None:
        threads.append(threading.current_thread())
        go.wait(SOON_S)

    async def leave() -> None:
        task = asyncio.ensure_future(aside(work))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()

    asyncio.run(leave())
    go.set()
    threads[0].join(SOON_S)
    assert capsys.readouterr().err == ""


def in_a_notebook(cell: Callable[[], Any]) -> Any:
    """What a call answers where an event loop runs already; unlike `asyncio.run`, a notebook leaves SIGINT as it is."""

    async def kernel() -> Any:
        return cell()

    loop = asyncio.new_event_loop()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return loop.run_until_complete(kernel())
    finally:
        signal.signal(signal.SIGINT, before)
        loop.close()


def test_a_call_to_the_end_works_with_and_without_a_running_loop() -> None:
    async def answer() -> str:
        await asyncio.sleep(0)
        return "answer"

    async def fail() -> None:
        raise ZeroDivisionError

    assert run_to_end(answer) == "answer"
    assert in_a_notebook(lambda: run_to_end(answer)) == "answer"
    with pytest.raises(ZeroDivisionError):
        in_a_notebook(lambda: run_to_end(fail))


def test_an_interrupt_of_a_notebook_cancels_the_call_and_waits_for_its_end() -> None:
    events: list[str] = []

    async def work() -> None:
        asyncio.get_running_loop().call_later(0.05, os.kill, os.getpid(), signal.SIGINT)
        try:
            await asyncio.sleep(SOON_S)
        finally:
            await asyncio.sleep(0.01)
            events.append("cleaned up")

    with pytest.raises(KeyboardInterrupt):
        in_a_notebook(lambda: run_to_end(work))
    assert events == ["cleaned up"]
