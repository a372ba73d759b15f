"""The sub-verb `raydistill results show RUN`: one run in the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from raydistill.cli import command_parser, print_table
from raydistill.errors import UserError
from raydistill.report.choosing import Runs, add_store_arguments
from raydistill.report.run_view import RunView, view_of
from raydistill.report.summary import ending
from raydistill.results.runs import RunRow

EXAMPLES = """\
examples:
  raydistill results show lambda0
        by name
  raydistill results show 3fd1
        by the beginning of its id in the store, which `raydistill results --columns run,id` shows
  raydistill results show outputs/runs/lambda0 --json
        by its folder, without a store
"""


def show_command(argv: Sequence[str]) -> int:
    """The sub-verb `show`."""
    summary = (
        "Everything about one run: how it ended, settings that are not the default, metrics, tables, warnings, files."
    )
    parser = command_parser("results show", summary, EXAMPLES, takes_config=False)
    parser.add_argument("run", metavar="RUN", help="name, beginning of an id, or folder")
    add_store_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    arguments = parser.parse_args(argv)
    runs = Runs(arguments)
    row = runs.find(arguments.run)
    try:
        view = view_of(runs.record_of(row), row.folder or arguments.output)
    except UserError as error:
        raise UserError(
            f"{error}. What the store knows: `raydistill results --where 'id = {row.id}' --json`"
        ) from error
    if arguments.json:
        print(json.dumps(_as_json(row, view), indent=2, allow_nan=False))
    else:
        _print(view)
    return 0


def _print(view: RunView) -> None:
    print(f"{view.name}: {ending(view)}")
    if view.changed_settings:
        rows = [
            {"setting": name, "value": _text(value), "default": _text(default)}
            for name, value, default in view.changed_settings
        ]
        print_table(rows, ["setting", "value", "default"], title="settings that are not the default")
    if view.quality:
        rows = [
            {
                "metric": one.name,
                "first (version)": f"{one.first} ({one.first.version})",
                "best (version)": f"{one.best} ({one.best.version})",
                "last (version)": f"{one.last} ({one.last.version})",
            }
            for one in view.quality
        ]
        print_table(rows, list(rows[0]), title="held-out metrics ± standard error")
    if view.steps:
        last = view.steps[-1]
        rows = [{"metric": name, f"step {last['step']}": value} for name, value in last["metrics"].items()]
        print_table(rows, list(rows[0]), title="training, last step")
    for name, line in view.tables.items():
        if line["rows"]:
            columns = list(dict.fromkeys(key for row in line["rows"] for key in row))
            print_table(
                [{key: _text(row.get(key)) for key in columns} for row in line["rows"]], columns, title=f"table {name}"
            )
    for text in view.warnings:
        print(f"warning: {text}")
    for name, path in {"folder": view.folder, **view.artifacts}.items():
        print(f"{name}: {path}{'' if path.exists() else ' (not there any more)'}")


def _as_json(row: RunRow, view: RunView) -> dict[str, Any]:
    return row.to_json() | {
        "ending": ending(view),
        "changed_settings": {
            name: {"value": value, "default": default} for name, value, default in view.changed_settings
        },
        "held_out": [
            {
                "metric": one.name,
                **{
                    when: {"version": point.version, "value": _finite(point.value), "se": point.se}
                    for when, point in (("first", one.first), ("best", one.best), ("last", one.last))
                },
            }
            for one in view.quality
        ],
        "tables": {
            name: [{k: _finite(v) for k, v in one.items()} for one in line["rows"]]
            for name, line in view.tables.items()
        },
        "warnings": view.warnings,
        "artifacts": {name: str(path) for name, path in view.artifacts.items()},
    }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _text(value: Any) -> Any:
    """What a table's cell can show: numbers stay numbers."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else json.dumps(value)
