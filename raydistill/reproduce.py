"""The verb `raydistill reproduce`: run a recorded config again and list what came out differently.

The config, seed and data fingerprint come from the run's record. What is not as it was (data, code revision, package
versions, machine) is listed before the run starts, because it explains differences.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf, isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydistill.cli import command_parser, console, print_table
from raydistill.config import Config
from raydistill.config.fields import config_fields
from raydistill.config.load import load_config, with_values
from raydistill.config.problems import COMMAND_LINE, DEFAULT
from raydistill.errors import UserError
from raydistill.recovery.resume import flat_settings, is_listed
from raydistill.results.provenance import HIDDEN
from raydistill.results.record_lines import evaluations_of, read_record, require_start

if TYPE_CHECKING:
    from pydantic import ValidationError

SUMMARY = """\
Run a recorded config again under a new name and list the differences from the record: versions, losses, held-out metrics.

Fields that do not change the result may be set anew, above all where the recorded ones do not hold here: --results.* (a record
keeps no password), --cluster.*, --run.output, --run.storage, --run.name, --run.verbose.

With sync.max_staleness = 0 in float32 on the same machine and versions nothing differs. Exit code 1 if a loss differs by more
than --tolerance; with --check if the data are not those that were recorded."""
EXAMPLES = """\
examples:
  raydistill reproduce outputs/runs/NAME
        the same settings, data and seed; the new run is outputs/runs/NAME-reproduced
  raydistill reproduce outputs/runs/NAME --check
        only what differs beforehand: data, code, versions, machine
  raydistill reproduce outputs/runs/NAME --cluster.address none --results.uri sqlite:///results.db
        here and not on the cluster that was recorded; results go to another store
  raydistill reproduce outputs/runs/NAME --tolerance 0.01 --json
        for a script that accepts other hardware
"""
CHECKED_FIRST = ("versions", "git", "machine")
COLUMNS = ("what", "recorded", "now")
MAY_BE_SET = ("results.", "cluster.", "run.output", "run.storage", "run.name", "run.verbose")
"""Fields (or, with a dot at the end, sections) that do not change the result."""
MAY_BE_HIDDEN = ("results.uri", "run.storage", "cluster.address")


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One thing that is not as recorded."""

    what: str
    recorded: str
    now: str


def reproduce_command(argv: Sequence[str]) -> int:
    """The verb `reproduce`."""
    arguments, settings = _parser().parse_known_args(list(argv))
    start = require_start(arguments.run)
    config = again(start, arguments.run, values_of(settings))
    from raydistill.results.provenance import collect

    on_the_way = earlier_settings(arguments.run, config)
    data = data_differences(start, config)  # loads torch, without which `collect` sees no GPU
    found = [*on_the_way, *provenance_differences(start["provenance"], collect())]
    if arguments.check:
        print_table([asdict(difference) for difference in (*data, *found)], COLUMNS, json=arguments.json)
        return 1 if data else 0
    for difference in (*data, *found):
        style = "yellow" if difference in (*data, *on_the_way) else "dim"
        console.print(
            f"  {difference.what}: {difference.recorded} then, {difference.now} now", style=style, soft_wrap=True
        )
    refuse_hidden(config)
    from raydistill.launch import run

    summary = run(config, console=console)
    results, largest = result_differences(arguments.run, summary.folder)
    rows = [asdict(difference) for difference in (*found, *results)]
    if rows or arguments.json:
        print_table(rows, COLUMNS, json=arguments.json)
    console.print(f"largest difference of a loss: {largest:.2g} nats; the new run is {summary.folder}", soft_wrap=True)
    return 0 if largest <= arguments.tolerance else 1


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("reproduce", SUMMARY, EXAMPLES, takes_config=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder (outputs/runs/NAME)")
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, metavar="NATS", help="of a step's loss (default: %(default)g)"
    )
    parser.add_argument("--check", action="store_true", help="list what differs before a run and stop")
    parser.add_argument("--json", action="store_true", help="print the differences as JSON on stdout")
    return parser


def values_of(settings: Sequence[str]) -> dict[str, Any]:
    """`--section.field value` arguments by dotted field; UserError for one that would change the result."""
    loaded = load_config(settings)
    given = [name for name in config_fields() if loaded.sources[name] != DEFAULT]
    refused = [name for name in given if not is_listed(name, MAY_BE_SET)]
    if refused:
        allowed = ", ".join(f"{name}*" if name.endswith(".") else name for name in MAY_BE_SET)
        raise UserError(
            f"--{refused[0]} would make another run of it; reproduce takes {allowed} (`raydistill train` takes all)"
        )
    return {name: _value(loaded.config, name) for name in given}


def _value(config: Config, name: str) -> Any:
    section, _, leaf = name.partition(".")
    return getattr(getattr(config, section), leaf)


def refuse_hidden(config: Config) -> None:
    """UserError where an address lacks its password, which no record keeps."""
    for name in MAY_BE_HIDDEN:
        if HIDDEN in str(_value(config, name)):
            raise UserError(
                f"the record keeps {name}={_value(config, name)} without its password; give it whole with --{name}, or "
                f"--{name} none"
            )


def earlier_settings(run: Path, config: Config) -> list[Difference]:
    """What was set otherwise until the run went on with what is recorded now; it explains differences of those steps."""
    now = flat_settings(config.model_dump(mode="json"))
    return [
        Difference(what=f"{name} until step {line['step']}", recorded=str(change["was"]), now=str(now.get(name)))
        for line in read_record(run)
        if line["kind"] == "resume" and line["step"] > 0
        for name, change in line.get("changed", {}).items()
        if not is_listed(name, (*MAY_BE_SET, "run.resume", "checkpoint.", "study.", "world."))
    ]


def again(start: Mapping[str, Any], run: Path, values: Mapping[str, Any] | None = None) -> Config:
    """The recorded settings under a new name, in the same output folder; `values`: dotted fields that are set anew."""
    from pydantic import ValidationError

    settings = {section: dict(fields) for section, fields in start["config"].items()}
    settings["run"] |= {"name": f"{run.absolute().name}-reproduced", "resume": "never"}
    settings["run"]["output"] = run.absolute().parent.parent
    settings["world"] = {"name": "none"}  # its files are named by path already
    try:
        config = Config.model_validate(settings)
    except ValidationError as error:
        raise UserError(f"the settings in {run}'s record do not fit this version: {_first(error)}") from error
    return with_values(config, values or {}, COMMAND_LINE)


def _first(error: ValidationError) -> str:
    problem = error.errors()[0]
    return f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}"


def provenance_differences(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """Code, packages and machine, where they are not as recorded."""
    from raydistill.results.translate import flatten

    then, today = (flatten({key: facts.get(key) for key in CHECKED_FIRST}) for facts in (recorded, now))
    return _differences(then, today)


def data_differences(start: Mapping[str, Any], config: Config) -> list[Difference]:
    """The data fingerprint, if rows, template or tokenizer give other token ids than those that were trained on."""
    from rich.console import Console

    from raydistill.inputs import load_inputs

    recorded, now = start.get("data_fingerprint"), load_inputs(config, Console(quiet=True)).data.fingerprint
    return [] if recorded == now else [Difference(what="data fingerprint", recorded=str(recorded), now=now)]


def result_differences(recorded: Path, now: Path) -> tuple[list[Difference], float]:
    """Steps, losses, data and held-out metrics that differ, and the largest difference of a step's loss."""
    before, after = _losses(recorded), _losses(now)
    shared = before.keys() & after.keys()
    gaps = {step: _gap(before[step], after[step]) for step in shared}
    largest = max(gaps.values(), default=float("inf"))
    found = []
    if before.keys() != after.keys():
        found.append(Difference(what="steps", recorded=str(len(before)), now=str(len(after))))
        largest = float("inf")
    if any(gaps.values()):
        first = min(step for step, gap in gaps.items() if gap)
        found.append(
            Difference(what=f"loss, from step {first}", recorded=f"{before[first]:.9g}", now=f"{after[first]:.9g}")
        )
    fingerprints = [require_start(run).get("data_fingerprint") for run in (recorded, now)]
    pairs = {"data fingerprint": fingerprints} | _metric_pairs(recorded, now)
    found += _differences({k: str(a) for k, (a, _) in pairs.items()}, {k: str(b) for k, (_, b) in pairs.items()})
    return found, largest


def _gap(recorded: float, now: float) -> float:
    """Between two losses. A step that was skipped may have NaN: the same as another NaN, as far as can be from a number."""
    if recorded == now or (isnan(recorded) and isnan(now)):
        return 0.0
    gap = abs(recorded - now)
    return inf if isnan(gap) else gap


def _metric_pairs(recorded: Path, now: Path) -> dict[str, list[Any]]:
    before, after = evaluations_of(recorded), evaluations_of(now)
    return {
        f"{name} of version {version}": [metrics.get(name), after.get(version, {}).get(name)]
        for version, metrics in before.items()
        for name in metrics
    }


def _losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["metrics"]["trainer/loss"] for line in read_record(run) if line["kind"] == "step"}


def _differences(recorded: Mapping[str, str], now: Mapping[str, str]) -> list[Difference]:
    names = sorted(recorded.keys() | now.keys())
    return [
        Difference(what=name, recorded=recorded.get(name, "-"), now=now.get(name, "-"))
        for name in names
        if recorded.get(name) != now.get(name)
    ]
