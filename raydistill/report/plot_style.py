"""What all pictures share: size, colours, legends, saving; on light paper, or on dark for pages that are dark.

with drawn_on(DARK):
    plot_training(lines, path)
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raydistill.results.timeline import WAIT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STAGE_COLOURS = {
    "rollout": "#0072B2",
    "teacher": "#E69F00",
    "trainer": "#009E73",
    "sync": "#CC79A7",
    "evaluate": "#56B4E9",
    WAIT: "#D9D9D9",
}
WAIT_HATCH: dict[str, Any] = {"hatch": "////", "edgecolor": "#8A8A8A"}
_DPI = 100
_PANEL_DPI = 150
_PANEL_HEIGHT = 2.6  # inches
_MANY_DECADES = 50.0  # times the smallest value: from there on the powers of ten are ticks enough
_TINY = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Paper:
    """The colours that depend on what is drawn on."""

    ground: str
    ink: str
    faint: str  # notes, and lines that are there for comparison only
    grid: str
    lines: tuple[str, ...]  # Okabe and Ito's, in the order of use


LIGHT = Paper(
    ground="#FFFFFF",
    ink="#000000",
    faint="#767676",
    grid="#E5E5E5",
    lines=("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#767676"),
)
DARK = Paper(
    ground="#1C2128",
    ink="#D7DDE4",
    faint="#9AA4AF",
    grid="#343B44",
    lines=("#56B4E9", "#F0803C", "#2DC49B", "#E08FBE", "#E69F00", "#8FB8FF", "#9AA4AF"),
)
_paper: ContextVar[Paper] = ContextVar("paper", default=LIGHT)


def paper() -> Paper:
    """What is drawn on now."""
    return _paper.get()


@contextmanager
def drawn_on(chosen: Paper) -> Iterator[None]:
    """Draw on another paper inside."""
    import matplotlib as mpl

    inks = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "legend.labelcolor")
    grounds = ("figure.facecolor", "axes.facecolor", "legend.facecolor")
    colours = dict.fromkeys(inks, chosen.ink) | dict.fromkeys(grounds, chosen.ground)
    token = _paper.set(chosen)
    try:
        with mpl.rc_context(colours | {"legend.edgecolor": chosen.grid}):
            yield
    finally:
        _paper.reset(token)


def new_figure(num_rows: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure 1000 pixels wide with rows of axes; drawn without a display."""
    return _subplots(num_rows, 1, (10, height))


def new_grid(num_panels: int) -> tuple[Figure, list[Axes]]:
    """A figure 1000 pixels wide with small axes, two in a row; a place that stays empty is not drawn."""
    num_columns = min(num_panels, 2)
    num_rows = math.ceil(num_panels / num_columns)
    figure, grid = _subplots(num_rows, num_columns, (10, _PANEL_HEIGHT * num_rows))
    for unused in grid[num_panels:]:
        unused.set_visible(False)
    return figure, grid[:num_panels]


def new_panel() -> tuple[Figure, Axes]:
    """One small figure, fine enough to be shown a little larger."""
    figure, (axes,) = _subplots(1, 1, (4.9, _PANEL_HEIGHT))
    figure.set_dpi(_PANEL_DPI)
    return figure, axes


def _subplots(num_rows: int, num_columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(num_rows, num_columns, figsize=size, dpi=_DPI, squeeze=False)
    grid = list(axes.flat)
    for one in grid:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(color=paper().grid, lw=0.8)
        one.set_axisbelow(True)
    return figure, grid


def save_figure(figure: Figure, path: Path, bottom: float = 0.0, top: float = 1.0) -> Path:
    """Write the PNG, whole or not at all, and forget the figure; `bottom` to `top` of the height is for the axes."""
    from matplotlib import pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout(rect=(0, bottom, 1, top))
    temporary = path.with_name(f".{path.name}.new")
    figure.savefig(temporary, dpi=figure.dpi, format="png")
    os.replace(temporary, path)
    plt.close(figure)
    return path


def whole_steps(axes: Axes) -> None:
    """Ticks of a step axis at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def log_axis(axes: Axes, which: Literal["x", "y"] = "y") -> None:
    """A log axis with plain numbers at 1, 2 and 5, or at the powers of ten where there are many."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    (axes.set_yscale if which == "y" else axes.set_xscale)("log")
    axis = axes.yaxis if which == "y" else axes.xaxis
    low, high = axis.get_data_interval()
    is_wide = 0 < low < high and high / low > _MANY_DECADES  # (inf, -inf) as long as nothing is drawn
    axis.set_major_locator(LogLocator(subs=(1.0,) if is_wide else (1.0, 2.0, 5.0), numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))
    axis.set_minor_formatter(NullFormatter())


def _power(value: float) -> str:
    """`0.02`; below a thousandth `2e-4`."""
    return f"{value:g}" if value >= _TINY else f"{value:.0e}".replace("e-0", "e-")


def stage_legend(axes: Axes, stages: Sequence[str]) -> None:
    """One row of colours between title and axes."""
    from matplotlib.patches import Patch

    handles = [
        Patch(
            facecolor=STAGE_COLOURS[stage],
            hatch="////" if stage == WAIT else None,
            edgecolor="#8A8A8A" if stage == WAIT else paper().ground,
            label="trainer waiting" if stage == WAIT else stage,
        )
        for stage in stages
    ]
    if handles:
        axes.legend(
            handles=handles, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(handles), frameon=False, borderpad=0
        )
