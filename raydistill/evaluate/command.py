"""The verb `raydistill evaluate`: one comparison table of finished models, measured in the same way.

The table goes to stdout (with `--json` as pure JSON), progress to stderr.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.measure import Measurement

from raydistill.cli import console, open_console, print_table
from raydistill.config import DataSection
from raydistill.errors import DataError, ModelError, RunError
from raydistill.evaluate.arguments import LONGEST_TASK, parser
from raydistill.evaluate.hub import fetch, go_offline_if_unreachable
from raydistill.evaluate.paired import RowValues
from raydistill.evaluate.per_row import write_per_row
from raydistill.evaluate.plan import Plan, TextRequest, make_plan
from raydistill.evaluate.rows import encode_held_out, file_section
from raydistill.evaluate.targets import version_of
from raydistill.progress import bar, say
from raydistill.results.tables import SummaryRow, comparison_json, comparison_table, transposed_table

if TYPE_CHECKING:
    from raydistill.data.encode import Example
    from raydistill.evaluate import measured
    from raydistill.evaluate.folders import OnRows, Progress


def evaluate_command(argv: Sequence[str]) -> int:
    """Run the verb; returns the exit code."""
    started_s = time.time()
    switches = parser().parse_args(list(argv))
    plan = make_plan(switches)
    values: dict[str, Mapping[str, RowValues]] = {}
    with _progress() as progress:
        rows = run_plan(plan, progress, values.__setitem__)
    if switches.json:
        print_table(comparison_json(rows), [field.name for field in fields(SummaryRow)], json=True)
    else:
        print_comparison(rows)
    files: dict[str, Path] = {}
    if switches.every_checkpoint:
        files["checkpoints"] = plot_curve(plan, rows, switches.plot)
        _remark(f"plot: {files['checkpoints']}")
    if switches.per_row is not None:
        write_per_row(switches.per_row, values)
        files["per_row"] = switches.per_row
    if switches.record:
        from raydistill.evaluate.recording import record_evaluation

        _remark(f"recorded in {record_evaluation(plan, switches.output, rows, started_s, files)}")
    return 0


def print_comparison(rows: Sequence[SummaryRow]) -> None:
    """The table on stdout; where a terminal is too narrow for it, with a line for each measure."""
    out = open_console()
    table = comparison_table(rows)
    is_too_wide = Measurement.get(out, out.options.update(width=10_000), table).maximum > out.width
    out.print(transposed_table(rows) if is_too_wide else table)


def plot_curve(plan: Plan, rows: Sequence[SummaryRow], path: Path | None) -> Path:
    """The PNG of `--every-checkpoint`: where it is asked for, or among the run's plots."""
    from raydistill.report.plot_checkpoints import plot_checkpoints

    by_name = {row.name: row for row in rows}
    steps = {version_of(target): by_name[target.name] for target in plan.targets}
    teacher = next((row for row in rows if row.role == "teacher"), None)
    path = path or plan.targets[0].run / "plots" / "checkpoints.png"
    try:
        return plot_checkpoints(steps, teacher, path)
    except OSError as error:
        raise RunError(
            f"{path} cannot be written: {error.strerror or error}; name another place with -o FILE"
        ) from error


def run_plan(plan: Plan, progress: Progress, on_rows: OnRows | None = None) -> list[SummaryRow]:
    """Load and measure."""
    progress("loading", 0, 1)
    if plan.tasks is not None and not plan.tasks.is_local:
        go_offline_if_unreachable()
    teacher = None if plan.teacher is None else _folder(plan.teacher)
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from raydistill.evaluate.folders import evaluate_folders
    from raydistill.evaluate.vocabulary import has_tokenizer, positions_of
    from raydistill.models import eos_ids

    disable_progress_bar()
    # As in training, prompts and their ends are the student's, whose template may be another than the teacher's.
    folders = [target.adapter or target.folder for target in plan.targets]
    folders += [target.folder for target in plan.targets] + ([teacher] if teacher else [])
    speaker = next((folder for folder in folders if has_tokenizer(folder)), None)
    if speaker is None:
        raise ModelError(f"none of the models has a tokenizer ({folders[0]} first); save it beside the weights")
    try:
        tokenizer = AutoTokenizer.from_pretrained(speaker)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{speaker} has no tokenizer that can be read: {str(error).strip().splitlines()[0]}"
        ) from error
    every = {target.folder for target in plan.targets} | ({teacher} if teacher else set())
    positions = min(map(positions_of, every))
    section = plan.section or file_section(positions, plan.template)
    stop_ids = eos_ids(speaker, tokenizer)
    examples: tuple[Example, ...] = ()
    if plan.rows is not None:
        examples, summary = encode_held_out(plan.rows, tokenizer, section, positions, stop_ids, plan.fingerprint)
        at = "" if plan.temperature == 1 else f" at temperature {plan.temperature:g}"
        _remark(f"{'no teacher' if teacher is None else f'teacher {teacher}{at}'}; {summary}")
    measurements = list(_measurements(plan, examples, tokenizer, section, stop_ids, positions))
    return evaluate_folders(
        plan.targets,
        teacher,
        examples,
        tokenizer,
        plan.exact_match if plan.rows is not None else "off",
        plan.max_new_tokens,
        temperature=plan.temperature,
        progress=progress,
        on_rows=on_rows,
        measurements=measurements,
        engine=plan.engine,
    )


def _measurements(
    plan: Plan,
    examples: Sequence[Example],
    tokenizer: Any,
    section: DataSection,
    stop_ids: Sequence[int],
    positions: int,
) -> Iterator[measured.Measurement]:
    """All but KL, perplexity and exact match, which every comparison knows."""
    longest, room = positions, f"{positions} positions that all of these models know"
    if plan.engine == "vllm":  # it scores a sequence only where the next token has room
        longest, room = positions - 1, f"{room} (vLLM needs one of them for the next token)"
    if plan.is_classification:
        from raydistill.evaluate.classify import Classification

        assert plan.rows is not None
        kept = {example.row_id for example in examples}
        chosen = [row for row in plan.rows.rows if row.row_id in kept]
        classification = Classification(chosen, tokenizer, section, stop_ids)
        if classification.max_tokens > longest:
            raise DataError(
                f"--classify: a row with a label has {classification.max_tokens} tokens, which do not fit the {room}; leave "
                f"out rows that have more than {longest} with any of the labels"
            )
        _remark(classification.summary())
        yield classification
    if plan.texts is not None:
        yield from _texts(plan.texts, tokenizer, longest, room)
    if plan.tasks is not None:
        yield _tasks(plan, tokenizer, positions)


def _texts(request: TextRequest, tokenizer: Any, longest: int, room: str) -> Iterator[measured.Measurement]:
    from raydistill.evaluate.text import TextPerplexity, read_text, tokenize

    texts = [(path.name, read_text(path, request.column)) for path in request.files]
    if request.window > longest:
        raise DataError(f"--window {request.window} does not fit the {room}; lower it to {longest} or less")
    for name, text in texts:
        measurement = TextPerplexity(
            tokenize(name, text, tokenizer), request.convention, request.window, request.stride
        )
        _remark(measurement.summary())
        yield measurement


def _tasks(plan: Plan, tokenizer: Any, positions: int) -> measured.Measurement:
    from raydistill.evaluate.harness import HarnessTasks
    from raydistill.evaluate.harness_tasks import load_tasks, without_examples

    assert plan.tasks is not None
    if plan.tasks.is_chat and tokenizer.chat_template is None:
        raise ModelError("--chat-template: the tokenizer has no chat template; leave the switch out")
    longest = positions - 1  # scoring a sequence takes the place of one more token
    if plan.max_length is not None and plan.max_length > longest:
        raise DataError(
            f"--max-length {plan.max_length} does not fit the {positions} positions that all of these models know; lower it "
            f"to {longest} or less"
        )
    tasks = load_tasks(plan.tasks)
    template = (
        (plan.template if plan.template is not None else file_section(1).template) if plan.tasks.is_chat else None
    )
    measurement = HarnessTasks(
        tasks,
        tokenizer,
        template,
        (plan.max_length or min(longest, LONGEST_TASK)) - 1,
        plan.tasks.num_fewshot,
        plan.tasks.limit,
        plan.tasks.max_new_tokens,
    )
    _remark(measurement.summary())
    fixed = without_examples(tasks) if plan.tasks.num_fewshot else []
    if fixed:
        _remark(f"--num-fewshot does not change {', '.join(fixed)}: the definition shows no examples", style="yellow")
    return measurement


def _folder(model: str) -> Path:
    """Of a model given as a folder or as a hub id."""
    return Path(model) if Path(model).is_dir() else fetch(model)


def _remark(text: str, style: str = "dim") -> None:
    say(console, text, style)


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

    def line(what: str, done: int, total: int) -> None:
        nonlocal last
        if what != last:
            _remark(what)
        last = what

    return line
