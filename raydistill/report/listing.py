"""The verb `raydistill results`: list runs, and the way to its sub-verbs.

`--help` and wrong arguments answer at once: mlflow is imported only to read.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module

from raydistill.cli import command_parser, console, print_table
from raydistill.errors import UserError
from raydistill.report.choosing import WHERE_HELP, Runs, add_store_arguments
from raydistill.results.names import Field, Names
from raydistill.results.provenance import scrub
from raydistill.results.query import DEFAULT_SORT, sort_runs
from raydistill.results.runs import RunRow

SUB_VERBS: dict[str, tuple[str, str, str]] = {
    "show": (
        "raydistill.report.show",
        "show_command",
        "one run: settings, metrics, tables, warnings, where things lie",
    ),
    "compare": (
        "raydistill.report.compare",
        "compare_command",
        "two or more: what differs, metrics, curves over each other",
    ),
    "export": ("raydistill.report.table_files", "export_command", "all of them as CSV, Parquet or markdown"),
    "report": ("raydistill.report.report", "report_command", "a run or a sweep as one HTML page"),
}
SHOWN_METRICS = ("evaluate/exact_match", "evaluate/kl_nats", "evaluate/perplexity")
SHOWN_SETTINGS = ("quant.format", "objective.on_policy_fraction", "objective.beta")
EXAMPLES = """\
sub-verbs (each has its --help):
  raydistill results show RUN             {show}
  raydistill results compare A B ...      {compare}
  raydistill results export --csv FILE    {export}
  raydistill results report RUN|SWEEP     {report}
A RUN is its name, the beginning of its id, or its folder (outputs/runs/NAME), which needs no store.

examples:
  raydistill results --output outputs/demo
        the runs of one output folder, best first by KL to the teacher
  raydistill results --sort exact_match --limit 5
        the five with the highest exact match
  raydistill results --where 'quant.format = "int2" and learning_rate > 1e-4 and tags.owner = me'
        settings, metrics and tags: =, !=, <, <=, >, >= joined by `and`; short names where one thing alone has them
  raydistill results --columns run,learning_rate,kl,exact_match,seconds
        what is shown of each
  raydistill results --uri http://mlflow:5000 --json
        everything in a store, for scripts
  raydistill results --ui
        curves and artifacts in a browser, on this machine only
"""


def results_command(argv: Sequence[str]) -> int:
    """The verb `raydistill results`."""
    if argv and not argv[0].startswith("-"):
        return _sub_verb(argv[0])(argv[1:])
    arguments = _parser().parse_args(argv)
    runs = Runs(arguments)
    if arguments.ui:
        from raydistill.report.web import serve_page

        return serve_page(runs.uri, arguments.port)
    found = sort_runs(runs.matching(arguments.where), arguments.sort)[: arguments.limit]
    if arguments.json:
        print(json.dumps([run.to_json() for run in found], indent=2, allow_nan=False))
    elif found:
        columns = columns_of(found, arguments.columns, arguments.sort)
        print_table([cells_of(run, columns) for run in found], [column.label for column in columns])
    else:
        console.print(f"no runs at {scrub(runs.uri)}{' that are so' if arguments.where else ' yet'}")
    return 0


def _sub_verb(name: str) -> Callable[[Sequence[str]], int]:
    if name not in SUB_VERBS:
        near = get_close_matches(name, SUB_VERBS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(SUB_VERBS)}"
        raise UserError(f"`raydistill results` has no sub-verb {name!r}; {hint}")
    module, function, _ = SUB_VERBS[name]
    command: Callable[[Sequence[str]], int] = getattr(import_module(module), function)
    return command


def _parser() -> argparse.ArgumentParser:
    summary = "List finished and running runs, best first. Metrics are the last ones that a run reported."
    examples = EXAMPLES.format(**{name: text for name, (_, _, text) in SUB_VERBS.items()})
    parser = command_parser("results", summary, examples, takes_config=False)
    add_store_arguments(parser)
    parser.add_argument("--where", metavar="FILTER", help=WHERE_HELP)
    parser.add_argument(
        "--sort",
        default=DEFAULT_SORT,
        metavar="NAME",
        help="best first by this metric or setting (default: %(default)s)",
    )
    parser.add_argument("--columns", metavar="A,B,...", help="what to show: settings, metrics, tags, run, status, ...")
    parser.add_argument("--limit", type=int, help="show at most this many runs")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    parser.add_argument("--ui", action="store_true", help="serve MLflow's page on 127.0.0.1 until Ctrl-C")
    parser.add_argument("--port", type=int, default=5000, help="port of --ui (default: %(default)s)")
    return parser


def columns_of(runs: Sequence[RunRow], chosen: str | None, sort: str = DEFAULT_SORT) -> list[Field]:
    """What `--columns` names; without it the usual ones, and what is sorted by."""
    names = Names(runs)
    if chosen is not None:
        return [names.find(name.strip()) for name in chosen.split(",") if name.strip()]
    by = [names.find(sort)] if sort in names.metrics or sort != DEFAULT_SORT else []
    usual = [Field(kind="fact", key=key) for key in ("run", "status", "started")]
    metrics = [Field(kind="metric", key=key) for key in SHOWN_METRICS]
    return list(dict.fromkeys([*usual, *by, *metrics, *(Field(kind="setting", key=key) for key in SHOWN_SETTINGS)]))


def cells_of(run: RunRow, columns: Sequence[Field]) -> dict[str, object]:
    """One run's values by column; a list as text."""
    values = {column.label: column.of(run) for column in columns}
    return {label: ", ".join(map(str, value)) if isinstance(value, list) else value for label, value in values.items()}
