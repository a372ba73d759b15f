"""The sub-verb `raydistill results export`: runs as a table for other programs."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raydistill.cli import command_parser, console
from raydistill.errors import UserError
from raydistill.report.choosing import WHERE_HELP, Runs, add_store_arguments
from raydistill.report.listing import columns_of
from raydistill.results.names import Field, Names
from raydistill.results.query import DEFAULT_SORT, sort_runs

EXAMPLES = """\
examples:
  raydistill results export --csv runs.csv
        every run with all its settings, metrics and tags
  raydistill results export --where 'quant.format = int2' --markdown - --columns run,learning_rate,kl
        a table for a README, on stdout
  raydistill results export --parquet runs.parquet
        with types, for pandas or DuckDB
"""


def export_command(argv: Sequence[str]) -> int:
    """The sub-verb `export`."""
    parser = command_parser("results export", "Write runs as a table, best first.", EXAMPLES, takes_config=False)
    parser.add_argument("--csv", metavar="FILE", help="comma-separated; - for stdout")
    parser.add_argument("--parquet", metavar="FILE", help="Apache Parquet")
    parser.add_argument("--markdown", metavar="FILE", help="the columns that `raydistill results` shows; - for stdout")
    add_store_arguments(parser)
    parser.add_argument("--where", metavar="FILTER", help=WHERE_HELP)
    parser.add_argument(
        "--sort", default=DEFAULT_SORT, metavar="NAME", help="best first by this (default: %(default)s)"
    )
    parser.add_argument("--columns", metavar="A,B,...", help="only these")
    arguments = parser.parse_args(argv)
    wanted = {kind: getattr(arguments, kind) for kind in ("csv", "parquet", "markdown")}
    if not any(wanted.values()):
        raise UserError("say which file to write: --csv FILE, --parquet FILE or --markdown FILE")
    for path in filter(None, wanted.values()):
        if path != "-" and not Path(path).absolute().parent.is_dir():
            raise UserError(
                f"there is no folder {Path(path).absolute().parent}; make it, or name another file than {path}"
            )
        if Path(path).is_dir():
            raise UserError(f"{path} is a folder; name a file, such as {Path(path) / 'runs.csv'}")
    runs = sort_runs(Runs(arguments).matching(arguments.where), arguments.sort)
    shown = columns_of(runs, arguments.columns, arguments.sort)
    everything = shown if arguments.columns else Names(runs).fields()
    for kind, path in wanted.items():
        if path:
            columns = shown if kind == "markdown" else everything
            _WRITERS[kind]([{column.label: column.of(run) for column in columns} for run in runs], columns, path)
    if files := [path for path in wanted.values() if path and path != "-"]:
        console.print(f"{len(runs)} runs: {', '.join(files)}", style="dim")
    return 0


def write_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[Field], path: str) -> None:
    """Full precision; lists and tables as JSON, what a run lacks as an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [column.label for column in columns], lineterminator="\n")
    writer.writeheader()
    writer.writerows([{label: _cell(value) for label, value in row.items()} for row in rows])
    _write(text.getvalue(), path)


def write_markdown(rows: Sequence[Mapping[str, Any]], columns: Sequence[Field], path: str) -> None:
    """Numbers to four digits, right-aligned where a column has nothing else."""
    labels = [column.label for column in columns]
    numeric = [all(isinstance(row[label], (int, float, type(None))) for row in rows) for label in labels]
    lines = ["| " + " | ".join(labels) + " |", "|" + "|".join("---:" if number else "---" for number in numeric) + "|"]
    for row in rows:
        cells = [f"{row[label]:.4g}" if isinstance(row[label], float) else _cell(row[label]) for label in labels]
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    _write("\n".join(lines) + "\n", path)


def write_parquet(rows: Sequence[Mapping[str, Any]], columns: Sequence[Field], path: str) -> None:
    """Typed columns; one whose values have several types (a group size of 32, and "channel") becomes text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = {}
    for column in columns:
        values = [_cell(row[column.label], empty=None) for row in rows]
        kinds = {type(value) for value in values if value is not None}
        if kinds == {int, float}:
            values = [None if value is None else float(value) for value in values]
        elif len(kinds) > 1:
            values = [None if value is None else str(value) for value in values]
        table[column.label] = pa.array(values)
    pq.write_table(pa.table(table), path)


_WRITERS = {"csv": write_csv, "parquet": write_parquet, "markdown": write_markdown}


def _cell(value: Any, empty: Any = "") -> Any:
    if value is None:
        return empty
    return json.dumps(value) if isinstance(value, (list, dict)) else value


def _write(text: str, path: str) -> None:
    if path == "-":
        sys.stdout.write(text)
    else:
        Path(path).write_text(text)
