"""A finished evaluation as an entry of the results store, so that `raydistill results` shows it; only with `--record`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from raydistill.cli import console
from raydistill.config import Config
from raydistill.evaluate.plan import Plan
from raydistill.evaluate.run_defaults import config_of
from raydistill.evaluate.targets import version_of
from raydistill.messages import EvalReport, Span
from raydistill.results.courier import retry_command
from raydistill.results.provenance import HIDDEN
from raydistill.results.record_lines import start_of
from raydistill.results.recorded import recorded
from raydistill.results.tables import COMPARISON, SummaryRow, comparison_json, comparison_markdown

DEFAULT_OUTPUT = Path("outputs")


def record_evaluation(
    plan: Plan, output: Path | None, rows: Sequence[SummaryRow], started_s: float, files: Mapping[str, Path]
) -> Path:
    """Write the table, its numbers as metrics and some files into a folder of their own under `output`/runs, and deliver
    them. Returns the folder.

    One model's metrics have the names that a run's have (a checkpoint's with its step); of several each has the model's name
    within. The settings are those of the run that was measured, where there is one.
    """
    run = next((run for target in plan.targets if (run := _run_of(target.checkpoint or target.folder))), None)
    config = config_of(run) if run is not None else Config()
    output = (output or (run.parent.parent if run is not None else DEFAULT_OUTPUT)).absolute()
    config = config.model_copy(update={"run": config.run.model_copy(update={"output": output, "name": None})})
    folder = output / "runs" / f"{time.strftime('%Y%m%d-%H%M%S')}-evaluate"
    if HIDDEN in (config.results.uri or ""):
        config = config.model_copy(update={"results": config.results.model_copy(update={"deliver": False})})
        console.print(
            f"warning: the run's record does not keep the password of {config.results.uri}; deliver this one with "
            f"`{retry_command(folder)} --uri ADDRESS`",
            style="yellow",
            soft_wrap=True,
        )
    models = [row for row in rows if row.role != "teacher"] or list(rows)
    steps = [version_of(target) if target.checkpoint else None for target in plan.targets]
    is_curve = len(models) == len(steps) and None not in steps
    with recorded(folder, config, console) as record:
        span = Span(stage="evaluate", actor="evaluate", step=0, start_s=started_s, end_s=time.time())
        for place, row in enumerate(models if is_curve else [None]):
            version = steps[place] or 0
            metrics = metrics_of(row) if row is not None else _of_all(models)
            record.evaluation(EvalReport(version=version, metrics=metrics, span=span))
        record.table(COMPARISON, comparison_json(rows), comparison_markdown(rows))
        for name, path in files.items():
            record.artifact(name, path)
    return folder


def metrics_of(row: SummaryRow, within: str = "") -> dict[str, float]:
    """The numbers of a row by the names that a run's evaluations have, such as evaluate/kl_nats."""
    plain = {
        "kl_nats": row.kl_nats, "kl_nats_se": row.kl_se, "bytes": float(row.bytes),
        "perplexity": row.perplexity, "perplexity_se": row.perplexity_se,
        "exact_match": row.exact_match, "exact_match_se": row.exact_match_se,
    }  # fmt: skip
    for name, measure in row.measures.items():
        plain |= {name: measure["value"], f"{name}_se": measure["se"]}
    return {f"evaluate/{within}{_key(name)}": value for name, value in plain.items() if value is not None}


def _key(column: str) -> str:
    """A column's name without what the store refuses: `gsm8k exact_match (strict-match)` is gsm8k_exact_match.strict-match."""
    for old, new in ((" (", "."), (")", ""), ("bits/byte", "bits_per_byte"), (" ", "_")):
        column = column.replace(old, new)
    return column


def _of_all(models: Sequence[SummaryRow]) -> dict[str, float]:
    if len(models) == 1:
        return metrics_of(models[0])
    return {name: value for row in models for name, value in metrics_of(row, f"{row.name}/").items()}


def _run_of(folder: Path) -> Path | None:
    """The run that a target's folder lies in."""
    return next((parent for parent in folder.absolute().parents if start_of(parent) is not None), None)
