"""The sub-verb `raydistill results report RUN|SWEEP`: one HTML page that can be mailed, printed and kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from raydistill.cli import command_parser
from raydistill.errors import UserError
from raydistill.report.choosing import Runs, add_store_arguments
from raydistill.report.sweep import SWEEP_FILE

EXAMPLES = """\
examples:
  raydistill results report lambda0 -o report.html
        a run by name: summary, curves, who waited for whom, sample completions, settings
  raydistill results report outputs/runs/lambda0
        by its folder, without a store; the page goes to outputs/runs/lambda0/report.html
  raydistill results report rates --output outputs
        the sweep in outputs/sweeps/rates: ranked table, importance of each field, plots

The page is one file: style, script and pictures are in it, and it loads nothing from the network.
"""


def report_command(argv: Sequence[str]) -> int:
    """The sub-verb `report`."""
    parser = command_parser(
        "results report", "Write a run or a sweep as one self-contained HTML page.", EXAMPLES, takes_config=False
    )
    parser.add_argument("what", metavar="RUN|SWEEP", help="name, beginning of an id, or folder of a run or a sweep")
    parser.add_argument(
        "-o", dest="to", type=Path, metavar="HTML", help="default: report.html (page.html) in its folder"
    )
    add_store_arguments(parser)
    arguments = parser.parse_args(argv)
    to: Path | None = arguments.to
    if to is not None and to.is_dir():
        raise UserError(f"-o {to} is a folder; name a file in it: -o {to / 'report.html'}")
    sweep = sweep_folder(arguments.what, arguments.output)
    print(_sweep_report(sweep, to) if sweep else _run_report(arguments.what, Runs(arguments), to))
    return 0


def sweep_folder(wanted: str, output: Path) -> Path | None:
    """The folder of a sweep by its path or its name; None if it is none."""
    for folder in (Path(wanted), output / "sweeps" / wanted):
        if (folder / SWEEP_FILE).is_file():
            return folder
    return None


def _sweep_report(folder: Path, to: Path | None) -> Path:
    from raydistill.report.page import write_whole_text
    from raydistill.report.sweep_page import sweep_page, write_sweep_page

    # Elsewhere: the sweep's folder may be somebody else's, where nothing can be written.
    return write_whole_text(to, sweep_page(folder)) if to else write_sweep_page(folder).page


def _run_report(wanted: str, runs: Runs, to: Path | None) -> Path:
    row = runs.find(wanted)
    lines = runs.record_of(row)
    from raydistill.report.page import write_whole_text
    from raydistill.report.run_page import run_page
    from raydistill.report.run_view import view_of

    here = row.folder if row.folder is not None and row.folder.is_dir() else None
    if to is None and here is None:
        raise UserError(f"the folder of {row.name!r} is not on this machine; say where the page goes: -o report.html")
    folder = row.folder or Path(row.name)
    return write_whole_text(to or folder / "report.html", run_page(view_of(lines, folder)))
