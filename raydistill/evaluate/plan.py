"""What `raydistill evaluate` will do: switches first, then what the runs among the targets recorded.

Light: everything that can be refused without a model is refused here, before anything heavy is imported.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raydistill.config import DataSection
from raydistill.errors import DataError, ModelError, UserError
from raydistill.evaluate.arguments import DEFAULT_BLOCK, DEFAULT_STRIDE, DEFAULT_WINDOW
from raydistill.evaluate.harness_tasks import TaskRequest, known_tasks
from raydistill.evaluate.rows import HeldOutRows, rows_of_file, rows_of_run
from raydistill.evaluate.run_defaults import RunDefaults
from raydistill.evaluate.targets import Target, find_targets, template_of

if TYPE_CHECKING:
    from raydistill.evaluate.folders import EngineName, ExactMatch

DEFAULT_NEW_TOKENS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRequest:
    """What `--text` and its companions ask for."""

    files: tuple[Path, ...]
    column: str
    convention: Literal["sliding", "blocks"]
    window: int
    stride: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything a comparison needs, resolved from arguments and records before anything heavy is imported."""

    targets: list[Target]
    teacher: str | None  # None: no KL
    rows: HeldOutRows | None  # None: only texts and tasks
    section: DataSection | None  # the run's rules for its rows; None for a file of its own
    template: Mapping[str, Any] | None  # variables of the chat template for such a file, and for tasks
    fingerprint: str | None  # of the run's rows as it recorded them
    temperature: float  # at which the run compared its student with the teacher
    exact_match: ExactMatch
    is_classification: bool
    max_new_tokens: int  # of exact match
    texts: TextRequest | None
    tasks: TaskRequest | None
    max_length: int | None  # of a task's sequence
    engine: EngineName


def make_plan(switches: argparse.Namespace) -> Plan:
    """A UserError for what is wrong, and for what is still missing."""
    _check_switches(switches)
    targets, runs = find_targets(switches.targets, switches.base, switches.every_checkpoint)
    for run in runs:
        _check_there(run, switches)
    texts, tasks = _texts(switches), task_request(switches)
    section = _agreed(runs, lambda run: run.data, "held-out rows", "--data FILE") if switches.data is None else None
    rows = _rows(switches, section)
    if rows is None and (switches.classify or switches.exact_match == "final_number"):
        raise DataError("--classify and --exact-match are measured on rows: give --data FILE")
    if rows is None and texts is None and tasks is None:
        raise DataError(
            "nothing to measure on: give rows with --data FILE (a run's folder or `raydistill export` of one brings its own), "
            "text with --text FILE, or tasks with --tasks NAME,..."
        )
    teacher = switches.teacher or _agreed(runs, lambda run: run.teacher, "teachers", "--teacher MODEL")
    has_more = texts is not None or tasks is not None or switches.classify or switches.exact_match == "final_number"
    if teacher is None and not has_more:
        raise ModelError(
            "no teacher to compare with: give --teacher MODEL (a run's folder or `raydistill export` of one brings its own)"
        )
    evaluation = runs[0].evaluation if runs else None
    default_match: ExactMatch = evaluation.exact_match if evaluation and not switches.classify else "off"
    return Plan(
        targets=targets,
        teacher=teacher,
        rows=rows,
        section=section,
        template=template_of(targets, runs) if section is None else section.template,
        fingerprint=None if section is None else runs[0].held_out_fingerprint,
        temperature=_agreed(runs, lambda run: run.temperature, "temperatures", "one run at a time") or 1.0,
        exact_match=switches.exact_match or default_match,
        is_classification=switches.classify,
        max_new_tokens=switches.max_new_tokens or (evaluation.max_new_tokens if evaluation else DEFAULT_NEW_TOKENS),
        texts=texts,
        tasks=tasks,
        max_length=switches.max_length,
        engine=switches.engine,
    )


def _check_switches(switches: argparse.Namespace) -> None:
    """Switches that have no effect, and files that cannot be written."""
    for needed, companions in (
        ("text", ("text_column", "window", "stride", "blocks")),
        ("tasks", ("task_data", "num_fewshot", "limit", "chat_template", "max_length")),
        ("every_checkpoint", ("plot",)),
        ("record", ("output",)),
    ):
        given = next((name for name in companions if getattr(switches, name) not in (None, False)), None)
        if given is not None and not getattr(switches, needed):
            raise UserError(f"{_switch(given)} has no effect without {_switch(needed)}; add it, or leave both out")
    for name in ("per_row", "plot"):
        path: Path | None = getattr(switches, name)
        if path is not None and path.is_dir():
            example = "rows.jsonl" if name == "per_row" else "curve.png"
            raise UserError(f"{_switch(name)} {path} is a folder; name a file, such as {path / example}")


def _switch(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _texts(switches: argparse.Namespace) -> TextRequest | None:
    if not switches.text:
        return None
    missing = next((path for path in switches.text if not path.is_file()), None)
    if missing is not None:
        raise DataError(f"--text {missing} is no file; give a text file, or JSONL or Parquet with a column of texts")
    if switches.blocks and switches.stride:
        raise UserError("--stride has no effect with --blocks, which lie side by side; leave one of them out")
    window = switches.window or (DEFAULT_BLOCK if switches.blocks else DEFAULT_WINDOW)
    stride = switches.stride or min(DEFAULT_STRIDE, max(1, window // 2))
    if window < 2 or (stride >= window and not switches.blocks):
        raise UserError(
            f"--window {window} with --stride {stride} leaves tokens without context; give a stride below the window, or "
            "--blocks for windows side by side"
        )
    names = [path.name for path in switches.text]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"two --text files are called {twice}, as their columns would be; rename one")
    return TextRequest(
        files=tuple(switches.text),
        column=switches.text_column or "text",
        convention="blocks" if switches.blocks else "sliding",
        window=window,
        stride=stride,
    )


def task_request(switches: argparse.Namespace) -> TaskRequest | None:
    """What `--tasks` and its companions say; UserError for a name that no task has."""
    if switches.tasks is None:
        return None
    names = tuple(dict.fromkeys(name.strip() for name in switches.tasks.split(",") if name.strip()))
    if not names:
        raise UserError("--tasks names no task; give some, such as --tasks hellaswag,arc_easy")
    return TaskRequest(
        names=names,
        known=known_tasks(names, switches.task_data),
        data=switches.task_data,
        num_fewshot=switches.num_fewshot,
        limit=switches.limit,
        max_new_tokens=switches.max_new_tokens,
        is_chat=switches.chat_template,
    )


def _rows(switches: argparse.Namespace, section: DataSection | None) -> HeldOutRows | None:
    if switches.data is not None:
        return rows_of_file(switches.data, switches.rows)
    if section is not None:
        return rows_of_run(section, switches.rows)
    if switches.rows is not None:
        raise DataError("--rows chooses among rows, and there are none: give --data FILE")
    return None


def _check_there(run: RunDefaults, switches: argparse.Namespace) -> None:
    """What the run used and the switches do not replace must still be where it was."""
    rows = run.data.eval_path or run.data.path
    if switches.data is None and rows is not None and not rows.exists():
        raise DataError(f"the held-out rows of run {run.run} were in {rows}, which is not there; give --data FILE")
    if switches.teacher is None and run.teacher and Path(run.teacher).is_absolute() and not Path(run.teacher).exists():
        raise ModelError(f"the teacher of run {run.run} was {run.teacher}, which is not there; give --teacher MODEL")


def _agreed(runs: Sequence[RunDefaults], read: Callable[[RunDefaults], Any], what: str, switch: str) -> Any:
    """What all runs recorded; None without runs, a UserError where they differ."""
    for run in runs[1:]:
        if read(run) != read(runs[0]):
            raise UserError(f"runs {runs[0].run} and {run.run} have different {what}; say which to use with {switch}")
    return read(runs[0]) if runs else None
