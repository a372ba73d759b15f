"""The verb `raydistill watch RUN`: a run in the terminal while it trains, read from its record alone."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from raydistill.cli import command_parser
from raydistill.errors import UserError
from raydistill.report.watch_state import WatchState
from raydistill.results.follow import RecordFollower
from raydistill.results.record_lines import RECORD_FILE, require_start
from raydistill.results.run_folders import run_folders

SUMMARY = """\
Watch a run: progress, losses, evaluations, who is busy and who waits, warnings, the last sample completions.
Reads the run's record and nothing else, so it works from any machine that sees the folder. Ends when the run ends; Ctrl-C
leaves the run alone."""
EXAMPLES = """\
examples:
  raydistill watch --output outputs/demo
        the newest run of an output folder
  raydistill watch lambda0
        outputs/runs/lambda0
  raydistill watch /mnt/cluster/outputs/runs/lambda0 --once
        one frame, for scripts and for a look at a finished run
"""
PIPE_WIDTH = 110


def watch_command(argv: Sequence[str]) -> int:
    """The verb `watch`."""
    parser = command_parser("watch", SUMMARY, EXAMPLES, takes_config=False)
    parser.add_argument(
        "run", nargs="?", metavar="RUN", help="name of a run under --output, or its folder (default: the newest)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("outputs"), help="run.output of the runs (default: %(default)s)"
    )
    parser.add_argument("--once", action="store_true", help="print one frame and leave")
    parser.add_argument(
        "--every", type=float, default=1.0, metavar="SECONDS", help="between two looks (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    if not arguments.every > 0:
        raise UserError(f"--every {arguments.every:g} is no time to wait; use a number of seconds above 0")
    folder = folder_of(arguments.run, arguments.output)
    try:
        _follow(folder, arguments.once, arguments.every)
    except KeyboardInterrupt:
        return 0  # the usual way to leave
    return 0


def folder_of(run: str | None, output: Path) -> Path:
    """The folder of a run by its path or its name; the one written last where none is named."""
    if run is None:
        folders = run_folders(output)
        if not folders:
            raise UserError(
                f"there is no run in {output / 'runs'}; name a run, or the folder of your runs with --output"
            )
        return max(folders, key=lambda folder: (folder / RECORD_FILE).stat().st_mtime)
    folder = next((path for path in (Path(run), output / "runs" / run) if (path / RECORD_FILE).is_file()), None)
    if folder is None:
        folder = Path(run) if "/" in run else output / "runs" / run
        require_start(folder)  # which raises, naming the run that comes near
    return folder


def _follow(folder: Path, once: bool, every_s: float) -> None:
    from rich.console import Console
    from rich.live import Live

    from raydistill.report.watch_frame import frame

    follower, state = RecordFollower(folder), WatchState()
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)

    def look() -> None:
        nonlocal state
        begins_anew, lines = follower.new_lines()
        state = WatchState() if begins_anew else state
        state.add(lines)

    look()
    if once:
        console.print(frame(state, folder, time.time()))
        return
    with Live(frame(state, folder, time.time()), console=console, auto_refresh=False) as live:
        while state.end is None:
            time.sleep(every_s)
            look()
            live.update(frame(state, folder, time.time()), refresh=True)
