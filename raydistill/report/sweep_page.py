"""A sweep as a ranked table (markdown, CSV, JSON), pictures, and one HTML page; written again as often as its trials end.

    page = write_sweep_page(output / "sweeps" / "rates")

Needs `sweep.json`, and for the settings the sweep's record; starts nothing and opens no store: light enough for the sweep's
own driver. Every file is whole at every moment.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from raydistill.report.importance import Importance, importance
from raydistill.report.page import Cell, PageTable, cell, picture, plain, render, write_whole_text
from raydistill.report.run_view import view_of
from raydistill.report.settings import all_settings, changed_table
from raydistill.report.summary import format_seconds
from raydistill.report.sweep import SEED, Estimate, Point, Sweep, ranked, read_sweep
from raydistill.report.sweep_plots import field_of_curve, plot_importance, plot_over_field, plot_parallel, short_names
from raydistill.report.verdict import ALPHA
from raydistill.results.record_lines import start_of
from raydistill.results.run_folders import is_at_work

IMPORTANCE = "importance"
_LONGEST_ERROR = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPage:
    """What was written."""

    page: Path
    markdown: Path
    csv: Path
    json: Path
    plots: dict[str, Path]
    rows: list[dict[str, Any]]  # of the table, best first


def write_sweep_page(folder: Path) -> SweepPage:
    """Write `page.html`, `table.md`, `table.csv`, `table.json` and `plots/*.png` into a sweep's folder."""
    sweep = read_sweep(folder)
    points = ranked(sweep)
    shares = importance(sweep, points)
    rows = table_rows(sweep, points)
    drawings = _drawings(sweep, points, shares)
    plots = {name: drawing.draw(folder / "plots" / f"{name}.png") for name, drawing in drawings.items()}
    whole = {"name": sweep.name, "metric": sweep.metric, "mode": sweep.mode, "rows": rows, "importance": shares.shares}
    return SweepPage(
        page=write_whole_text(folder / "page.html", _page(folder, sweep, points, shares, drawings)),
        markdown=write_whole_text(folder / "table.md", table_markdown(sweep, points)),
        csv=write_whole_text(folder / "table.csv", _table_csv(rows)),
        json=write_whole_text(folder / "table.json", json.dumps(whole, indent=1) + "\n"),
        plots=plots,
        rows=rows,
    )


def sweep_page(folder: Path) -> str:
    """The page alone; writes nothing into the sweep's folder."""
    sweep = read_sweep(folder)
    points = ranked(sweep)
    shares = importance(sweep, points)
    return _page(folder, sweep, points, shares, _drawings(sweep, points, shares))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Drawing:
    """A plot that can be drawn to a path."""

    alt: str
    draw: Callable[[Path], Path]


def _drawings(sweep: Sweep, points: Sequence[Point], shares: Importance) -> dict[str, _Drawing]:
    """The plots of a sweep by name, in the order of the page; those that there is something to draw for."""
    found = {}
    if shares.shares:
        told = ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.shares.items())
        found[IMPORTANCE] = _Drawing(alt=f"importance: {told}", draw=partial(plot_importance, shares, sweep.metric))
    field = field_of_curve(sweep, points)
    if field is not None:
        found["curve"] = _Drawing(alt=f"over {field}", draw=partial(plot_over_field, sweep, points, field))
    found["parallel"] = _Drawing(alt="parallel coordinates", draw=partial(plot_parallel, sweep, points))
    return found


def table_rows(sweep: Sweep, points: Sequence[Point]) -> list[dict[str, Any]]:
    """One plain row for each point, best first; `n` counts the seeds behind mean and standard error."""
    rows = []
    for rank, point in enumerate(points, 1):
        one = point.estimate
        rows.append(
            {
                "rank": rank if point.status == "finished" and one else None,
                **point.values,
                f"{sweep.metric} mean": one.mean if one else None,
                f"{sweep.metric} se": one.se if one else None,
                "n": one.n if one else 0,
                "status": point.status,
                "runs": [trial.run for trial in point.trials],
                "seconds": _seconds(point),
                "error": "; ".join(point.errors) or None,
            }
        )
    return rows


def table_markdown(sweep: Sweep, points: Sequence[Point]) -> str:
    """The ranked table for a README or a report."""
    table = _ranked_table(sweep, points, list(sweep.varied), with_runs=True)
    lines = ["| " + " | ".join(table.columns) + " |"]
    lines.append("|" + "|".join("---:" if number else "---" for number in table.is_number) + "|")
    for row in table.rows:
        cells = [one.text.replace("|", "\\|").replace("\n", " ") for one in row]
        lines.append("| " + " | ".join(f"**{text}**" if row[0].is_strong and text else text for text in cells) + " |")
    return "\n".join(lines) + "\n"


def _table_csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(row | {"runs": " ".join(row["runs"])})
    return text.getvalue()


def _ranked_table(sweep: Sweep, points: Sequence[Point], titles: Sequence[str], with_runs: bool = False) -> PageTable:
    """What is shown of each point; its error only where one failed. `titles` are those of the fields."""
    has_errors = any(point.errors for point in points)
    repeats = any(point.num_seeds > 1 for point in points)
    columns = ["#", *titles, sweep.metric, *(["seeds"] if repeats else []), "status", "training"]
    columns += (["runs"] if with_runs else []) + (["error"] if has_errors else [])
    rows = []
    for rank, point in enumerate(points, 1):
        one, seconds = point.estimate, _seconds(point)
        is_best = rank == 1 and point.status == "finished" and one is not None
        counted = point.status == "finished" and one is not None
        cells = [cell(rank if counted else None, is_strong=is_best)]
        cells += [cell(point.values.get(name)) for name in sweep.varied]
        cells.append(Cell(text=str(one), value=one.mean) if one else cell(None))
        if repeats:
            done = one.n if one else 0
            cells.append(cell(done, f"{done} of {point.num_seeds}"))
        cells.append(cell("stopped early" if point.status == "stopped" else point.status))
        cells.append(cell(seconds, format_seconds(seconds)) if seconds is not None else cell(None))
        if with_runs:
            cells.append(cell([trial.run for trial in point.trials]))
        if has_errors:
            cells.append(cell("; ".join(point.errors)[:_LONGEST_ERROR]))
        rows.append(tuple(cells))
    return PageTable(columns=tuple(columns), rows=tuple(rows))


def _seconds(point: Point) -> float | None:
    """Mean training time of a point's trials."""
    known = [seconds for trial in point.trials if (seconds := trial.seconds.get("train")) is not None]
    return math.fsum(known) / len(known) if known else None


def _page(
    folder: Path, sweep: Sweep, points: Sequence[Point], shares: Importance, drawings: Mapping[str, _Drawing]
) -> str:
    counts: Counter[str] = Counter(trial.status for trial in sweep.trials)
    extreme = "lowest" if sweep.mode == "min" else "highest"
    pictures = {name: picture(drawing.alt, drawing.draw) for name, drawing in drawings.items()}
    settings = _settings(folder, sweep)
    return render(
        "sweep.html.j2",
        title=sweep.name,
        subtitle=f"A sweep over {', '.join(sweep.fields)}; the {extreme} {sweep.metric} wins.",
        status=_status(folder, sweep, counts),
        sections=[
            ("summary", "Summary"),
            ("table", "Table"),
            ("importance", "Importance"),
            ("plots", "Plots"),
            ("trials", "Trials"),
            *([("settings", "Settings")] if settings else []),
        ],
        tiles=_tiles(sweep, points, counts),
        summary=_sentences(sweep, points, counts),
        table=_ranked_table(sweep, points, short_names(sweep.varied)),
        importance={"text": shares.text[0].upper() + shares.text[1:], "picture": pictures.pop(IMPORTANCE, None)},
        pictures=list(pictures.values()),
        trials=_trials(sweep),
        settings=settings,
        folder=str(folder),
    )


def _settings(folder: Path, sweep: Sweep) -> dict[str, Any] | None:
    """What all trials have in common, by the sweep's own record; None where it has none."""
    start = start_of(folder)
    if start is None or not start.get("config"):
        return None
    view = view_of([start], folder)
    return {"changed": changed_table(view, sweep.fields), "all": all_settings(view, sweep.fields)}


def _status(folder: Path, sweep: Sweep, counts: Counter[str]) -> str:
    """Of the whole sweep, also between two trials. One that was killed says nothing, but holds its folder no more."""
    if counts["running"] or counts["pending"] or sweep.num_left:
        with suppress(OSError):  # a folder that may only be read: nobody knows
            if sweep.paused or not is_at_work(folder):
                return "interrupted"
        return "running"
    return "finished" if counts["finished"] else "failed"


def _tiles(sweep: Sweep, points: Sequence[Point], counts: Counter[str]) -> list[tuple[str, str]]:
    best = points[0] if points and points[0].status == "finished" else None
    tiles = [(f"best {sweep.metric}", str(best.estimate))] if best and best.estimate else []
    tiles.append((f"of {len(sweep.trials) + sweep.num_left} trials finished", str(counts["finished"])))
    tiles += [
        (name, str(counts[key])) for key, name in (("stopped", "stopped early"), ("failed", "failed")) if counts[key]
    ]
    seconds = [trial.seconds.get("train") for trial in sweep.trials]
    total = math.fsum(value for value in seconds if value is not None)
    return [*tiles, ("of training, all trials", format_seconds(total))] if total else tiles


def _sentences(sweep: Sweep, points: Sequence[Point], counts: Counter[str]) -> list[str]:
    """The best point, whether it is really better than the next one, how the trials ended."""
    finished = [point for point in points if point.status == "finished" and point.estimate is not None]
    said = []
    if finished:
        said.append(f"Best: {_words(finished[0])}, with {sweep.metric} {finished[0].estimate}{_seeds(finished[0])}.")
    else:
        said.append("No point has finished yet.")
    if len(finished) > 1:
        said.append(_against_next(finished[0], finished[1]))
    ended = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    to_come = f"; {sweep.num_left} trials have not begun" if sweep.num_left else ""
    said.append(f"{len(sweep.trials)} trials of {len(points)} points: {ended}{to_come}.")
    return said


def _against_next(best: Point, second: Point) -> str:
    first, other = best.estimate, second.estimate
    assert first is not None and other is not None
    if first.se is None or other.se is None:
        return (
            f"The next one, {_words(second)}, has {other}. Without repetitions nobody knows whether that is a difference: add "
            f"{SEED} to the fields that vary."
        )
    gap, error = abs(first.mean - other.mean), _margin(first, other)
    clear = "clearly better than" if gap > error else "not shown to be better than"
    return f"It is {clear} the next one, {_words(second)}: {other}, a difference of {gap:.2g} ± {error:.2g}."


def _margin(first: Estimate, other: Estimate) -> float:
    """Half the 95 % interval of a difference of means over a few seeds each (Welch's t)."""
    from scipy.special import stdtrit

    assert first.se is not None and other.se is not None
    parts = (first.se**2, other.se**2)
    total = math.fsum(parts)
    if total == 0:
        return 0.0
    freedom = total**2 / (parts[0] ** 2 / (first.n - 1) + parts[1] ** 2 / (other.n - 1))
    return float(stdtrit(freedom, 1 - ALPHA / 2)) * math.sqrt(total)


def _words(point: Point) -> str:
    return ", ".join(f"{name} {plain(value)}" for name, value in point.values.items()) or "the only point"


def _seeds(point: Point) -> str:
    return f" over {point.estimate.n} seeds" if point.estimate and point.estimate.n > 1 else ""


def _trials(sweep: Sweep) -> PageTable:
    """Every trial with all its metrics."""
    metrics = list(dict.fromkeys(name for trial in sweep.trials for name in trial.metrics))
    rows = tuple(
        (
            cell(trial.run),
            cell(trial.status),
            *(cell(trial.values.get(name)) for name in sweep.fields),
            *(cell(trial.metrics.get(name)) for name in metrics),
            *(cell(trial.seconds.get(name)) for name in ("start", "train")),
            cell((trial.error or "")[:_LONGEST_ERROR]),
        )
        for trial in sweep.trials
    )
    columns = ("run", "status", *short_names(sweep.fields), *metrics, "start (s)", "train (s)", "error")
    return PageTable(columns=columns, rows=rows)
