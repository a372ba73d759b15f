"""The verb `raydistill plan`: what a config will ask for, before anything starts.

Reads model configs and tokenizers only: the models are built on torch's meta device, data rows are not opened. The
arithmetic is `estimates`; this file fills in the sizes and prints.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from raydistill.cli import command_parser, console, print_table
from raydistill.config import Config
from raydistill.config.load import load_config
from raydistill.errors import ConfigError
from raydistill.preflight.devices import chosen_gpu, devices_of, rough_rates
from raydistill.preflight.estimates import (
    Answer,
    ModelSize,
    Stage,
    Step,
    StudentSize,
    stage_seconds,
    step_flops,
    step_seconds,
    wire_bytes,
)
from raydistill.preflight.kept import kept_answers_note
from raydistill.preflight.placement import NODE_RESOURCES, Demand, gpu_plan, placement_plan
from raydistill.preflight.planned import planned_models, with_world_model
from raydistill.preflight.sizes import longest, memory, model_size, student_size
from raydistill.preflight.speeds import Speeds, recorded_speeds
from raydistill.results.tables import format_bytes

SUMMARY = """\
Show what a config will ask for, and start nothing: actors, memory of each, bytes between them, FLOPs or time of a step.

Every number is an estimate; the formulas stand in raydistill/preflight/estimates.py. Data rows are not read:
without --prompt-tokens and --completion-tokens each sequence counts at its longest (data.max_length,
rollout.max_new_tokens), and memory always does. Without --like and --tokens-per-second-... the duration is rough: FLOPs
and bytes over a share of what the GPU's data sheet says, or of what a core of this machine does with one layer
(raydistill/preflight/devices.py)."""
EXAMPLES = """\
examples:
  raydistill plan @configs/int4_onpolicy.toml --trainer.num_workers 4 --trainer.sequences_per_step 32
        will it fit, and which actor is the largest
  raydistill plan @configs/demo.toml --like outputs/demo/runs/NAME
        the time it will take at the speeds that an earlier run recorded
  raydistill plan @configs/int4_onpolicy.toml --gpu H100 --completion-tokens 90
        roughly, on GPUs that are not here
  raydistill plan @mine.toml --tokens-per-second-rollout 2000 --tokens-per-second-teacher 9000 --tokens-per-second-trainer 1500
        the same at speeds that you measured: completion tokens per second of one actor (one rank)
"""
STAGES: tuple[Stage, ...] = ("rollout", "teacher", "trainer")
BETTER = (
    "roughly, a factor of two is nothing unusual; better: --like RUN_FOLDER (a run on the same machines, of a few steps) or "
    "--tokens-per-second-STAGE N"
)


def plan_command(argv: Sequence[str]) -> int:
    """The verb `plan`."""
    parser = command_parser("plan", SUMMARY, EXAMPLES)
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    parser.add_argument(
        "--like", type=Path, metavar="RUN_FOLDER", help="take speeds and lengths from this run's record"
    )
    parser.add_argument("--gpu", metavar="NAME", help="the GPUs of a rough duration (default: this machine's)")
    for stage in STAGES:
        name = f"--tokens-per-second-{stage}"
        parser.add_argument(name, type=float, metavar="N", help=f"completion tokens per second of one {stage} actor")
    for part in ("prompt", "completion"):
        parser.add_argument(f"--{part}-tokens", type=float, metavar="N", help=f"mean tokens of a {part} in your data")
    options, settings = parser.parse_known_args(list(argv))
    switches = vars(options)
    numbers = {key: value for key, value in switches.items() if "tokens" in key and value is not None}
    for key, value in numbers.items():
        if not 0 < value < float("inf"):
            raise ConfigError(f"--{key.replace('_', '-')} {value:g} is not above 0; give a number of tokens")
    config = with_world_model(load_config(settings).config)
    speeds = recorded_speeds(options.like, config) if options.like else Speeds(rates={})
    given = {stage: numbers[key] for stage in STAGES if (key := f"tokens_per_second_{stage}") in numbers}
    speeds = replace(speeds, rates={**speeds.rates, **given})
    gpu, remark = chosen_gpu(options.gpu) if _uses_gpus(config) else ("", None)
    report = make_plan(config, speeds, numbers.get("prompt_tokens"), numbers.get("completion_tokens"), gpu=gpu)
    report["notes"] += [remark] if remark else []
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        show(report)
    return 0


def _uses_gpus(config: Config) -> bool:
    return any(demand.num_gpus for demand in placement_plan(config))


def make_plan(
    config: Config,
    speeds: Speeds | None = None,
    prompt_tokens: float | None = None,
    completion_tokens: float | None = None,
    *,
    gpu: str | None = None,
) -> dict[str, Any]:
    """Everything that `plan` prints, as plain values; without `speeds` no duration. gpu: an entry of `devices.GPUS` (or "",
    where none is booked) that makes up for speeds that are not known; without it those stages are left out."""
    sizes = planned_sizes(config)
    student, teacher, answer = sizes.student, sizes.teacher, sizes.answer
    rough: dict[Stage, str] = {}
    speeds = speeds or Speeds(rates={})
    o = config.objective
    bound = longest(config)
    completion = min(completion_tokens or speeds.completion or bound.completion, config.data.max_length)
    prompt = min(prompt_tokens or bound.prompt, max(config.data.max_length - completion, 1))
    sampled = o.on_policy_fraction * config.trainer.sequences_per_step
    step = Step(
        sampled=sampled, given=config.trainer.sequences_per_step - sampled, prompt=prompt, completion=completion
    )
    if gpu is not None:
        speeds, rough = _made_up_for(speeds, config, student, teacher, step, gpu)
    flops = step_flops(student, teacher, step, config.trainer.gradient_checkpointing)
    wire = wire_bytes(student, step, answer, num_rollouts=config.rollout.num_actors)
    return {
        "is_estimate": True,
        "placement": [_placement_row(config, demand) for demand in placement_plan(config)],
        **actors_memory(config, sizes),
        "wire_bytes_per_step": wire,
        "flops_per_step": flops,
        "duration": duration(config, step, speeds, flops, rough),
        "step": asdict(step),
        "student": asdict(student),
        "teacher": asdict(teacher) if teacher is not None else None,
        "notes": [
            *_notes(config, prompt_tokens, completion_tokens or speeds.completion),
            *([kept] if (kept := kept_answers_note([config], completion_tokens or speeds.completion)) else []),
            *speeds.notes,
            *([sizes.note] if sizes.note else []),
        ],
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the memory, bytes and FLOPs of a config follow from, besides its numbers."""

    student: StudentSize
    teacher: ModelSize | None
    answer: Answer | None
    note: str | None


def planned_sizes(config: Config) -> Sizes:
    """Read off the config's models; raises what `planned_models` raises."""
    models, o = planned_models(config), config.objective
    candidates = o.top_k if o.target == "top_k" else None
    return Sizes(
        student=student_size(config, models.student),
        teacher=model_size(models.teacher) if models.teacher is not None else None,
        answer=Answer(vocab_size=models.vocab_size, candidates=candidates) if config.needs_teacher else None,
        note=models.note,
    )


def actors_memory(config: Config, sizes: Sizes) -> dict[str, list[dict[str, Any]]]:
    """`memory`: the parts of one actor of each role; `gpus`: the actors that share a GPU, and the sum of their parts."""
    parts = memory(config, sizes.student, sizes.teacher, sizes.answer)
    rows = [
        {"role": demand.role, "count": demand.count, **asdict(part)}
        for demand in placement_plan(config)
        for part in parts[demand.role]
        if part.bytes
    ]
    on_gpu = {role: sum(part.bytes for part in of_role if part.place == "GPU") for role, of_role in parts.items()}
    gpus = [
        {"roles": list(gpu.roles), "count": gpu.count, "share": gpu.share, "bytes": sum(on_gpu[r] for r in gpu.roles)}
        for gpu in gpu_plan(config)
    ]
    return {"memory": rows, "gpus": gpus}


def _made_up_for(
    speeds: Speeds, config: Config, student: StudentSize, teacher: ModelSize | None, step: Step, gpu: str
) -> tuple[Speeds, dict[Stage, str]]:
    """The speeds with a rough one for each stage that has none, and what that one was computed from."""
    at_work = [stage for stage, is_there in zip(STAGES, (step.sampled, teacher, True), strict=True) if is_there]
    missing = [stage for stage in at_work if stage not in speeds.rates]
    if not missing:
        return speeds, {}
    devices = devices_of(config, student.model, gpu)
    rates = rough_rates(config, student, teacher, step, devices)
    return replace(speeds, rates={**rates, **speeds.rates}), {stage: devices[stage].text for stage in missing}


def _placement_row(config: Config, demand: Demand) -> dict[str, Any]:
    is_rollout = demand.role == "rollout"
    return {
        "role": demand.role,
        "count": demand.count,
        "cpus_each": demand.num_cpus,
        "gpus_each": demand.num_gpus,
        "tensor_parallel_size": config.rollout.tensor_parallel_size if is_rollout else 1,
        "node_resource": NODE_RESOURCES[demand.role] if config.cluster.by_role else None,
    }


def _notes(config: Config, prompt_tokens: float | None, completion_tokens: float | None) -> list[str]:
    notes = []
    guessed = [name for name, value in (("prompt", prompt_tokens), ("completion", completion_tokens)) if value is None]
    if guessed:
        switches = " and ".join(f"--{name}-tokens" for name in guessed)
        notes.append(
            f"bytes and FLOPs count the longest {' and '.join(guessed)}; give your data's means with {switches}"
        )
    rollout = config.rollout
    if config.needs_rollout_pool and rollout.engine == "vllm" and rollout.num_gpus > 0:
        notes.append(
            f"vLLM takes {rollout.gpu_memory_utilization:.0%} of its GPUs whatever it needs "
            "(rollout.gpu_memory_utilization); the KV cache above is what all sequences at once would fill"
        )
    several = [
        role
        for role, gpus in (("rollout", rollout.num_gpus), ("teacher", config.teacher.num_gpus))
        if gpus > 1 and role in {d.role for d in placement_plan(config)}
    ]
    if several:
        notes.append(f"{' and '.join(several)}: the GPU parts above are those of each of an actor's GPUs")
    return notes


def duration(
    config: Config, step: Step, speeds: Speeds, flops: Mapping[Stage, float], rough: Mapping[Stage, str]
) -> dict[str, Any] | None:
    """Seconds of each stage, of a step and of all steps; None where a speed is not known. Start-up, evaluation and export are
    left out; publishing and loading weights count where a record says how long they took."""
    at_work = [stage for stage in STAGES if flops[stage] > 0]
    if any(stage not in speeds.rates for stage in at_work):
        return None
    actors: dict[Stage, int] = {
        "rollout": config.rollout.num_actors,
        "teacher": config.teacher.num_actors,
        "trainer": config.trainer.num_workers,
    }
    stages = stage_seconds(step, {stage: speeds.rates[stage] for stage in at_work}, actors)
    stages = {stage: seconds + speeds.sync_s.get(stage, 0.0) for stage, seconds in stages.items()}
    step_s = step_seconds(stages, config.sync.max_staleness)
    if rough and config.cluster.address is None:  # each stage was taken to have its cores to itself
        on_cores = sum(seconds * actors[stage] for stage, seconds in stages.items() if not _books_gpus(config, stage))
        step_s = max(step_s, on_cores / (os.cpu_count() or 1))
    return {
        "tokens_per_second": {stage: speeds.rates[stage] for stage in stages},
        "rough": dict(rough),
        "stage_s": stages,
        "max_staleness": config.sync.max_staleness,
        "step_s": step_s,
        "steps_s": step_s * config.trainer.num_steps,
        "recorded_step_s": speeds.step_s,
    }


def _books_gpus(config: Config, stage: Stage) -> bool:
    return any(demand.role == stage and demand.num_gpus > 0 for demand in placement_plan(config))


def show(report: Mapping[str, Any]) -> None:
    """The plan as tables on stdout."""
    placement = report["placement"]
    print_table(placement, list(placement[0]), title="actors")
    print_table(
        _memory_rows(report["memory"]), ["role", "place", "part", "size"], title="memory of one actor (estimate)"
    )
    if shared := [gpu for gpu in report["gpus"] if len(gpu["roles"]) > 1]:
        rows = [
            {"actors on one GPU": " + ".join(gpu["roles"]), "GPUs": gpu["count"], "memory": format_bytes(gpu["bytes"])}
            for gpu in shared
        ]
        print_table(rows, list(rows[0]), title="shared GPUs (estimate)")
    wire = [{"what": name, "size": format_bytes(size)} for name, size in report["wire_bytes_per_step"].items() if size]
    wire.append({"what": "sum", "size": format_bytes(sum(report["wire_bytes_per_step"].values()))})
    print_table(wire, ["what", "size"], title="bytes on the wire of one optimizer step (estimate)")
    time = report["duration"]
    rows = [
        {
            "stage": stage,
            "TFLOP": flops / 1e12,
            "tokens/s of one actor": time["tokens_per_second"][stage],
            "seconds": time["stage_s"][stage],
        }
        for stage, flops in report["flops_per_step"].items()
        if flops
    ]
    print_table(rows, list(rows[0]), title="one optimizer step (estimate)")
    print(_duration_line(report))
    for text, stages in _by_device(time["rough"]).items():
        console.print(f"note: the speed of {' and '.join(stages)} is a guess from {text}", style="dim")
    for note in report["notes"]:
        console.print(f"note: {note}", style="dim")


def _memory_rows(parts: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    rows = []
    for role, place in dict.fromkeys((part["role"], part["place"]) for part in parts):
        mine = [part for part in parts if (part["role"], part["place"]) == (role, place)]
        rows += [
            {"role": role, "place": place, "part": part["name"], "size": format_bytes(part["bytes"])} for part in mine
        ]
        total, count = sum(part["bytes"] for part in mine), mine[0]["count"]
        name = "sum" if count == 1 else f"sum of one (there are {count})"
        rows.append({"role": role, "place": place, "part": name, "size": format_bytes(total)})
    return rows


def _by_device(rough: Mapping[Stage, str]) -> dict[str, list[Stage]]:
    return {text: [stage for stage in rough if rough[stage] == text] for text in rough.values()}


def _duration_line(report: Mapping[str, Any]) -> str:
    time = report["duration"]
    staleness, step_s, recorded = time["max_staleness"], time["step_s"], time["recorded_step_s"]
    how = "the sum of the stages" if staleness == 0 else "the slowest stage, or all of them over the steps under way"
    line = f"about {step_s:.3g} s a step (S = {staleness}: {how}), {_clock(time['steps_s'])} for all steps"
    if recorded is not None:
        line += f"; that run took {recorded:.3g} s a step"
    return f"{line}; {BETTER}" if time["rough"] else line


def _clock(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
