"""Lines that quote others reach the console as they are."""

import io
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from raydistill import cli
from raydistill.driver_records import DriverRecords
from raydistill.progress import bar, say, spinner

GLOO = "RuntimeError: [/__w/pytorch/third_party/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1"


def text_of(console: Console) -> str:
    return cast(io.StringIO, console.file).getvalue()


@pytest.fixture
def console() -> Console:
    """One of a user's own, with rich's defaults, as narrow as a small terminal."""
    return Console(file=io.StringIO(), width=40, force_terminal=False)


def test_a_line_with_brackets_is_neither_markup_nor_cut(console: Console) -> None:
    say(console, GLOO, style="yellow")
    assert text_of(console) == GLOO + "\n"


def test_a_lost_ranks_error_is_a_warning_of_the_run(console: Console) -> None:
    told: list[str] = []
    record = cast(Any, SimpleNamespace(warning=told.append))
    records = DriverRecords(record, console, 3, "a [/run]", cast(Any, None), cast(Any, None))
    with records:
        records.warning(GLOO)
    assert told == [GLOO]
    assert f"warning: {GLOO}\n" in text_of(console)


def test_bars_and_the_commands_own_console_take_any_text() -> None:
    terminal = Console(file=io.StringIO(), width=80, force_terminal=True)
    with bar(terminal) as progress:
        progress.add_task("[/] of 3", total=3)
    with spinner(terminal, "waits for [/tmp/model]"):
        pass
    assert "[/] of 3" in text_of(terminal)
    assert "waits for [/tmp/model]" in text_of(terminal)
    with cli.console.capture() as heard:
        cli.console.print(GLOO, soft_wrap=True)
    assert heard.get() == GLOO + "\n"
