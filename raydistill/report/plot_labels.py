"""Puts a name beside each point of a scatter plot so that no name covers another one or a point."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CHARACTER_WIDTH = 0.56  # of the font size; a little wide, so that estimated boxes are never too small
_GAP = 9.0  # pixels between a point and its name
NEAR = (0, 180, 90, 270, 45, 315, 135, 225)
FAR = (30, 330, 150, 210, 60, 300, 120, 240, 0, 180, 90, 270)
"""Directions of a name in degrees; a far one stays beside its point, as straight above there may be other points."""
Box = tuple[float, float, float, float]  # left, bottom, right, top in pixels


def place_labels(
    axes: Axes, points: Sequence[tuple[float, float]], names: Sequence[str], font_size: float = 9.5
) -> None:
    """Try places around each point, near ones first, and take the first free one; far names get a thin line."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.tight_layout()
    scale = figure.dpi / 72
    frame = axes.get_window_extent()
    pixels = [tuple(axes.transData.transform(point)) for point in points]
    taken: list[Box] = [(x - 8, y - 8, x + 8, y + 8) for x, y in pixels]
    legend = axes.get_legend()
    if legend is not None:
        covered = legend.get_window_extent()
        taken.append((covered.x0, covered.y0, covered.x1, covered.y1))
    for (x, y), name in sorted(zip(pixels, names, strict=True), key=lambda item: item[0]):
        width, height = _CHARACTER_WIDTH * font_size * scale * len(name), 1.35 * font_size * scale
        box = _free_box(x, y, width, height, taken, (frame.x0, frame.y0, frame.x1, frame.y1))
        taken.append(box)
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        is_far = math.hypot(max(box[0] - x, x - box[2], 0), max(box[1] - y, y - box[3], 0)) > 2 * _GAP
        axes.annotate(
            name,
            xy=_data_point(axes, x, y),
            xytext=_data_point(axes, *middle),
            textcoords="data",
            ha="center",
            va="center",
            fontsize=font_size,
            arrowprops={"arrowstyle": "-", "color": "#999999", "lw": 0.7, "shrinkB": 6} if is_far else None,
            zorder=4,
        )


def _data_point(axes: Axes, x: float, y: float) -> tuple[float, float]:
    found = axes.transData.inverted().transform((x, y))
    return float(found[0]), float(found[1])


def _free_box(x: float, y: float, width: float, height: float, taken: Sequence[Box], frame: Box) -> Box:
    best, least = (x, y, x + width, y + height), math.inf
    for distance in (_GAP, 2.5 * _GAP, 5 * _GAP, 8 * _GAP, 12 * _GAP):
        for angle in NEAR if distance == _GAP else FAR:
            dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            middle_x = x + dx * (distance + width / 2)
            middle_y = y + dy * (distance + height / 2)
            box = (middle_x - width / 2, middle_y - height / 2, middle_x + width / 2, middle_y + height / 2)
            outside = box[0] < frame[0] or box[1] < frame[1] or box[2] > frame[2] or box[3] > frame[3]
            covered = sum(_overlap(box, other) for other in taken) + (1e6 if outside else 0.0)
            if covered == 0:
                return box
            if covered < least:
                best, least = box, covered
    return best


def _overlap(first: Box, second: Box) -> float:
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    return max(width, 0.0) * max(height, 0.0)
