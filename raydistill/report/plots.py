"""Pictures of a run: bytes against KL, the training curves, who was busy when. Written as PNG, 1000 pixels wide.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; roles and stages also differ by marker or hatch.
matplotlib is imported when a picture is drawn, with the Agg backend: no display is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydistill.messages import Span
from raydistill.report.plot_labels import place_labels
from raydistill.report.plot_spans import plot_spans
from raydistill.report.plot_style import STAGE_COLOURS, WAIT_HATCH, new_figure, paper, save_figure, stage_legend
from raydistill.results.record_lines import spans_of
from raydistill.results.tables import SummaryRow, format_bytes
from raydistill.results.timeline import WAIT, stage_seconds_per_step

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_bytes_kl", "plot_spans", "plot_training"]

_ROLE_STYLE = {  # colour, marker, size
    "student": ("#D55E00", "*", 220),
    "ptq": ("#0072B2", "o", 60),
    "control": ("#999999", "s", 50),
    "teacher": ("#767676", "D", 60),
}
_OUTLIER = 1.6  # times the usual step: longer bars are cut
_ROLE_NAMES = {
    "student": "distilled student",
    "ptq": "plain quantization (PTQ)",
    "control": "control",
    "teacher": "teacher",
}


def plot_bytes_kl(rows: Sequence[SummaryRow], path: Path) -> Path:
    """Size of what is served (x) against KL to the teacher (y, log); the teacher (KL 0) is a note."""
    figure, (axes,) = new_figure(1, height=5.6)
    shown = [row for row in rows if row.kl_nats is not None and row.kl_nats > 0 and math.isfinite(row.kl_nats)]
    for role in dict.fromkeys(row.role for row in shown):
        colour, marker, size = _ROLE_STYLE[role]
        points = [row for row in shown if row.role == role]
        axes.scatter(
            [row.bytes for row in points],
            [row.kl_nats or 0.0 for row in points],
            c=colour,
            marker=marker,
            s=size,
            label=_ROLE_NAMES[role],
            edgecolors=paper().ground,
            linewidths=0.8,
            zorder=3,
        )
    axes.set_yscale("log")
    axes.set_xlabel("size of the served model (weights, scales, adapter)")
    axes.set_ylabel("KL to the teacher (nats per token, log scale)")
    axes.set_title("Smaller and closer to the teacher is better: down and left", loc="left")
    axes.xaxis.set_major_formatter(lambda size, _: format_bytes(max(size, 0)))
    if shown:
        axes.margins(x=0.12, y=0.12)
        axes.set_xlim(left=max(0.0, axes.get_xlim()[0]))
        axes.legend(loc="upper right", framealpha=0.9)
        names = [row.name if row.exact_match is None else f"{row.name} ({row.exact_match:.1%})" for row in shown]
        place_labels(axes, [(row.bytes, row.kl_nats or 0.0) for row in shown], names)
    _note(axes, _teacher_note(rows))
    return save_figure(figure, path)


def plot_training(record: Iterable[Mapping[str, Any]], path: Path) -> Path:
    """Loss, KL and exact match over the steps; below, the seconds of each stage per step. Takes `read_record(...)`."""
    lines = list(record)
    steps = [line for line in lines if line["kind"] == "step"]
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    spans = spans_of(lines)
    figure, (quality, timing) = new_figure(2, height=7.2)
    loss = _series(steps, "step", "trainer/loss")
    train_kl, held_out = _series(steps, "step", "trainer/kl_nats"), _series(evaluations, "version", "evaluate/kl_nats")
    match = _series(evaluations, "version", "evaluate/exact_match")
    for (x, y), label, style in (
        (loss, "loss (training)", {"color": paper().faint, "lw": 1.0}),
        (train_kl, "KL (training)", {"color": paper().lines[0], "lw": 1.2}),
        (held_out, "KL (held out)", {"color": paper().lines[0], "marker": "o", "ls": "--"}),
    ):
        if x:
            quality.plot(x, y, label=label, **style)
    values = [y for _, ys in (loss, train_kl, held_out) for y in ys if math.isfinite(y)]
    if values and min(values) > 0:
        quality.set_yscale("log")
    quality.set_ylabel("nats per token")
    quality.set_title("Loss, KL to the teacher and exact match", loc="left")
    if match[0]:
        right = quality.twinx()
        right.plot(*match, color=paper().lines[1], marker="s", label="exact match (held out, right)")
        right.set_ylim(0, 1.02)
        right.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        right.set_ylabel("exact match")
        right.spines["right"].set_visible(True)
        _legend_below_title(quality, right)
    elif quality.lines:
        _legend_below_title(quality)
    _stacked_stage_times(timing, spans)
    timing.set_xlabel("optimizer step")
    timing.sharex(quality)
    return save_figure(figure, path)


def _stacked_stage_times(axes: Axes, spans: Sequence[Span]) -> None:
    per_step = stage_seconds_per_step(spans)
    steps = list(per_step)
    present = [stage for stage in STAGE_COLOURS if any(stage in seconds for seconds in per_step.values())]
    floor = [0.0] * len(steps)
    for stage in present:
        heights = [per_step[step].get(stage, 0.0) for step in steps]
        hatched: dict[str, Any] = {**WAIT_HATCH, "lw": 0} if stage == WAIT else {}
        axes.bar(steps, heights, bottom=floor, width=1.0, color=STAGE_COLOURS[stage], **hatched)
        floor = [low + height for low, height in zip(floor, heights, strict=True)]
    _cut_outliers(axes, steps, floor)
    axes.set_ylabel("seconds per step, all actors")
    axes.set_title("Time per step and stage", loc="left", pad=30)
    stage_legend(axes, present)


def _cut_outliers(axes: Axes, steps: Sequence[int], seconds: Sequence[float]) -> None:
    """Do not let the first step's start-up flatten all others: cut the axis and write the number."""
    if not seconds:
        return
    usual = sorted(seconds)[int(0.95 * (len(seconds) - 1))]
    top = _OUTLIER * usual
    high = [(step, value) for step, value in zip(steps, seconds, strict=True) if value > top]
    if high and usual > 0:
        axes.set_ylim(0, top)
        step, value = max(high, key=lambda item: item[1])
        others = f" ({len(high)} steps are cut off here)" if len(high) > 1 else " (cut off here)"
        axes.text(step + 0.8, top * 0.97, f" step {step}: {value:.1f} s{others}", va="top", fontsize=9.5)


def _legend_below_title(*all_axes: Axes) -> None:
    pairs = [axes.get_legend_handles_labels() for axes in all_axes]
    handles = [handle for some, _ in pairs for handle in some]
    labels = [label for _, some in pairs for label in some]
    first = all_axes[0]
    first.set_title(first.get_title(loc="left"), loc="left", pad=30)
    first.legend(
        handles, labels, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(labels), frameon=False, borderpad=0
    )


def _series(lines: Sequence[Mapping[str, Any]], x: str, key: str) -> tuple[list[int], list[float]]:
    found = [(line[x], line["metrics"][key]) for line in lines if key in line["metrics"]]
    return [step for step, _ in found], [value for _, value in found]


def _teacher_note(rows: Sequence[SummaryRow]) -> str:
    teacher = next((row for row in rows if row.role == "teacher"), None)
    if teacher is None:
        return ""
    match = "" if teacher.exact_match is None else f", exact match {teacher.exact_match:.1%}"
    return f"teacher: {format_bytes(teacher.bytes)}, KL 0{match}"


def _note(axes: Axes, text: str) -> None:
    if text:
        axes.text(0.01, 0.02, text, transform=axes.transAxes, fontsize=10, color=paper().faint)
