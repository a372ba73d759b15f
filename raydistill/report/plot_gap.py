"""How far trainer and engines were apart at each sync: the policy gap over the versions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from raydistill.report.plot_style import log_axis, new_figure, paper, save_figure, whole_steps

_MARKED = 60  # so many points or fewer are marked


def plot_policy_gap(record: Iterable[Mapping[str, Any]], path: Path, bound_nats: float | None = None) -> Path:
    """Mean and 99th percentile of |trainer - engine| log-prob over the probe tokens, per engine; the bound as a line."""
    syncs = [line for line in record if line["kind"] == "sync" and line.get("gap_mean_nats") is not None]
    figure, (axes,) = new_figure(1, height=3.2)
    colours = paper().lines
    for place, actor in enumerate(dict.fromkeys(line["actor"] for line in syncs)):
        of_actor = [line for line in syncs if line["actor"] == actor]
        colour, versions = colours[place % len(colours)], [line["version"] for line in of_actor]
        marker = "o" if len(of_actor) <= _MARKED else ""
        means = [line["gap_mean_nats"] for line in of_actor]
        axes.plot(versions, means, color=colour, lw=1.3, marker=marker, ms=3.5, label=f"{actor}, mean")
        tails: list[Any] = [line.get("gap_p99_nats") for line in of_actor]
        if None not in tails:
            axes.plot(versions, tails, color=colour, lw=1.0, ls=":", label=f"{actor}, 99th percentile")
    if bound_nats is not None:
        axes.axhline(bound_nats, color=paper().faint, lw=1.2, ls="--", label="bound: the run stops above it")
    if any(line["gap_mean_nats"] > 0 for line in syncs):
        log_axis(axes)
    whole_steps(axes)
    axes.set_xlabel("policy version")
    axes.set_ylabel("nats per probe token")
    axes.set_title("Policy gap: trainer against rollout engines", loc="left", pad=30)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=4, frameon=False, borderpad=0, fontsize=9)
    return save_figure(figure, path)
