"""What all pictures share: size, colours, legends, saving."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


def new_figure(num_rows: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure 1000 pixels wide with rows of axes; drawn without a display."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(num_rows, 1, figsize=(10, height), dpi=_DPI, squeeze=False)
    for one in axes[:, 0]:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(color="#E5E5E5", lw=0.8)
        one.set_axisbelow(True)
    return figure, list(axes[:, 0])


def save_figure(figure: Figure, path: Path, bottom: float = 0.0) -> Path:
    """Write the PNG and forget the figure."""
    from matplotlib import pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout(rect=(0, bottom, 1, 1))
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)
    return path


def stage_legend(axes: Axes, stages: Sequence[str]) -> None:
    """One row of colours between title and axes."""
    from matplotlib.patches import Patch

    handles = [
        Patch(
            facecolor=STAGE_COLOURS[stage],
            hatch="////" if stage == WAIT else None,
            edgecolor="#8A8A8A" if stage == WAIT else "white",
            label="trainer waiting" if stage == WAIT else stage,
        )
        for stage in stages
    ]
    if handles:
        axes.legend(
            handles=handles, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(handles), frameon=False, borderpad=0
        )
