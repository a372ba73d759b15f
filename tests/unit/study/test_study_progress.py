"""What a job's log says while grids are tried."""

from io import StringIO

from rich.console import Console

from raydistill.progress import bar
from raydistill.study.study import _shown


def test_a_log_gets_a_line_for_each_finished_grid_and_none_between() -> None:
    out = StringIO()
    console = Console(file=out, width=80)
    with bar(console) as progress:
        on_progress = _shown(progress, progress.add_task("awq", total=2), 2, console)
        for done in (0.5, 1.0, 1, 1.5, 2):
            on_progress("awq int2-g32", done)
    assert out.getvalue().splitlines() == ["  1 of 2: awq int2-g32", "  2 of 2: awq int2-g32"]


def test_a_terminal_gets_the_bar_alone() -> None:
    out = StringIO()
    console = Console(file=out, width=80, force_terminal=True)
    with bar(console) as progress:
        _shown(progress, progress.add_task("awq", total=1), 1, console)("awq int2-g32", 1)
    assert "1 of 1" not in out.getvalue()
