"""One frame of `raydistill watch`: what the terminal shows of a run at a moment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from raydistill.report.plot_style import STAGE_COLOURS
from raydistill.report.summary import format_seconds
from raydistill.report.watch_state import RECENT_STEPS, WatchState

BLOCKS = "▁▂▃▄▅▆▇█"
_SPARK_WIDTH = 48
_BAR_WIDTH = 24
_SILENT_S = 60.0  # without a line for so long, and for many steps' time: something may be wrong
_SILENT_STEPS = 10
_SHOWN_WARNINGS = 4
_SHOWN_SAMPLES = 2
_LONGEST_TEXT = 240
_METRICS = {
    "trainer/loss": "loss",
    "trainer/kl_nats": "KL",
    "trainer/divergence_nats": "divergence",
    "trainer/cross_entropy_nats": "cross-entropy",
    "trainer/grad_norm": "gradient norm",
    "trainer/learning_rate": "learning rate",
    "rollout/completion_tokens": "tokens per completion",
    "rollout/queue_depth": "queue: rollout",
    "teacher/queue_depth": "queue: teacher",
}
_COLOUR_OF_STATUS = {"running": "cyan", "finished": "green", "failed": "red", "interrupted": "yellow"}


def frame(state: WatchState, folder: Path, now_s: float) -> RenderableType:
    """The whole frame; `now_s` is compared with the time of the record's last line."""
    start = state.start or {}
    colour = _COLOUR_OF_STATUS[state.status]
    title = Text.assemble((str(start.get("name") or folder.name), "bold"), "  ", (state.status, f"bold {colour}"))
    parts: list[RenderableType] = [_progress(state, now_s)]
    parts += [part for part in (_metrics(state), _evaluations(state), _stages(state), _samples(state)) if part]
    parts += _warnings(state)
    return Panel(Group(*parts), title=title, title_align="left", subtitle=Text(str(folder)), subtitle_align="left")


def sparkline(values: Sequence[float], width: int = _SPARK_WIDTH) -> str:
    """The course of some numbers in one line of text, from their lowest to their highest; `!` for NaN and infinity."""
    chosen = [_mean(part) for part in _parts(values, width)]
    finite = [value for value in chosen if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((value - low) * scale)] if math.isfinite(value) else "!" for value in chosen)


def _parts(values: Sequence[float], width: int) -> list[Sequence[float]]:
    """At most `width` pieces of equal length, together all values."""
    count = min(len(values), width)
    edges = [round(place * len(values) / count) for place in range(count + 1)] if count else []
    return [values[begin:end] for begin, end in pairwise(edges)]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.nan


def _progress(state: WatchState, now_s: float) -> RenderableType:
    if state.end is not None and not state.steps:
        return Text(_pace(state))  # a record of something that trains nothing, such as a study's comparison
    grid = Table.grid(padding=(0, 2))
    total = state.num_steps
    count = f"{state.steps_done:,}" + (f" of {total:,} steps" if total else " steps")
    bar = ProgressBar(total=total or 1, completed=state.steps_done, width=30)
    grid.add_row(Text(count, style="bold"), bar, Text(_pace(state)))
    return Group(grid, *_silence(state, now_s))


def _pace(state: WatchState) -> str:
    if state.end is not None:
        message = f": {state.end['message']}" if state.end.get("message") else ""
        took = format_seconds(state.last_s - (state.start or state.end)["time_s"])
        return f"{state.status} after {took}{message}"
    pace = f"{state.seconds_per_step:.2g} s per step" if state.seconds_per_step is not None else "starting"
    eta = f", about {format_seconds(state.eta_s)} left" if state.eta_s is not None else ""
    resumed = f", resumed {state.num_resumes} time{'s' if state.num_resumes > 1 else ''}" if state.num_resumes else ""
    return pace + eta + resumed


def _silence(state: WatchState, now_s: float) -> list[RenderableType]:
    silent_s = now_s - state.last_s
    patience_s = max(_SILENT_S, _SILENT_STEPS * (state.seconds_per_step or _SILENT_S))
    if state.end is not None or not state.last_s or silent_s < patience_s:
        return []
    text = f"no new line for {format_seconds(silent_s)}: the driver may have died (or its clock differs from this one)"
    return [Text(text, style="yellow")]


def _metrics(state: WatchState) -> RenderableType | None:
    grid = Table.grid(padding=(0, 2))
    for metric, label in _METRICS.items():
        values = state.history(metric)
        if values and not (metric == "trainer/divergence_nats" and values == state.history("trainer/loss")):
            grid.add_row(Text(label), Text(f"{values[-1]:.4g}", justify="right"), Text(sparkline(values), style="blue"))
    return _section("steps", grid) if grid.rows else None


def _evaluations(state: WatchState) -> RenderableType | None:
    rows = state.evaluation_rows()
    if not rows:
        return None
    names = list(dict.fromkeys(name for row in rows for name in row if name != "version"))
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("version", *(name.removeprefix("evaluate/") for name in names)):
        table.add_column(Text(name), justify="right")
    for row in rows:
        table.add_row(str(row["version"]), *(Text(row.get(name, "-")) for name in names))
    return _section("held out, ± standard error", table)


def _stages(state: WatchState) -> RenderableType | None:
    shares = state.stage_shares()
    if not shares:
        return None
    grid = Table.grid(padding=(0, 2))
    for one in shares:
        busy = round(one.busy * _BAR_WIDTH)
        waiting = min(round(one.waiting * _BAR_WIDTH), _BAR_WIDTH - busy)
        bar = Text.assemble(("█" * busy, STAGE_COLOURS[one.stage]), ("░" * waiting, "bright_black"))
        bar.append(" " * (_BAR_WIDTH - busy - waiting))
        grid.add_row(Text(one.stage), bar, Text(f"busy {one.busy:4.0%}"), Text(f"waiting {one.waiting:4.0%}"))
    return _section(f"the last {min(RECENT_STEPS, state.steps_done)} steps: █ busy, ░ waiting", grid)


def _samples(state: WatchState) -> RenderableType | None:
    if state.samples is None:
        return None
    grid = Table.grid(padding=(0, 2))
    for row in state.samples["rows"][:_SHOWN_SAMPLES]:
        for who, style in (("prompt", "bright_black"), ("teacher", "bright_black"), ("student", "bold")):
            if row.get(who) is not None:
                grid.add_row(Text(who, style="bright_black"), Text(_one_line(row[who]), style=style))
    return _section(f"samples of version {state.samples['version']}", grid)


def _warnings(state: WatchState) -> list[RenderableType]:
    last = list(state.warnings.items())[-_SHOWN_WARNINGS:]
    lines: list[RenderableType] = [
        Text(f"warning: {_one_line(text)}" + (f" ({count} times)" if count > 1 else ""), style="yellow")
        for text, count in last
    ]
    left_out = len(state.warnings) - len(last)
    return [Text(f"{left_out} earlier warnings", style="yellow"), *lines] if left_out else lines


def _section(title: str, content: RenderableType) -> RenderableType:
    return Group(Text(""), Text(title, style="bright_black"), content)


def _one_line(text: str) -> str:
    """Text of a model or an error on one line, without control characters that would move the cursor."""
    plain = "".join(letter if letter.isprintable() else "⏎" if letter == "\n" else " " for letter in text)
    return plain if len(plain) <= _LONGEST_TEXT else f"{plain[:_LONGEST_TEXT]}..."
