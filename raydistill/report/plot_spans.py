"""The Gantt chart of a run: one row per actor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydistill.messages import Span
from raydistill.report.plot_style import STAGE_COLOURS, WAIT_HATCH, new_figure, paper, save_figure, stage_legend
from raydistill.results.timeline import WAIT, bottleneck, overlap_seconds, wall_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_STEPS = 24  # more steps than this and the bars are too thin to see
_SHORTEST_LABELLED = 1 / 50  # of the width: no number fits into a shorter bar


def plot_spans(all_spans: Sequence[Span], path: Path) -> Path:
    """One row per actor over time, with step numbers; waits are hatched. Overlap of rows is overlap of stages.

    Of a long run the middle steps are drawn; the line of text below speaks of the whole run.
    """
    spans, title = _middle_steps(all_spans)
    order = {stage: place for place, stage in enumerate(STAGE_COLOURS)}
    work = [span for span in spans if span.stage != WAIT]
    homes = {span.actor: order[span.stage] for span in sorted(work, key=lambda s: s.start_s, reverse=True)}
    actors = sorted({span.actor for span in spans}, key=lambda actor: (homes.get(actor, len(order)), actor))
    figure, (axes,) = new_figure(1, height=2.2 + 0.55 * max(len(actors), 2))
    begin = min((span.start_s for span in spans), default=0.0)
    length = max((span.end_s for span in spans), default=1.0) - begin or 1.0
    _draw_bars(axes, spans, actors, begin, length)
    axes.set_yticks(range(len(actors)), actors)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, length)
    axes.set_xlabel("seconds since the left edge; the number is the step")
    axes.set_title(title, loc="left", pad=30)
    stage_legend(axes, [stage for stage in STAGE_COLOURS if any(span.stage == stage for span in spans)])
    if spans:
        text = bottleneck(all_spans)
        if any(span.stage == "rollout" for span in all_spans):
            overlap, wall = overlap_seconds(all_spans, "rollout", "trainer"), wall_seconds(all_spans)
            text = f"whole run: rollout and trainer busy at once for {overlap:.1f} of {wall:.1f} s\n{text}"
        figure.text(0.012, 0.02, text, fontsize=9.5, va="bottom", color=paper().ink)
        return save_figure(figure, path, bottom=0.11)
    return save_figure(figure, path)


def _middle_steps(spans: Sequence[Span]) -> tuple[list[Span], str]:
    steps = sorted({span.step for span in spans})
    if len(steps) <= _MAX_STEPS:
        return list(spans), "Who was busy when"
    first = steps[(len(steps) - _MAX_STEPS) // 2]
    last = first + _MAX_STEPS - 1
    shown = [span for span in spans if first <= span.step <= last]
    return shown, f"Who was busy when: steps {first} to {last} of {steps[-1] + 1}"


def _draw_bars(axes: Axes, spans: Sequence[Span], actors: Sequence[str], begin: float, length: float) -> None:
    for span in spans:
        row = actors.index(span.actor)
        hatched: dict[str, Any] = WAIT_HATCH if span.stage == WAIT else {"edgecolor": paper().ground}
        axes.barh(
            row,
            span.seconds,
            left=span.start_s - begin,
            height=0.72,
            color=STAGE_COLOURS[span.stage],
            lw=0.5,
            **hatched,
        )
        if span.stage != WAIT and span.seconds / length > _SHORTEST_LABELLED:
            colour = "white" if span.stage in ("rollout", "trainer") else "black"
            middle = (span.start_s + span.end_s) / 2 - begin
            axes.text(middle, row, str(span.step), ha="center", va="center", fontsize=9, color=colour)
