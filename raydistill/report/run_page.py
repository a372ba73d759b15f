"""One run as an HTML page that stands alone: summary, comparison, curves, timeline, policy gap, samples, settings."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

from raydistill.config import Config
from raydistill.config.fields import config_fields
from raydistill.report.curves import panels_of, plot_panel
from raydistill.report.page import Cell, PageTable, Picture, cell, picture, plain, render, table_of
from raydistill.report.plot_gap import plot_policy_gap
from raydistill.report.plot_style import STAGE_COLOURS
from raydistill.report.plots import plot_bytes_kl, plot_spans
from raydistill.report.run_view import Comparison, Measured, RunView, comparison_of
from raydistill.report.settings import all_settings, changed_table
from raydistill.report.summary import format_seconds, percent, sentences
from raydistill.report.verdict import next_steps, verdict
from raydistill.results.tables import comparison_cells, comparison_columns, format_bytes, format_kl
from raydistill.results.timeline import bottleneck, overlap_seconds, stage_times, wall_seconds
from raydistill.results.translate import leaves

_MAX_SAMPLES = 12


def run_page(view: RunView) -> str:
    """The page of a run."""
    comparison = comparison_of(view)
    parts = {
        "comparison": _comparison(comparison) if comparison else None,
        "curves": _curves(view),
        "timeline": _timeline(view) if view.spans else None,
        "gap": _gap(view),
        "samples": _samples(view),
    }
    names = {
        "comparison": "Comparison",
        "curves": "Curves",
        "timeline": "Timeline",
        "gap": "Policy gap",
        "samples": "Samples",
    }
    return render(
        "run.html.j2",
        title=view.name,
        subtitle=f"A run of {time.strftime('%Y-%m-%d %H:%M', time.localtime(view.start['time_s']))}.",
        status=view.status,
        sections=[
            ("summary", "Summary"),
            *((key, name) for key, name in names.items() if parts[key]),
            ("settings", "Settings"),
            ("record", "Record"),
        ],
        tiles=_tiles(view, comparison),
        summary=sentences(view, comparison.rows if comparison and comparison.is_about_this_run else ()),
        warnings=list(Counter(view.warnings).items()),
        num_warnings=len(view.warnings),
        quality=_quality(view),
        changed=changed_table(view),
        all_settings=all_settings(view),
        facts=_facts(view),
        tables=[table_of(line["rows"], caption=name) for name, line in view.tables.items() if line["rows"]],
        provenance=[(name, plain(value)) for name, value in leaves(view.start.get("provenance") or {}).items()],
        **parts,
    )


def _tiles(view: RunView, comparison: Comparison | None) -> list[tuple[str, str]]:
    """The numbers to see first."""
    tiles = []
    last = {one.name: one.last for one in view.quality}
    if "evaluate/kl_nats" in last:
        tiles.append(("KL to the teacher, nats per token, held out", format_kl(last["evaluate/kl_nats"].value)))
    if "evaluate/exact_match" in last:
        tiles.append(("exact match, held out", percent(last["evaluate/exact_match"])))
    student = next((row for row in comparison.rows if row.role == "student"), None) if comparison else None
    if student and comparison and comparison.is_about_this_run:
        tiles.append(("size of what is served", format_bytes(student.bytes)))
    if view.steps:
        tiles.append(("optimizer steps", f"{len(view.steps):,}"))
    if view.spans:
        tiles.append(("of training", format_seconds(view.training_seconds)))
    if view.warnings:
        tiles.append(("warnings", str(len(view.warnings))))
    return tiles


def _quality(view: RunView) -> PageTable:
    """Every held-out metric of every evaluated version."""
    names = [one.name for one in view.quality]
    rows = []
    for line in view.evaluations:
        metrics = line["metrics"]
        cells = [cell(line["version"])]
        for name in names:
            value = metrics.get(name)
            shown = None if value is None else Measured(version=0, value=value, se=metrics.get(f"{name}_se"))
            cells.append(cell(value, str(shown) if shown else "-"))
        rows.append(tuple(cells))
    columns = ("version", *(name.removeprefix("evaluate/") for name in names))
    return PageTable(columns=columns, rows=tuple(rows), caption="Held-out rows, ± standard error")


def _comparison(comparison: Comparison) -> dict[str, Any]:
    rows = comparison.rows
    table = PageTable(
        columns=tuple(comparison_columns(rows)),
        rows=tuple(
            tuple(Cell(text=text, value=value, is_strong=row.role == "student") for text, value in cells)
            for row, cells in zip(rows, comparison_cells(rows), strict=True)
        ),
    )
    return {
        "text": None if comparison.is_about_this_run else f"{verdict(rows)} {next_steps(rows)}",  # else in the summary
        "table": table,
        "picture": picture("bytes against KL to the teacher", lambda path: plot_bytes_kl(rows, path)),
        "source": comparison.source,
    }


def _curves(view: RunView) -> list[Picture]:
    records = {view.name: view.lines}
    return [picture(panel.title, partial(plot_panel, panel, records)) for panel in panels_of(records)]


def _timeline(view: RunView) -> dict[str, Any]:
    times = stage_times(view.spans)
    stages = [
        {
            "name": stage,
            "num_actors": times[stage].num_actors,
            "busy": f"{100 * times[stage].busy_share:.0f}",
            "wait": f"{100 * times[stage].wait_share:.0f}",
            "colour": colour,
        }
        for stage, colour in STAGE_COLOURS.items()
        if stage in times
    ]
    line = bottleneck(view.spans)
    overlap = format_seconds(overlap_seconds(view.spans, "rollout", "trainer")) if "rollout" in times else None
    return {
        "bottleneck": line[0].upper() + line[1:],
        "overlap": overlap,
        "wall": format_seconds(wall_seconds(view.spans)),
        "stages": stages,
        "picture": picture("who was busy when", lambda path: plot_spans(view.spans, path)),
    }


def _gap(view: RunView) -> dict[str, Any] | None:
    syncs = [line for line in view.of_kind("sync") if line.get("gap_mean_nats") is not None]
    if not syncs:
        return None
    bound = Config.model_validate(_known(view.config)).policy_gap_bound_nats if view.config else None
    worst = max(syncs, key=lambda line: line["gap_mean_nats"])
    limit = f"; the run stops above {bound:.0e}" if bound is not None else ""
    text = (
        f"At each of {len(syncs)} checked syncs, trainer and engines scored the same probe tokens with the same version. They "
        f"were furthest apart at version {worst['version']} ({worst['actor']}): {worst['gap_mean_nats']:.1e} nats per token on "
        f"average{limit}."
    )
    return {"text": text, "picture": picture("policy gap", lambda path: plot_policy_gap(syncs, path, bound))}


def _known(config: Mapping[str, Any]) -> dict[str, Any]:
    """The two sections that bound the policy gap, without fields of another version."""
    fields = config_fields()
    return {
        section: {name: value for name, value in config.get(section, {}).items() if f"{section}.{name}" in fields}
        for section in ("student", "sync")
    }


def _samples(view: RunView) -> dict[str, Any] | None:
    """What the first and the last recorded version wrote, beside the teacher's."""
    if not view.samples:
        return None
    first, last = view.samples[0], view.samples[-1]
    before = {row["row_id"]: row.get("student") for row in first["rows"]} if first is not last else {}
    rows = []
    for row in last["rows"][:_MAX_SAMPLES]:
        texts = [("reference", row.get("reference"), False), ("teacher", row.get("teacher"), False)]
        texts.append((f"student, version {first['version']}", before.get(row["row_id"]), False))
        texts.append((f"student, version {last['version']}", row.get("student"), True))
        kept = [(label, text, is_new) for label, text, is_new in texts if text is not None]
        rows.append({"row_id": row["row_id"], "prompt": row["prompt"], "texts": kept})
    left_out = f"; {len(last['rows']) - len(rows)} more are in the record" if len(last["rows"]) > len(rows) else ""
    return {"text": f"Held-out rows, answered by policy version {last['version']}{left_out}.", "rows": rows}


def _facts(view: RunView) -> list[tuple[str, str]]:
    start = view.start
    facts = {
        "folder": view.folder,
        "record": start.get("record_id"),
        "seed": start.get("seed"),
        "data": start.get("data_fingerprint"),
        "held-out data": start.get("held_out_fingerprint"),
        **view.artifacts,
    }
    return [(name, str(value)) for name, value in facts.items() if value is not None]
