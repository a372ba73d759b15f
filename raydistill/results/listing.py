"""`raydistill results`: what is in the results store, best first; two runs side by side; MLflow's web page.

`--help` and wrong arguments answer at once: mlflow is imported only to read.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raydistill.errors import UserError
from raydistill.results.provenance import scrub
from raydistill.results.store import RECORD_ID_TAG, default_uri, open_client, sqlite_path

DEFAULT_SORT = "evaluate/kl_nats"
SHOWN_METRICS = ("evaluate/exact_match", "evaluate/kl_nats", "evaluate/perplexity")
SHOWN_PARAMS = ("quant.format", "objective.on_policy_fraction", "objective.beta")
_HIGHER_IS_BETTER = ("exact_match", "accuracy", "per_s", "recovered")
_PAGE = 500


def list_runs(
    uri: str, experiment: str | None = None, sort: str = DEFAULT_SORT, limit: int | None = None
) -> list[dict[str, Any]]:
    """Runs with their last metrics, best first by `sort`; runs without that metric come last, newest first."""
    database = sqlite_path(uri)
    if database and not database.exists():
        raise UserError(
            f"there are no results at {database} yet; name the folder of your runs with --output, or start one with "
            "`raydistill demo`"
        )
    client = open_client(uri)
    experiments = client.search_experiments()
    if experiment is not None:
        names = sorted(one.name for one in experiments)
        experiments = [one for one in experiments if one.name == experiment]
        if not experiments:
            raise UserError(f"no experiment {experiment!r} at {scrub(uri)}; there are: {', '.join(names)}")
    ids, runs, page = [one.experiment_id for one in experiments], [], None
    while ids:
        found = client.search_runs(ids, max_results=_PAGE, page_token=page)
        runs += [_row(run) for run in found]
        page = found.token
        if not page:
            break
    return sort_runs(runs, sort)[:limit]


def sort_runs(runs: Sequence[dict[str, Any]], sort: str) -> list[dict[str, Any]]:
    """Best first; what is best follows from the metric's name (exact match up, KL down)."""
    known = {key for run in runs for key in run["metrics"]}
    if runs and sort not in known and sort != DEFAULT_SORT:
        raise UserError(f"no run has the metric {sort!r}; there are: {', '.join(sorted(known))}")
    sign = -1.0 if higher_is_better(sort) else 1.0

    def place(run: dict[str, Any]) -> tuple[float, float]:
        value = run["metrics"].get(sort, math.nan)
        return (math.inf if math.isnan(value) else sign * value, -(run["started_s"] or 0.0))

    return sorted(runs, key=place)


def higher_is_better(metric: str) -> bool:
    """True for exact match, accuracy and speeds; false for KL, loss, perplexity and times."""
    return metric.endswith(_HIGHER_IS_BETTER)


def compare_runs(uri: str, first: str, second: str, experiment: str | None = None) -> dict[str, Any]:
    """Two runs by name or id (a unique beginning of it is enough): settings that differ, metrics side by side."""
    runs = list_runs(uri, experiment)
    return compare(_find(runs, first), _find(runs, second))


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that differ and all metrics, each as (first, second); None where a run lacks one."""

    def pairs(part: str) -> dict[str, tuple[Any, Any]]:
        keys = sorted(set(first[part]) | set(second[part]))
        return {key: (first[part].get(key), second[part].get(key)) for key in keys}

    settings = {key: pair for key, pair in pairs("params").items() if pair[0] != pair[1]}
    return {"runs": (first["name"], second["name"]), "settings": settings, "metrics": pairs("metrics")}


def results_command(argv: Sequence[str] | None = None) -> int:
    """The verb `raydistill results`."""
    arguments = _parser().parse_args(argv)
    uri: str = arguments.uri or default_uri(arguments.output)
    if arguments.ui:
        from raydistill.results.web import serve_page

        return serve_page(uri, arguments.port)
    if arguments.compare:
        found = compare_runs(uri, *arguments.compare, experiment=arguments.experiment)
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
        _print_table([_shown(run) for run in runs], columns)
    else:
        print(f"no runs at {scrub(uri)} yet", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="raydistill results",
        description="List finished and running runs, best first. Metrics are the last ones that a run reported.",
        epilog="examples:\n"
        "  raydistill results --output outputs/demo\n"
        "  raydistill results --sort evaluate/exact_match --limit 5\n"
        "  raydistill results --compare lambda0 lambda1      which settings differ, and what came of it\n"
        "  raydistill results --uri http://mlflow:5000 --json   for scripts\n"
        "  raydistill results --ui                           curves and artifacts in a browser\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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


def _row(run: Any) -> dict[str, Any]:
    info, data = run.info, run.data
    tags = {key: value for key, value in data.tags.items() if not key.startswith("mlflow.") and key != RECORD_ID_TAG}
    return {
        "name": info.run_name,
        "id": info.run_id,
        "status": info.status.lower(),
        "started_s": info.start_time / 1000 if info.start_time else None,
        "seconds": (info.end_time - info.start_time) / 1000 if info.end_time and info.start_time else None,
        "metrics": dict(data.metrics),
        "params": dict(data.params),
        "tags": tags,
    }


def _find(runs: Sequence[dict[str, Any]], wanted: str) -> dict[str, Any]:
    found = [run for run in runs if run["name"] == wanted] or [run for run in runs if run["id"].startswith(wanted)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{len(found)} runs are called {wanted!r}; give an id: {', '.join(run['id'] for run in found)}")
    names = ", ".join(sorted(run["name"] for run in runs)) or "none"
    raise UserError(f"no run is called {wanted!r}; there are: {names}")


def _shown(run: Mapping[str, Any]) -> dict[str, Any]:
    started = run["started_s"]
    when = datetime.datetime.fromtimestamp(started).strftime("%Y-%m-%d %H:%M") if started else ""
    return {"run": run["name"], "status": run["status"], "started": when, **run["metrics"], **run["params"]}


def _print_comparison(found: Mapping[str, Any]) -> None:
    first, second = (f"{place}: {name}" for place, name in zip("AB", found["runs"], strict=True))
    for title, key in (("setting", "settings"), ("metric", "metrics")):
        rows = [{title: name, first: a, second: b} for name, (a, b) in found[key].items()]
        if rows:
            _print_table(rows, [title, first, second])
        else:
            print("all settings are equal" if key == "settings" else "no metrics")


def _print_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    numeric = {column: any(isinstance(row.get(column), float) for row in rows) for column in columns}
    for column in columns:
        table.add_column(column, justify="right" if numeric[column] else "left", overflow="fold")
    for row in rows:
        values = [row.get(column) for column in columns]
        table.add_row(*("-" if v is None else f"{v:.5g}" if isinstance(v, float) else str(v) for v in values))
    Console().print(table)


def _as_json(value: Any) -> str:
    """JSON without NaN, which other programs cannot read."""

    def plain(item: Any) -> Any:
        if isinstance(item, Mapping):
            return {key: plain(one) for key, one in item.items()}
        if isinstance(item, (list, tuple)):
            return [plain(one) for one in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return json.dumps(plain(value), indent=1)
