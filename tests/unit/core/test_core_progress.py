"""Lines that quote others reach the console as they are."""

import io
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import MagicMock

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


def test_the_last_line_of_a_bar_is_whole_in_a_jobs_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    title = "20261122-070157-student-of-a-long-name"
    record, keeper = cast(Any, MagicMock()), cast(Any, MagicMock())
    metrics = cast(Any, SimpleNamespace(queue_depths=dict, step=lambda *_: None))
    with DriverRecords(record, cli.open_console(stderr=True), 1, title, keeper, metrics) as records:
        records.step(cast(Any, SimpleNamespace(step=0)), {"trainer/loss": 0.25, "rollout/completion_tokens": 28.0})
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(title)
    assert last.rstrip().endswith("loss 0.2500, 28 tokens/completion")
    assert "1/1" in last
    assert "…" not in last
