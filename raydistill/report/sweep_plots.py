"""Pictures of a sweep: every finished point across all fields, the metric over the learning rate, each field's importance."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydistill.report.importance import Importance
from raydistill.report.plot_style import log_axis, new_figure, paper, save_figure
from raydistill.report.sweep import Point, Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEARNING_RATE = "trainer.learning_rate"
_MOST_LINES = 12  # of the curves; a legend with more is not read
_MOST_TICKS = 8
_LOG_SPAN = 8.0


def plot_parallel(sweep: Sweep, points: Sequence[Point], path: Path) -> Path:
    """Parallel coordinates: an axis for each field and one for the metric, a line for each finished point, the best thick."""
    figure, (axes,) = new_figure(1, height=5.2)
    shown = [point for point in points if point.status == "finished" and point.estimate is not None]
    names = [*sweep.varied, sweep.metric]
    axes.set_title("Every finished point, from violet (worst) to green; the best one is thick", loc="left", pad=30)
    axes.set_xlim(-0.25, len(names) - 0.8)
    axes.set_ylim(-0.06, 1.06)
    axes.grid(visible=False)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="x", length=0)
    axes.set_xticks(range(len(names)), short_names(names))
    if not shown:
        axes.text(0.5, 0.5, "no point has finished yet", transform=axes.transAxes, ha="center", color=paper().faint)
        return save_figure(figure, path)
    scales = [_scale_of(sweep, name, shown) for name in names]
    for place, (_, ticks) in enumerate(scales):
        axes.axvline(place, color=paper().grid, lw=1.2, zorder=1)
        for height, text in ticks:
            is_last = place == len(names) - 1
            label = axes.text(
                place, height, f" {text} ", ha="left" if is_last else "right", va="center", fontsize=8.5, zorder=4
            )
            label.set_bbox({"facecolor": paper().ground, "edgecolor": "none", "pad": 1.0, "alpha": 0.8})
    _draw_lines(axes, sweep, shown, [scale for scale, _ in scales])
    return save_figure(figure, path)


def _draw_lines(axes: Axes, sweep: Sweep, shown: Sequence[Point], scales: Sequence[Callable[[Any], float]]) -> None:
    """Worst first, so that the best lies on top."""
    from matplotlib import colormaps

    colours = colormaps["viridis"]
    for rank in range(len(shown) - 1, -1, -1):
        point = shown[rank]
        assert point.estimate is not None
        values = [*(point.values.get(name) for name in sweep.varied), point.estimate.mean]
        heights = [scale(value) for scale, value in zip(scales, values, strict=True)]
        quality = 1 - rank / max(len(shown) - 1, 1)
        style: dict[str, Any] = {"lw": 3.2, "alpha": 1.0} if rank == 0 else {"lw": 1.3, "alpha": 0.75}
        colour = paper().lines[1] if rank == 0 else colours(0.15 + 0.65 * quality)
        axes.plot(range(len(heights)), heights, color=colour, zorder=3 if rank == 0 else 2, **style)


def plot_over_field(sweep: Sweep, points: Sequence[Point], field: str, path: Path) -> Path:
    """The metric over one field: a line for each combination of the others, error bars are standard errors over seeds."""
    figure, (axes,) = new_figure(1, height=5.0)
    others = [name for name in sweep.varied if name != field]
    lines: dict[str, list[Point]] = {}
    for point in points:  # best first: so the lines are in the order of their best point
        if point.status == "finished" and point.estimate is not None:
            label = ", ".join(f"{_short(name)} {_text(point.values.get(name))}" for name in others)
            lines.setdefault(label, []).append(point)
    colours, values = paper().lines, []
    markers = "os^Dv"
    for place, (label, members) in enumerate(list(lines.items())[:_MOST_LINES]):
        members.sort(key=lambda point: float(point.values[field]))  # type: ignore[arg-type]
        estimates = [point.estimate for point in members if point.estimate is not None]
        values += [one.mean for one in estimates]
        axes.errorbar(
            [float(point.values[field]) for point in members],  # type: ignore[arg-type]
            [one.mean for one in estimates],
            yerr=[one.se or 0.0 for one in estimates],
            color=colours[place % len(colours)],
            marker=markers[place // len(colours) % len(markers)],
            ms=5,
            lw=1.4,
            capsize=3,
            label=label or None,
        )
    if field in sweep.log_fields:
        log_axis(axes, "x")
    tried = sorted({float(point.values[field]) for members in lines.values() for point in members})  # type: ignore[arg-type]
    if len(tried) <= _MOST_TICKS:
        axes.set_xticks(tried, [f"{value:.4g}" for value in tried])
        axes.minorticks_off()
    if values and min(values) > 0 and max(values) / min(values) > _LOG_SPAN:
        log_axis(axes)
    axes.set_xlabel(field)
    axes.set_ylabel(sweep.metric)
    left_out = f" ({len(lines)} combinations, the best {_MOST_LINES} drawn)" if len(lines) > _MOST_LINES else ""
    better = "lower" if sweep.mode == "min" else "higher"
    axes.set_title(f"{_short(sweep.metric)} over {_short(field)}, {better} is better{left_out}", loc="left")
    if any(lines):
        axes.legend(fontsize=8.5, framealpha=0.9, ncols=1 if len(lines) < 6 else 2)
    return save_figure(figure, path)


def plot_importance(importance: Importance, metric: str, path: Path) -> Path:
    """A bar for each field, the most important on top: the share of the metric's variance that it explains on its own."""
    names, shares = list(importance.shares), [100 * share for share in importance.shares.values()]
    figure, (axes,) = new_figure(1, height=1.4 + 0.42 * len(names))
    bars = axes.barh(range(len(names)), shares, height=0.62, color=paper().lines[0], zorder=2)
    axes.bar_label(bars, [f"{share:.0f} %" for share in shares], padding=5)
    axes.set_yticks(range(len(names)), short_names(names))
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, 108)  # room for the label of a bar that takes it all
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("share (%)")
    axes.set_title(f"How much of the variance of {_short(metric)} each field explains on its own", loc="left")
    return save_figure(figure, path)


def field_of_curve(sweep: Sweep, points: Sequence[Point]) -> str | None:
    """The learning rate where it varies, else the first number that does; None where none does."""
    numeric = [name for name in sweep.varied if _numbers(points, name) and len(set(_numbers(points, name))) > 1]
    return LEARNING_RATE if LEARNING_RATE in numeric else next(iter(numeric), None)


def _numbers(points: Sequence[Point], name: str) -> list[float]:
    """A field's values if all are numbers, else nothing."""
    values = [point.values.get(name) for point in points]
    numbers = [float(v) for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    return numbers if len(numbers) == len(values) else []


def _scale_of(
    sweep: Sweep, name: str, shown: Sequence[Point]
) -> tuple[Callable[[Any], float], list[tuple[float, str]]]:
    """How high a value lies on its axis, 0 to 1, and the axis' labels; on the metric's, better is higher."""
    if name == sweep.metric:
        numbers = [point.estimate.mean for point in shown if point.estimate is not None]
        height, ticks = _number_scale(numbers, min(numbers) > 0 and max(numbers) / min(numbers) > _LOG_SPAN)
        if sweep.mode == "max":
            return height, ticks
        return lambda value: 1 - height(value), [(1 - place, text) for place, text in ticks]
    numbers = _numbers(shown, name)
    if numbers:
        return _number_scale(numbers, name in sweep.log_fields and min(numbers) > 0)
    kinds = sorted({json.dumps(point.values.get(name)) for point in shown})
    steps = max(len(kinds) - 1, 1)
    heights = {kind: place / steps if len(kinds) > 1 else 0.5 for place, kind in enumerate(kinds)}
    return lambda value: heights[json.dumps(value)], [
        (height, _text(json.loads(kind))) for kind, height in heights.items()
    ]


def _number_scale(numbers: Sequence[float], is_log: bool) -> tuple[Callable[[Any], float], list[tuple[float, str]]]:
    low, high = min(numbers), max(numbers)
    bend = math.log if is_log else float

    def height(value: Any) -> float:
        return 0.5 if low == high else (bend(value) - bend(low)) / (bend(high) - bend(low))

    distinct = sorted(set(numbers))
    if len(distinct) > 8:
        spread = [low + (high - low) * k / 4 for k in range(5)]
        distinct = [low * (high / low) ** (k / 4) for k in range(5)] if is_log else spread
    return height, [(height(value), f"{value:.3g}") for value in distinct]


def short_names(names: Sequence[str]) -> list[str]:
    """The last part of each name; of two with the same last part the whole names."""
    short = [_short(name) for name in names]
    return [name if short.count(leaf) > 1 else leaf for name, leaf in zip(names, short, strict=True)]


def _short(name: str) -> str:
    """The last part of a field's or metric's name."""
    return name.replace("/", ".").rpartition(".")[2]


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)
