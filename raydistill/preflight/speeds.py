"""How fast the stages of a run were, read off its record, for plans of another one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from raydistill.config import Config
from raydistill.errors import UserError
from raydistill.preflight.estimates import Stage
from raydistill.results.record_lines import read_record, read_spans, start_of
from raydistill.results.timeline import bottleneck

SPEED_FIELDS = {  # what a speed depends on, besides the machine
    "student": ("model", "dtype"),
    "teacher": ("model", "dtype", "num_gpus"),
    "adapter": ("mode", "rank"),
    "quant": ("format",),
    "objective": ("target", "top_k"),
    "rollout": ("engine", "num_gpus", "tensor_parallel_size"),
    "trainer": ("num_gpus", "sequences_per_micro_batch", "gradient_checkpointing", "zero_stage"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """What an earlier run measured, or the user says."""

    rates: dict[Stage, float]  # completion tokens per second of one actor
    sync_s: dict[Stage, float] = field(default_factory=dict)  # of each step: loading (rollout), publishing (trainer)
    completion: float | None = None  # tokens of one completion there
    step_s: float | None = None  # between two steps there
    notes: tuple[str, ...] = ()


def recorded_speeds(folder: Path, config: Config) -> Speeds:
    """Completion tokens per busy second of one actor, over all steps of a run's record; and how that run differed."""
    lines = list(read_record(folder))
    steps = [line["metrics"] for line in lines if line["kind"] == "step"]
    start = start_of(folder)
    if start is None or not steps:
        raise UserError(f"--like {folder}: no recorded steps there; give the folder of a run, <run.output>/runs/NAME")
    there = start["config"]
    rates: dict[Stage, float] = {}
    pools: tuple[Stage, ...] = ("rollout", "teacher")
    for stage in pools:
        busy = sum(m.get(f"{stage}/busy_s", 0.0) for m in steps)
        tokens = sum(m.get(f"{stage}/busy_s", 0.0) * m.get(f"{stage}/tokens_per_s", 0.0) for m in steps)
        if busy > 0 and tokens > 0:
            rates[stage] = tokens / busy
    trained, busy = (sum(m.get(f"trainer/{name}", 0.0) for m in steps) for name in ("tokens", "busy_s"))
    if busy > 0 and trained > 0:
        rates["trainer"] = trained / busy / there["trainer"]["num_workers"]
    loads = [line["seconds"] for line in lines if line["kind"] == "sync"]
    notes = [f"speeds are those of {folder.name}: {bottleneck(read_spans(folder))}"]
    if other := _differences(there, config.model_dump(mode="json")):
        notes.append(f"that run differs, so its speeds may not hold: {', '.join(other)}")
    return Speeds(
        rates=rates,
        sync_s={
            "rollout": fmean(loads) if loads and config.needs_rollouts else 0.0,
            "trainer": fmean(m.get("trainer/publish_s", 0.0) for m in steps),
        },
        completion=trained / len(steps) / there["trainer"]["sequences_per_step"] or None,
        step_s=median(m.get("loop/step_s", 0.0) for m in steps),
        notes=tuple(notes),
    )


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Settings on which a speed depends, where two configs differ."""
    return [
        f"{section}.{name} {there[section].get(name)} there, {here[section][name]} here"
        for section, names in SPEED_FIELDS.items()
        for name in names
        if there[section].get(name) != here[section][name]
    ]
