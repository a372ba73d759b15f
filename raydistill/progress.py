"""What commands say while they work: lines, and bars and spinners, which leave no trace on a console that is no terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def say(console: Console, text: str, style: str | None = None) -> None:
    """A line that may quote others, an error of gloo's for example: no bracket in it is markup, and nothing is cut."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def bar(console: Console) -> Progress:
    """A bar with what is done now, the time so far and the time left; `with bar(console) as progress: ...`."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn(), TextColumn("eta"))
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def spinner(console: Console, text: str) -> Iterator[None]:
    """For work whose length nobody knows: what is waited for, and for how long already."""
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        progress.add_task(text, total=None)
        yield
