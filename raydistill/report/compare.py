"""The sub-verb `raydistill results compare A B ...`: which settings differ, the metrics, the curves over each other."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raydistill.cli import command_parser, console, print_table
from raydistill.errors import UserError
from raydistill.report.choosing import Runs, add_store_arguments
from raydistill.results.record_lines import Line
from raydistill.results.runs import RunRow

EXAMPLES = """\
examples:
  raydistill results compare lambda0 lambda1
        settings that differ, metrics side by side; the curves go to outputs/plots/compare.png
  raydistill results compare lr-1e-4 lr-3e-4 lr-1e-3 --plot lr.png
        any number of runs
  raydistill results compare outputs/runs/a elsewhere/runs/b --json
        by folder, without a store
"""
NOT_COMPARED = ("run.name",)  # of no run the same, and told above each column


def compare_command(argv: Sequence[str]) -> int:
    """The sub-verb `compare`."""
    summary = "Compare runs: settings that differ, metrics side by side, and a picture of their curves."
    parser = command_parser("results compare", summary, EXAMPLES, takes_config=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="name, beginning of an id, or folder")
    add_store_arguments(parser)
    parser.add_argument("--plot", type=Path, metavar="PNG", help="default: plots/compare.png under --output")
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    arguments = parser.parse_args(argv)
    if len(arguments.runs) < 2:
        raise UserError(f"there is nothing to compare {arguments.runs[0]!r} with; name two runs or more")
    runs = Runs(arguments)
    found = [runs.find(name) for name in arguments.runs]
    titles = titles_of(found)
    comparison = compare(dict(zip(titles, found, strict=True)))
    picture = _draw(
        runs, dict(zip(titles, found, strict=True)), arguments.plot or arguments.output / "plots" / "compare.png"
    )
    if arguments.json:
        print(json.dumps(comparison | {"plot": str(picture) if picture else None}, indent=2, allow_nan=False))
        return 0
    for title, part in (("setting", "settings"), ("metric", "metrics")):
        rows = [{title: name, **values} for name, values in comparison[part].items()]
        if rows:
            print_table(rows, [title, *titles])
        else:
            print("all settings are equal" if part == "settings" else "no metrics")
    if picture:
        print(f"curves: {picture}")
    return 0


def titles_of(runs: Sequence[RunRow]) -> list[str]:
    """A name for each column; runs of one name are told apart by their ids."""
    names = [run.name for run in runs]
    titles = [
        name if names.count(name) == 1 else f"{name} ({run.id[:8]})" for name, run in zip(names, runs, strict=True)
    ]
    twice = next((title for title in titles if titles.count(title) > 1), None)
    if twice is not None:
        raise UserError(f"{twice} is named twice; compare a run with another one")
    return titles


def compare(runs: Mapping[str, RunRow]) -> dict[str, Any]:
    """Settings that differ and all metrics, each as {title: value}; None where a run lacks one (or it is not finite)."""

    def table(of: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        keys = list(dict.fromkeys(key for values in of.values() for key in values))
        return {key: {title: _plain(values.get(key)) for title, values in of.items()} for key in keys}

    settings = table({title: run.settings for title, run in runs.items()})
    differing = {
        key: values
        for key, values in settings.items()
        if key not in NOT_COMPARED and any(value != next(iter(values.values())) for value in values.values())
    }
    metrics = table({title: run.metrics for title, run in runs.items()})
    return {"runs": list(runs), "settings": differing, "metrics": dict(sorted(metrics.items()))}


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _draw(runs: Runs, chosen: Mapping[str, RunRow], path: Path) -> Path | None:
    """The curves of those runs whose record can be read."""
    from raydistill.report.curves import plot_curves

    records: dict[str, list[Line]] = {}
    for title, run in chosen.items():
        try:
            records[title] = runs.record_of(run)
        except UserError as error:
            console.print(f"no curves of {title}: {error}", style="yellow")
    return plot_curves(records, path) if records else None
