"""The verb `raydistill results`: list runs, compare two, serve MLflow's page.

`--help` and wrong arguments answer at once: mlflow is imported only to read.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raydistill.cli import command_parser, console, print_table
from raydistill.results.provenance import scrub
from raydistill.results.query import DEFAULT_SORT, compare_runs, list_runs
from raydistill.results.store import default_uri

__all__ = ["compare_runs", "list_runs", "results_command"]
SHOWN_METRICS = ("evaluate/exact_match", "evaluate/kl_nats", "evaluate/perplexity")
SHOWN_PARAMS = ("quant.format", "objective.on_policy_fraction", "objective.beta")
EXAMPLES = """\
examples:
  raydistill results --output outputs/demo
        the runs of one output folder, best first by KL to the teacher
  raydistill results --sort evaluate/exact_match --limit 5
        the five with the highest exact match
  raydistill results --compare lambda0 lambda1
        which settings differ, and what came of it
  raydistill results --uri http://mlflow:5000 --json
        everything in a store, for scripts
  raydistill results --ui
        curves and artifacts in a browser, on this machine only
"""


def results_command(argv: Sequence[str]) -> int:
    """The verb `raydistill results`."""
    arguments = _parser().parse_args(argv)
    uri: str = arguments.uri or default_uri(arguments.output)
    if arguments.ui:
        from raydistill.results.web import serve_page

        return serve_page(uri, arguments.port)
    if arguments.compare:
        found = compare_runs(uri, arguments.compare[0], arguments.compare[1], arguments.experiment)
        if arguments.json:
            print(_as_json(found))
        else:
            _print_comparison(found)
        return 0
    runs = list_runs(uri, arguments.experiment, arguments.sort, arguments.limit)
    if arguments.json:
        print(_as_json(runs))
    elif runs:
        columns = ["run", "status", "started", *dict.fromkeys([arguments.sort, *SHOWN_METRICS]), *SHOWN_PARAMS]
        print_table([_shown(run) for run in runs], columns)
    else:
        console.print(f"no runs at {scrub(uri)} yet")
    return 0


def _parser() -> argparse.ArgumentParser:
    summary = "List finished and running runs, best first. Metrics are the last ones that a run reported."
    parser = command_parser("results", summary, EXAMPLES, takes_config=False)
    parser.add_argument(
        "--output", type=Path, default=Path("outputs"), help="run.output of the runs (default: %(default)s)"
    )
    parser.add_argument("--uri", help="MLflow tracking URI, if results.uri was set; default: results.db under --output")
    parser.add_argument("--experiment", help="only this MLflow experiment (results.experiment of the runs)")
    parser.add_argument(
        "--sort", default=DEFAULT_SORT, metavar="METRIC", help="best first by this metric (default: %(default)s)"
    )
    parser.add_argument("--limit", type=int, help="show at most this many runs")
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="two runs by name or id: differing settings, metrics side by side",
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    parser.add_argument("--ui", action="store_true", help="serve MLflow's page on 127.0.0.1 until Ctrl-C")
    parser.add_argument("--port", type=int, default=5000, help="port of --ui (default: %(default)s)")
    return parser


def _shown(run: Mapping[str, Any]) -> dict[str, Any]:
    started = run["started_s"]
    when = datetime.datetime.fromtimestamp(started).strftime("%Y-%m-%d %H:%M") if started else ""
    return {"run": run["name"], "status": run["status"], "started": when, **run["metrics"], **run["params"]}


def _print_comparison(found: Mapping[str, Any]) -> None:
    first, second = (f"{place}: {name}" for place, name in zip("AB", found["runs"], strict=True))
    for title, key in (("setting", "settings"), ("metric", "metrics")):
        rows = [{title: name, first: a, second: b} for name, (a, b) in found[key].items()]
        if rows:
            print_table(rows, [title, first, second])
        else:
            print("all settings are equal" if key == "settings" else "no metrics")


def _as_json(value: Any) -> str:
    """JSON without NaN, which other programs cannot read."""

    def plain(item: Any) -> Any:
        if isinstance(item, Mapping):
            return {key: plain(one) for key, one in item.items()}
        if isinstance(item, (list, tuple)):
            return [plain(one) for one in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return json.dumps(plain(value), indent=2)
