"""The curves of one run, or of several over each other: a small picture for each thing that changes while training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydistill.report.plot_style import log_axis, new_grid, new_panel, paper, save_figure, whole_steps
from raydistill.results.names import HELD_OUT, STANDARD_ERROR
from raydistill.results.record_lines import Line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LOG_SPAN = 8.0  # positive values whose largest is so many times the smallest are drawn on a log axis
_NARROW_LEGEND = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One small picture: what is drawn in it, and its axis."""

    title: str
    metrics: tuple[str, ...]
    unit: str = ""
    is_share: bool = False
    log: bool = False  # where the values span enough


PANELS = (
    Panel(title="Loss", metrics=("trainer/loss",), unit="nats per token", log=True),
    Panel(
        title="KL to the teacher",
        metrics=("evaluate/kl_nats", "trainer/kl_nats", "trainer/divergence_nats"),
        unit="nats per token",
        log=True,
    ),
    Panel(title="Exact match", metrics=("evaluate/exact_match",), is_share=True),
    Panel(title="Perplexity", metrics=("evaluate/perplexity",)),
    Panel(title="Learning rate", metrics=("trainer/learning_rate",)),
    Panel(title="Gradient norm", metrics=("trainer/grad_norm",), log=True),
    Panel(title="Completion length", metrics=("rollout/completion_tokens",), unit="tokens"),
    Panel(
        title="Completions that went wrong",
        metrics=("rollout/truncated_fraction", "rollout/empty_fraction", "rollout/repetition_fraction"),
        is_share=True,
    ),
    Panel(title="Entropy of the student", metrics=("trainer/entropy_nats",), unit="nats per token"),
    Panel(title="Rollout speed", metrics=("rollout/tokens_per_s",), unit="tokens per busy second"),
    Panel(title="Time of a step", metrics=("loop/step_s",), unit="seconds", log=True),
)
_LABELS = {
    "evaluate/kl_nats": "held out",
    "trainer/kl_nats": "training",
    "trainer/divergence_nats": "training (divergence)",
    "rollout/truncated_fraction": "cut",
    "rollout/empty_fraction": "empty",
    "rollout/repetition_fraction": "repeated 4-grams",
}


def plot_curves(records: Mapping[str, Sequence[Line]], path: Path) -> Path:
    """One panel for each metric that a record has: a line per metric, with several records a line per record."""
    panels = panels_of(records)
    figure, grid = new_grid(max(len(panels), 1))
    for place, (axes, panel) in enumerate(zip(grid, panels, strict=False)):
        _draw(axes, panel, records)
        if place >= len(panels) - 2:
            axes.set_xlabel("optimizer step")
    if not panels:
        grid[0].set_title("nothing recorded yet", loc="left")
    if len(records) > 1 and panels:
        handles, labels = _distinct(grid)
        columns = min(len(labels), _NARROW_LEGEND)
        rows = math.ceil(len(labels) / columns)
        figure.legend(handles, labels, loc="upper left", ncols=columns, frameon=False)
        return save_figure(figure, path, top=1 - (0.3 * rows + 0.1) / figure.get_figheight())
    return save_figure(figure, path)


def panels_of(records: Mapping[str, Sequence[Line]]) -> list[Panel]:
    """The panels that these records have something for."""
    return [panel for panel in (*PANELS, *_other_panels(records)) if _has_any(records, panel)]


def plot_panel(panel: Panel, records: Mapping[str, Sequence[Line]], path: Path) -> Path:
    """One panel as a picture of its own, for pages that lay them out themselves."""
    figure, axes = new_panel()
    _draw(axes, panel, records)
    return save_figure(figure, path)


def _other_panels(records: Mapping[str, Sequence[Line]]) -> list[Panel]:
    """One for each held-out metric that has no panel of its own."""
    known = {metric for panel in PANELS for metric in panel.metrics}
    found = dict.fromkeys(
        name
        for lines in records.values()
        for line in lines
        if line["kind"] == "evaluation"
        for name in line["metrics"]
        if name not in known and not name.endswith(STANDARD_ERROR)
    )
    return [Panel(title=name.removeprefix(HELD_OUT), metrics=(name,)) for name in found]


def _draw(axes: Axes, panel: Panel, records: Mapping[str, Sequence[Line]]) -> None:
    """Of several records the first metric that one of them has is drawn, so that a line is a record."""
    values: list[float] = []
    colours = paper().lines
    metrics = [metric for metric in panel.metrics if any(_points(lines, metric) for lines in records.values())]
    title = panel.title
    if len(records) > 1 and len(panel.metrics) > 1:
        title = f"{title}: {_LABELS.get(metrics[0], metrics[0])}"
        metrics = metrics[:1]
    for place, (run, lines) in enumerate(records.items()):
        for number, metric in enumerate(metrics):
            points = _points(lines, metric)
            if not points:
                continue
            values += [y for _, y, _ in points if math.isfinite(y)]
            label = run if len(records) > 1 else _LABELS.get(metric, metric)
            _line(axes, points, colours[(place + number) % len(colours)], label, metric.startswith(HELD_OUT))
    if panel.log and values and min(values) > 0 and max(values) / min(values) > _LOG_SPAN:
        log_axis(axes)
    if panel.is_share:
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g} %")
    whole_steps(axes)
    axes.set_title(f"{title} ({panel.unit})" if panel.unit else title, loc="left", fontsize=10.5)
    if len(records) == 1 and len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(fontsize=8.5, frameon=False)


def _line(
    axes: Axes, points: Sequence[tuple[int, float, float | None]], colour: str, label: str, held_out: bool
) -> None:
    """Held-out values have markers and error bars: they are few."""
    x, y = [step for step, _, _ in points], [value for _, value, _ in points]
    style: dict[str, Any] = {"marker": "o", "ms": 4, "lw": 1.4} if held_out else {"lw": 1.2}
    errors = [se or 0.0 for _, _, se in points]
    if any(errors):
        axes.errorbar(x, y, yerr=errors, color=colour, label=label, capsize=2.5, **style)
    else:
        axes.plot(x, y, color=colour, label=label, **style)


def _points(lines: Sequence[Line], metric: str) -> list[tuple[int, float, float | None]]:
    """(step or version, value, standard error) of one metric."""
    kind, place = ("evaluation", "version") if metric.startswith(HELD_OUT) else ("step", "step")
    return sorted(
        (line[place], line["metrics"][metric], line["metrics"].get(metric + STANDARD_ERROR))
        for line in lines
        if line["kind"] == kind and metric in line["metrics"]
    )


def _has_any(records: Mapping[str, Sequence[Line]], panel: Panel) -> bool:
    return any(_points(lines, metric) for lines in records.values() for metric in panel.metrics)


def _distinct(grid: Sequence[Axes]) -> tuple[list[Any], list[str]]:
    found: dict[str, Any] = {}
    for axes in grid:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)
