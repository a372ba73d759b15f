"""Calls in threads that nobody has to wait for: a thread cannot be ended, but it can be left behind.

    inputs = await aside(load_inputs, config)       # a cancelled task leaves the call behind, and the process may end
    answer = begin(call).result(limit_s)            # so does whoever waits no longer

`asyncio.to_thread` is for short calls: when its task is cancelled, `asyncio.run` waits for the thread, and so does the
interpreter at its end.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future
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
