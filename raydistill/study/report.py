"""What a study leaves behind: the table as text, markdown and JSON, the plot, a summary that stands alone, and an entry of
its own in the results store."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from raydistill.config import Config
from raydistill.config.sections import StudySection
from raydistill.ptq.baselines import METHODS, Baseline
from raydistill.results.tables import COMPARISON, SummaryRow, format_kl
from raydistill.study.arms import devices_of
from raydistill.study.decision import (
    Line,
    Values,
    compare_rows,
    merge_seeds,
    paired_compare,
)
from raydistill.study.decision_table import decision_markdown, missing_lines, num_tests

if TYPE_CHECKING:
    from raydistill.data.dataset import Dataset
    from raydistill.launch import RunSummary

ARM_TEXTS = {
    "student": "the config as it is",
    "gold-ce": "control: cross-entropy on the data set's answers, no teacher",
    "off-policy": "forward KL on the data set's answers",
    "mixed": "half of the completions sampled by the student, generalized Jensen-Shannon divergence",
    "on-policy": "reverse KL on completions sampled by the student",
}
LEGEND = """\
- KL: of the teacher's to the model's next-token distributions over the whole vocabulary, mean over the completion tokens of the
  test rows, in nats; ± one standard error (rows are the sample).
- perplexity: of the reference completions of the same rows; ± by the delta method, rows being the sample. Of several seeds:
  exp of the mean of their logarithms.
- "against": the difference to {reference}, row by row on the same test rows, ± its standard error; negative KL is nearer to the
  teacher. p: two-sided, of no difference to {reference} in what stands before it; right or wrong answers by the exact McNemar
  test, all else (averages over seeds too) by a permutation test, perplexity by its logarithm. Each p stands for itself: of
  {count} comparisons where nothing differs one in twenty falls below 0.05 by chance. The rows are the sample: that another
  training run would come out the same only several seeds can say.
- {reference} is the best plain quantization of the students' width, chosen on the held-out rows, not on the test rows. The
  student that the verdict names is the best one of this table: a choice on the test rows.
- device-s: device-seconds. Of a run: busy time of its rollout, teacher, trainer and evaluation actors by the record's spans, x
  the GPUs of an actor (without any: x its processes); start-up, waiting and steps lost to a crash do not count. Of plain
  quantization: making and scoring all four grids, on one device; training the teacher belongs to nobody.
- size: weights, scales and adapter on the disk, in raydistill's own packing for every quantized row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportInputs:
    """Everything a report is made of."""

    name: str
    folder: Path
    output: Path
    config: Config  # with models, data files and the grid of the students
    data: Dataset
    test_path: Path
    baselines: tuple[Baseline, ...]
    runs: Mapping[str, RunSummary]
    runs_of_arm: Mapping[str, Sequence[str]]
    rows: Sequence[SummaryRow]
    values: Values
    seconds: Mapping[str, float]  # of each stage of this life of the study


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What there is to show."""

    lines: tuple[Line, ...]
    reference: str | None
    verdict: str
    next_steps: str
    seconds: Mapping[str, float]
    files: Mapping[str, Path]  # plots, summary (markdown), table (JSON)
    summary: dict[str, Any]  # what the JSON file holds


def reference_of(baselines: Sequence[Baseline], width: str) -> str | None:
    """The best plain quantization of a width by KL on the rows that chose the grids; None where there is none."""
    there = {
        one.name: one.kl_nats[one.format]  # the chosen grid's: another one's may be NaN
        for one in baselines
        if one.width == width and one.format is not None
    }
    return min(there, key=there.__getitem__) if there else None


def write_report(inputs: ReportInputs, console: Console) -> Report:
    """Table, plots, words; written to the study's folder and recorded."""
    from raydistill.report.plots import plot_bytes_kl
    from raydistill.report.verdict import next_steps, verdict

    rows, values, spread = merge_seeds(inputs.rows, inputs.values, inputs.runs_of_arm)
    reference = reference_of(inputs.baselines, inputs.config.quant.format)
    lines = lines_of(inputs, rows, values, spread, reference)
    plots = inputs.folder / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    main = inputs.runs[inputs.runs_of_arm[inputs.config.study.arms[0]][0]]
    files = {
        "bytes_kl": plot_bytes_kl(rows, plots / "bytes_kl.png"),
        "training": Path(shutil.copy(main.folder / "plots" / "training.png", plots)),
        "spans": Path(shutil.copy(main.folder / "plots" / "spans.png", plots)),
    }
    compare = paired_compare(values)
    words = {"verdict": verdict(rows, compare), "next_steps": next_steps(rows, compare)}
    summary = {
        "study": inputs.name,
        "reference": reference,
        "rows": [line.to_json() for line in lines],
        "baselines": [one.to_json() for one in inputs.baselines],
        "seconds": {name: round(value, 1) for name, value in inputs.seconds.items()},
        "runs": {name.removeprefix(f"{inputs.name}-"): run.to_json() for name, run in inputs.runs.items()},
        "plots": {name: str(path) for name, path in files.items()},
        **words,
    }
    files |= {"summary": inputs.folder / "summary.md", "table": inputs.folder / "summary.json"}
    _write(files["summary"], summary_text(inputs, lines, reference, words))
    _write(files["table"], json.dumps(summary, indent=1) + "\n")
    _record(inputs, lines, reference, files, console)
    return Report(
        lines=tuple(lines), reference=reference, seconds=inputs.seconds, files=files, summary=summary, **words
    )


def lines_of(
    inputs: ReportInputs,
    rows: Sequence[SummaryRow],
    values: Values,
    spread: Mapping[str, float],
    reference: str | None,
) -> list[Line]:
    """Models that were measured, and a line for every baseline that could not be made, beside those of its width."""
    cost: dict[str, Mapping[str, float]] = {one.name: {"ptq": one.seconds} for one in inputs.baselines}
    cost |= {arm: _mean_cost(inputs, names) for arm, names in inputs.runs_of_arm.items()}
    seeds = {arm: len(names) for arm, names in inputs.runs_of_arm.items()}
    measured = {line.name: line for line in compare_rows(rows, values, reference, spread, seeds, cost)}
    missing = {
        one.name: Line(name=one.name, role="ptq", row=None, reason=one.reason)
        for one in inputs.baselines
        if one.folder is None
    }
    baselines = [one.name for one in inputs.baselines]
    first = [name for name in measured if name not in baselines and name not in inputs.runs_of_arm]
    return [(measured | missing)[name] for name in [*first, *baselines, *inputs.runs_of_arm]]


def _mean_cost(inputs: ReportInputs, names: Sequence[str]) -> dict[str, float]:
    from raydistill.results.record_lines import read_spans
    from raydistill.results.timeline import device_seconds

    every = [device_seconds(read_spans(inputs.runs[name].folder), devices_of(inputs.config)) for name in names]
    return {stage: sum(one.get(stage, 0.0) for one in every) / len(every) for stage in every[0]}


def summary_text(inputs: ReportInputs, lines: Sequence[Line], reference: str | None, words: Mapping[str, str]) -> str:
    """Markdown that a reader understands without anything else."""
    from raydistill import __version__

    config, study, data = inputs.config, inputs.config.study, inputs.data
    student, teacher = Path(str(config.student.model)).name, Path(str(config.teacher.model)).name
    parts = [
        f"# Plain quantization against distillation: {student} in {config.quant.format}",
        f"{words['verdict']} {words['next_steps']}",
        decision_markdown(lines, reference).rstrip(),
    ]
    if missing := missing_lines(lines):
        parts.append("Not there:\n\n" + "\n".join(f"- {text}" for text in missing))
    count = num_tests(lines)
    if reference is not None and count:
        parts.append("## How to read it\n\n" + LEGEND.format(reference=reference, count=count))
    parts.append("## Plain quantization\n\n" + _baselines_text(inputs))
    parts.append(
        "## Distillation\n\n"
        + "\n".join(f"- {arm}: {ARM_TEXTS[arm]}" for arm in study.arms)
        + f"\n\nAll arms: {config.trainer.num_steps} steps of {config.trainer.sequences_per_step} sequences, learning rate "
        f"{config.trainer.learning_rate:g}, adapter {config.adapter.mode} of rank {config.adapter.rank}, on the grid that "
        f"rounding does best on ({'symmetric' if config.quant.symmetric else 'asymmetric'}, {config.quant.scale} scales, "
        f"group {config.quant.group_size}); the checkpoint with the lowest held-out KL (without a teacher: perplexity). Seeds: "
        f"{study.seeds}, from {config.run.seed}. The arms differ in their objective alone."
    )
    parts.append(
        "## Rows\n\n"
        f"- training: {len(data.train):,} rows, fingerprint {data.fingerprint}; calibration draws from the same ones\n"
        f"- held out, to choose grids and checkpoints: {len(data.held_out):,} rows, fingerprint {data.held_out_fingerprint}\n"
        f"- test, for the table: at most {study.test_rows:,} rows of {inputs.test_path.name}; they choose nothing"
    )
    if study.tasks:
        parts.append("## Tasks\n\n" + _tasks_text(study))
    parts.append(f"Teacher: {teacher}. Study {inputs.name}, raydistill {__version__}.")
    return "\n\n".join(parts) + "\n"


def _tasks_text(study: StudySection) -> str:
    documents = "all documents" if study.task_limit is None else f"the first {study.task_limit} documents of each"
    shown = "as each says" if study.num_fewshot is None else str(study.num_fewshot)
    return (
        f"- {', '.join(study.tasks)}: lm-eval's, {documents}, examples shown: {shown}; prompts are plain text\n"
        "- the table shows acc_norm of a task that has it, else the first of its measures; summary.json holds all of them, "
        "with the difference to the reference and its standard error\n"
        "- documents are the sample; of several seeds, shares are averaged document by document first, other standard errors "
        "are means of the seeds'; what lm-eval sums up over several tasks has no test"
    )


def _baselines_text(inputs: ReportInputs) -> str:
    study = inputs.config.study
    text = [f"- {method}: {METHODS[method]}" for method in study.ptq_methods]
    if set(study.ptq_methods) - {"rtn"}:
        text.append(
            f"- gptq and awq look at {study.calibration_rows} of the training rows, rendered as for training (seed "
            f"{inputs.config.run.seed}); llm-compressor's defaults, but searched scales may shrink to 0.3 of the range"
        )
    table = ["", "KL on the held-out rows of every grid that was tried; the lowest is in the table above:", ""]
    names = list(dict.fromkeys(name for one in inputs.baselines for name in (*one.kl_nats, *one.reasons)))
    methods = list(study.ptq_methods)
    cells = {(one.method, name): format_kl(kl) for one in inputs.baselines for name, kl in one.kl_nats.items()}
    cells |= {(one.method, name): reason for one in inputs.baselines for name, reason in one.reasons.items()}
    table += ["| grid | " + " | ".join(methods) + " |", "|---|" + "---:|" * len(methods)]
    table += [
        f"| {name} | " + " | ".join(cells.get((method, name), "-") for method in methods) + " |" for name in names
    ]
    return "\n".join([*text, *table])


def _record(
    inputs: ReportInputs, lines: Sequence[Line], reference: str | None, files: Mapping[str, Path], console: Console
) -> None:
    """The table, its plots and the summary as an entry of their own in the results store, beside the arms' runs."""
    from raydistill.results.recorded import recorded

    with recorded(inputs.output / "runs" / f"{inputs.name}-{COMPARISON}", inputs.config, console) as record:
        record.table(COMPARISON, [line.to_json() for line in lines], decision_markdown(lines, reference))
        for name, path in files.items():
            record.artifact(name, path)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text)
    temporary.replace(path)
