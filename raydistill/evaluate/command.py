"""The verb `raydistill evaluate`: one comparison table of finished models, measured on the same held-out rows.

The table goes to stdout (with `--json` as pure JSON), progress to stderr.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from raydistill.cli import PIPE_WIDTH, command_parser, console, print_table
from raydistill.config import DataSection
from raydistill.errors import DataError, ModelError, UserError
from raydistill.evaluate.paired import RowValues, write_row_values
from raydistill.evaluate.rows import HeldOutRows, encode_held_out, file_section, rows_of_file, rows_of_run
from raydistill.evaluate.targets import RunDefaults, Target, find_targets, template_of
from raydistill.progress import bar
from raydistill.results.tables import SummaryRow, comparison_json, comparison_table

if TYPE_CHECKING:
    from raydistill.evaluate.folders import ExactMatch, OnRows, Progress

DEFAULT_NEW_TOKENS = 128
SUMMARY = """\
Measure finished models against their teacher, each loaded from its folder as it would be shipped: KL to the teacher
(nats per completion token), perplexity of the reference completions, exact match of greedy answers, size in bytes.

A TARGET is an exported student, any transformers model folder, or a run's folder (outputs/runs/NAME), whose export is
measured. A run's record, and an export of `raydistill export`, say what the teacher and the held-out rows were: they are
used while they are where they were and the same. name=FOLDER gives a target a name in the table.
Rows are rendered with the chat template's variables that the student was trained with (data.template).
The teacher's row is measured like any other: its KL is 0 if all is well."""
EXAMPLES = """\
examples:
  raydistill evaluate outputs/runs/int2
        a finished run: its student against its teacher, on the rows it held out
  raydistill evaluate exports/student
        the same numbers from an exported folder alone
  raydistill evaluate ptq=outputs/ptq-int2 student=outputs/runs/int2 --exact-match final_number
        the same beside another folder, with greedy answers compared by the number after ####
  raydistill evaluate exports/int4 --teacher models/qwen3-4b --data test.jsonl --rows 1000
        any folders on any rows: JSONL with {messages: [...]} or {question/prompt, answer}
  raydistill evaluate outputs/runs/* --json > table.json
        for a program: a JSON list with one object for each model
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything a comparison needs, resolved from arguments and records before anything heavy is imported."""

    targets: list[Target]
    teacher: str
    rows: HeldOutRows
    section: DataSection | None  # the run's rules for its rows; None for a file of its own
    template: Mapping[str, Any] | None  # variables of the chat template for such a file
    fingerprint: str | None  # of the run's rows as it recorded them
    temperature: float  # at which the run compared its student with the teacher
    exact_match: ExactMatch
    max_new_tokens: int


def evaluate_command(argv: Sequence[str]) -> int:
    """Run the verb; returns the exit code."""
    switches = _parser().parse_args(list(argv))
    plan = make_plan(switches)
    values: dict[str, Mapping[str, RowValues]] = {}
    with _progress() as say:
        rows = run_plan(plan, say, values.__setitem__)
    if switches.per_row is not None:
        write_row_values(switches.per_row, values)
    if switches.json:
        print_table(comparison_json(rows), [field.name for field in fields(SummaryRow)], json=True)
    else:
        out = Console(highlight=False)
        if not out.is_terminal:
            out.width = PIPE_WIDTH
        out.print(comparison_table(rows))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("evaluate", SUMMARY, EXAMPLES, takes_config=False)
    parser.add_argument("targets", nargs="+", metavar="TARGET", help="a model's or a run's folder, or name=FOLDER")
    parser.add_argument("--teacher", metavar="FOLDER", help="what KL is measured against (default: the run's teacher)")
    parser.add_argument(
        "--data", type=Path, metavar="FILE", help="JSONL of rows to measure on (default: those the run held out)"
    )
    parser.add_argument("--rows", type=_positive, metavar="N", help="measure on at most N rows, the same N every time")
    parser.add_argument(
        "--exact-match",
        choices=("off", "final_number"),
        help="generate answers and compare the number after #### (default: as the run did, else off)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=_positive,
        metavar="N",
        help="an answer is cut here (default: as the run did, else 128)",
    )
    parser.add_argument(
        "--per-row", type=Path, metavar="FILE", help="also write each row's scores, as JSONL, for tests of your own"
    )
    parser.add_argument("--json", action="store_true", help="print the table as JSON on stdout")
    return parser


def make_plan(switches: argparse.Namespace) -> Plan:
    """Switches first, then what the runs among the targets recorded; a UserError for what is still missing."""
    if switches.per_row is not None and switches.per_row.is_dir():
        raise UserError(f"--per-row {switches.per_row} is a folder; name a file, such as {switches.per_row}/rows.jsonl")
    targets, runs = find_targets(switches.targets)
    for run in runs:
        _check_there(run, switches)
    section = _agreed(runs, lambda run: run.data, "held-out rows", "--data FILE") if switches.data is None else None
    if switches.data is not None:
        rows = rows_of_file(switches.data, switches.rows)
    elif section is not None:
        rows = rows_of_run(section, switches.rows)
    else:
        raise DataError(
            "no rows to measure on: give --data FILE (a run's folder or `raydistill export` of one brings its own)"
        )
    teacher = switches.teacher or _agreed(runs, lambda run: run.teacher, "teachers", "--teacher FOLDER")
    if teacher is None:
        raise ModelError(
            "no teacher to compare with: give --teacher FOLDER (a run's folder or `raydistill export` of one brings its own)"
        )
    evaluation = runs[0].evaluation if runs else None
    return Plan(
        targets=targets,
        teacher=teacher,
        rows=rows,
        section=section,
        template=template_of(targets, runs) if section is None else section.template,
        fingerprint=None if section is None else runs[0].held_out_fingerprint,
        temperature=_agreed(runs, lambda run: run.temperature, "temperatures", "one run at a time") or 1.0,
        exact_match=switches.exact_match or (evaluation.exact_match if evaluation else "off"),
        max_new_tokens=switches.max_new_tokens or (evaluation.max_new_tokens if evaluation else DEFAULT_NEW_TOKENS),
    )


def run_plan(plan: Plan, say: Progress, on_rows: OnRows | None = None) -> list[SummaryRow]:
    """Load and measure."""
    say("loading", 0, 1)
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from raydistill.evaluate.folders import evaluate_folders, has_tokenizer
    from raydistill.models import eos_ids
    from raydistill.quant.export_files import model_folder

    disable_progress_bar()
    teacher = model_folder(plan.teacher)
    # As in training, prompts and their ends are the student's, whose template may be another than the teacher's.
    speaker = next((target.folder for target in plan.targets if has_tokenizer(target.folder)), teacher)
    try:
        tokenizer = AutoTokenizer.from_pretrained(speaker)
        config = AutoConfig.from_pretrained(teacher).get_text_config()
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{speaker} has no tokenizer that can be read, or {teacher} no model: {reason}") from error
    positions = int(getattr(config, "max_position_embeddings", None) or 2**31)
    section = plan.section or file_section(positions, plan.template)
    stop_ids = eos_ids(speaker, tokenizer)
    examples, summary = encode_held_out(plan.rows, tokenizer, section, positions, stop_ids, plan.fingerprint)
    at = "" if plan.temperature == 1 else f" at temperature {plan.temperature:g}"
    console.print(f"teacher {teacher}{at}; {summary}", style="dim", markup=False, soft_wrap=True)
    return evaluate_folders(
        plan.targets,
        teacher,
        examples,
        tokenizer,
        plan.exact_match,
        plan.max_new_tokens,
        temperature=plan.temperature,
        progress=say,
        on_rows=on_rows,
    )


def _check_there(run: RunDefaults, switches: argparse.Namespace) -> None:
    """What the run used and the switches do not replace must still be where it was."""
    rows = run.data.eval_path or run.data.path
    if switches.data is None and rows is not None and not rows.exists():
        raise DataError(f"the held-out rows of run {run.run} were in {rows}, which is not there; give --data FILE")
    if switches.teacher is None and run.teacher and Path(run.teacher).is_absolute() and not Path(run.teacher).exists():
        raise ModelError(f"the teacher of run {run.run} was {run.teacher}, which is not there; give --teacher FOLDER")


def _agreed(runs: Sequence[RunDefaults], read: Callable[[RunDefaults], Any], what: str, switch: str) -> Any:
    """What all runs recorded; None without runs, a UserError where they differ."""
    for run in runs[1:]:
        if read(run) != read(runs[0]):
            raise UserError(f"runs {runs[0].run} and {run.run} have different {what}; say which to use with {switch}")
    return read(runs[0]) if runs else None


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar with the time left on a terminal, plain lines elsewhere; on stderr."""
    if not console.is_terminal:
        yield _lines()
        return
    with bar(console) as progress:
        task = progress.add_task("")
        yield lambda what, done, total: progress.update(task, description=what, completed=done, total=total)


def _lines() -> Progress:
    last = ""

    def say(what: str, done: int, total: int) -> None:
        nonlocal last
        if what != last:
            console.print(what, style="dim", markup=False, soft_wrap=True)
        last = what

    return say


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number
