"""A run in words: what was distilled into what, how good it is, how it ended."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raydistill.report.run_view import Measured, MetricHistory, RunView
from raydistill.report.verdict import next_steps, verdict
from raydistill.results.query import higher_is_better
from raydistill.results.tables import SummaryRow

_NAMES = {
    "evaluate/kl_nats": "KL to the teacher",
    "evaluate/exact_match": "exact match",
    "evaluate/perplexity": "perplexity",
}
_SHARES = ("exact_match", "accuracy")


def sentences(view: RunView, comparison: Sequence[SummaryRow]) -> list[str]:
    """The summary of a run; `comparison` is the table of teacher, PTQ and student, where one was made."""
    said = [what_was_done(view.config), *how_good(view)]
    if comparison:
        said += [f"{verdict(comparison)}", next_steps(comparison)]
    return [sentence for sentence in [*said, f"It {ending(view)}."] if sentence]


def what_was_done(config: Mapping[str, Any]) -> str:
    """One sentence of the settings that matter; empty where the record has none."""
    if not all(section in config for section in ("student", "quant", "objective", "trainer")):
        return ""
    student, quant, objective = config["student"], config["quant"], config["objective"]
    trainer, adapter = config["trainer"], config.get("adapter", {})
    teacher = config.get("teacher", {}).get("model")
    own = teacher in (None, student.get("model"))
    source = "its own full-precision model" if own else f"the teacher {short_model(teacher)}"
    objective_words = (
        f"{source}, {share_words(objective['on_policy_fraction'])}, by {divergence_words(objective)}"
        if objective.get("distill_weight", 1) > 0
        else "the data set's answers by cross-entropy, without a teacher"
    )
    how = {"merged": "merged into the codes", "served": "served beside the codes"}
    mode = adapter.get("mode")
    trained = f"an adapter of rank {adapter['rank']}, {how[mode]}" if mode in how else "all weights"
    return (
        f"{short_model(student.get('model'))} as {format_words(quant)} learned from {objective_words}: "
        f"{trainer['num_steps']:,} steps of {trainer['sequences_per_step']} sequences, training {trained}."
    )


def how_good(view: RunView) -> list[str]:
    """One sentence for each held-out metric that has a name here; where it is best, if that is not the last version."""
    found = {one.name: one for one in view.quality}
    return [_change(found[name]) for name in _NAMES if name in found]


def _change(one: MetricHistory) -> str:
    name = _NAMES[one.name]
    if one.first.version == one.last.version:
        return f"Held-out {name}: {_number(one, one.first)} at version {one.first.version}."
    better = (one.last.value > one.first.value) == higher_is_better(one.name)
    verb = "went from" if one.last.value == one.first.value else "improved from" if better else "got worse, from"
    best = (
        ""
        if one.best.version == one.last.version
        else f" (best: {_number(one, one.best)} at version {one.best.version})"
    )
    unit = " nats per token" if one.name.endswith("_nats") else ""
    return f"Held-out {name} {verb} {_number(one, one.first)} to {_number(one, one.last)}{unit}{best}."


def _number(one: MetricHistory, point: Measured) -> str:
    return percent(point) if one.name.endswith(_SHARES) else str(point)


def percent(point: Measured) -> str:
    """`98.8 ± 0.7 %`."""
    error = f" ± {100 * point.se:.1f}" if point.se is not None else ""
    return f"{100 * point.value:.1f}{error} %"


def ending(view: RunView) -> str:
    """`finished after 150 steps, 4 min 20 s`; with the message where it failed."""
    total = view.config.get("trainer", {}).get("num_steps")
    steps = f"{len(view.steps)} of {total} steps, " if total and (view.steps or view.status != "finished") else ""
    took = f"{steps}{format_seconds(view.seconds)}"
    if view.end is None:
        at = datetime.datetime.fromtimestamp(view.last_s).strftime("%Y-%m-%d %H:%M:%S")
        return f"has not ended (or was killed): {took} so far, its last line is of {at}"
    words = {"finished": "finished after", "failed": "failed after", "interrupted": "was interrupted after"}
    message = f": {view.end['message']}" if view.end.get("message") else ""
    return f"{words[view.status]} {took}{message}"


def format_seconds(seconds: float) -> str:
    """`45 s`, `4 min 20 s`, `3 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02} min"


def short_model(model: str | None) -> str:
    """A hub id as it is, a folder by its name; a folder of a common name with its parent's."""
    if not model:
        return "the student"
    path = Path(model)
    if not path.is_absolute():
        return model
    return "/".join(path.parts[-2:]) if path.name in ("teacher", "student", "model", "export") else path.name


def format_words(quant: Mapping[str, Any]) -> str:
    """`int2 (groups of 32, zero points, searched scales)`."""
    if quant["format"] == "none":
        return "an unquantized student"
    groups = "one scale per channel" if quant["group_size"] == "channel" else f"groups of {quant['group_size']}"
    grid = "symmetric" if quant.get("symmetric") else "zero points"
    return f"{quant['format']} ({groups}, {grid}, {quant.get('scale', 'absmax')} scales)"


def share_words(on_policy_fraction: float) -> str:
    """Lambda in words."""
    if on_policy_fraction == 0:
        return "on the data set's completions (lambda 0)"
    if on_policy_fraction == 1:
        return "on the student's own completions (lambda 1)"
    return f"{on_policy_fraction:.0%} of the completions its own (lambda {on_policy_fraction:g})"


def divergence_words(objective: Mapping[str, Any]) -> str:
    """Beta in words, or the name of a divergence of one's own."""
    if objective.get("divergence", "generalized_jsd") != "generalized_jsd":
        return str(objective["divergence"])
    beta = objective["beta"]
    named = {0: "forward KL (beta 0)", 1: "reverse KL (beta 1)"}
    return named.get(beta, f"generalized Jensen-Shannon divergence (beta {beta:g})")
