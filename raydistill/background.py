"""Calls in threads that nobody has to wait for: a thread cannot be ended, but it can be left behind.

    inputs = await aside(load_inputs, config)       # a cancelled task leaves the call behind, and the process may end
    answer = begin(call).result(limit_s)            # so does whoever waits no longer
    answer = run_to_end(main)                       # `asyncio.run`, also in a notebook

`asyncio.to_thread` is for short calls: when its task is cancelled, `asyncio.run` waits for the thread, and so does the
interpreter at its end.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import sys
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, wait
from functools import partial
from threading import Thread
from typing import Any, ParamSpec, TypeVar

Answer = TypeVar("Answer")
Given = ParamSpec("Given")
_LEFT_BEHIND = set[Future[Any]]()  # and not done yet


def begin(call: Callable[[], Answer], name: str = "background") -> Future[Answer]:
    """Start the call; its answer or its error."""
    answer: Future[Answer] = Future()
    answer.set_running_or_notify_cancel()  # from here on nobody can cancel it and have the thread fail at its answer

    def work() -> None:
        try:
            result = call()
        except BaseException as error:
            answer.set_exception(error)
        else:
            answer.set_result(result)

    Thread(target=work, name=name, daemon=True).start()
    return answer


async def aside(call: Callable[Given, Answer], *args: Given.args, **kwargs: Given.kwargs) -> Answer:
    """The call's answer, beside other work of the event loop."""
    answer = begin(partial(call, *args, **kwargs))
    try:
        return await asyncio.wrap_future(answer)
    except asyncio.CancelledError:
        _LEFT_BEHIND.add(answer)
        answer.add_done_callback(_LEFT_BEHIND.discard)
        raise


def run_to_end(main: Callable[[], Coroutine[Any, Any, Answer]]) -> Answer:
    """`asyncio.run(main())`; where this thread has a running event loop already, as in a notebook, in a thread of its own.

    There signals are the notebook's: KeyboardInterrupt here cancels `main`, waits for its end and passes on.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(main())
    running: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = Future()

    async def known() -> Answer:
        task = asyncio.current_task()
        assert task is not None
        running.set_result((asyncio.get_running_loop(), task))
        return await main()

    answer = begin(lambda: asyncio.run(known()), "run")
    try:
        return answer.result()
    except KeyboardInterrupt:
        if not answer.done():
            loop, task = running.result()
            loop.call_soon_threadsafe(task.cancel)
            wait([answer])
        raise


def end_beside(code: int) -> int:
    """A command's exit code, which it is about to return; where a call was left behind and still works, the process ends here.

    The interpreter would end its thread in the midst of C++ (torch, tokenizers), which aborts the process.
    """
    if _LEFT_BEHIND:
        atexit._run_exitfuncs()  # Ray ends its own processes in one of them
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
    return code
