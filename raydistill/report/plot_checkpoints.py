"""The picture of `raydistill evaluate RUN --every-checkpoint`: every measure over the steps of a run, with error bars."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raydistill.report.plot_style import new_figure, save_figure, whole_steps
from raydistill.results.tables import Measure, SummaryRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_PANEL_HEIGHT = 3.0
_MOST_TICKS = 12
Series = dict[str, dict[int, Measure]]
"""Name -> step -> value."""


def plot_checkpoints(rows: Mapping[int, SummaryRow], teacher: SummaryRow | None, path: Path) -> Path:
    """rows: by step. One panel for the KL, one for shares, one for perplexities and the like, where there are any; the
    teacher's values are dashed."""
    series = _series(rows)
    of_teacher = _measures(teacher) if teacher is not None else {}
    kl = {name: values for name, values in series.items() if name == "KL to the teacher"}
    shares = {name: values for name, values in series.items() if next(iter(values.values()))["is_share"]}
    others = {name: values for name, values in series.items() if name not in kl and name not in shares}
    name_of_others = "perplexity" if all("perplexity" in name for name in others) else "value"
    panels = [(kl, "nats per token"), (shares, "share"), (others, name_of_others)]
    panels = [(some, label) for some, label in panels if some]
    figure, all_axes = new_figure(max(1, len(panels)), _PANEL_HEIGHT * max(1, len(panels)) + 0.8)
    for axes, (some, label) in zip(all_axes, panels, strict=False):
        _draw(axes, some, of_teacher if some is not kl else {})
        axes.set_ylabel(label)
        if label == "share":
            axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        elif _spans(some):
            axes.set_yscale("log")
    all_axes[0].set_title("Checkpoints of the run, with standard errors; dashed: the teacher", loc="left", pad=12)
    all_axes[-1].set_xlabel("optimizer step of the checkpoint")
    return save_figure(figure, path)


def _draw(axes: Axes, series: Series, of_teacher: Mapping[str, Measure]) -> None:
    for number, (name, values) in enumerate(series.items()):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        steps = sorted(values)
        axes.errorbar(
            steps,
            [values[step]["value"] for step in steps],
            yerr=[values[step]["se"] or 0.0 for step in steps],
            color=colour,
            marker=marker,
            capsize=3,
            label=name,
        )
        if name in of_teacher:
            axes.axhline(of_teacher[name]["value"], color=colour, ls="--", lw=1)
    steps = sorted({step for values in series.values() for step in values})
    if len(steps) <= _MOST_TICKS:
        axes.set_xticks(steps)
    else:
        whole_steps(axes)
    axes.legend(loc="best", framealpha=0.9, fontsize=9)


def _series(rows: Mapping[int, SummaryRow]) -> Series:
    series: Series = {}
    for step, row in sorted(rows.items()):
        for name, measure in _measures(row).items():
            if math.isfinite(measure["value"]):
                series.setdefault(name, {})[step] = measure
    return series


def _measures(row: SummaryRow) -> dict[str, Measure]:
    """Everything that a row holds a number for."""
    found: dict[str, Measure] = {}
    if row.kl_nats is not None:
        found["KL to the teacher"] = Measure(value=row.kl_nats, se=row.kl_se, is_share=False)
    if row.perplexity is not None:
        found["perplexity of the rows"] = Measure(value=row.perplexity, se=row.perplexity_se, is_share=False)
    if row.exact_match is not None:
        found["exact match"] = Measure(value=row.exact_match, se=row.exact_match_se, is_share=True)
    return found | row.measures


def _spans(series: Series) -> bool:
    """Whether the values differ so much that only a log scale shows all of them."""
    values: Sequence[float] = [measure["value"] for one in series.values() for measure in one.values()]
    return min(values) > 0 and max(values) > 5 * min(values)
