"""The verb `raydistill plan`: what a config will ask for, before anything starts.

Reads model configs and tokenizers only: the models are built on torch's meta device, data rows are not opened. The
arithmetic is `estimates`; this file fills in the sizes and prints.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from raydistill.cli import command_parser, console, print_table
from raydistill.config import Config
from raydistill.config.load import load_config
from raydistill.errors import ConfigError, UserError
from raydistill.preflight.estimates import Answer, Stage, Step, stage_seconds, step_flops, step_seconds, wire_bytes
from raydistill.preflight.placement import NODE_RESOURCES, Demand, placement_plan
from raydistill.preflight.sizes import longest, memory, model_size, student_size
from raydistill.results.record_lines import read_record, read_spans, start_of
from raydistill.results.tables import format_bytes
from raydistill.results.timeline import bottleneck
from raydistill.worlds import world_folder

SUMMARY = """\
Show what a config will ask for, and start nothing: actors, memory of each, bytes between them, FLOPs or time of a step.

Every number is an estimate; the formulas stand in raydistill/preflight/estimates.py. Data rows are not read:
without --prompt-tokens and --completion-tokens each sequence counts at its longest (data.max_length,
rollout.max_new_tokens), and memory always does."""
EXAMPLES = """\
examples:
  raydistill plan @configs/int4_onpolicy.toml --trainer.num_workers 4 --trainer.sequences_per_step 32
        will it fit, and which actor is the largest
  raydistill plan @configs/demo.toml --like outputs/demo/runs/NAME
        the time it will take at the speeds that an earlier run recorded
  raydistill plan @mine.toml --tokens-per-second-rollout 2000 --tokens-per-second-teacher 9000 --tokens-per-second-trainer 1500
        the same at speeds that you measured: completion tokens per second of one actor (one rank)
"""
STAGES: tuple[Stage, ...] = ("rollout", "teacher", "trainer")
SPEED_FIELDS = {  # what a speed depends on, besides the machine
    "student": ("model", "dtype"),
    "teacher": ("model", "dtype", "num_gpus"),
    "adapter": ("mode", "rank"),
    "quant": ("format",),
    "objective": ("target", "top_k"),
    "rollout": ("engine", "num_gpus", "tensor_parallel_size"),
    "trainer": ("num_gpus", "sequences_per_micro_batch", "gradient_checkpointing", "zero_stage"),
}
NO_SPEED = (
    "no duration: nobody said how fast {missing}. Give --like RUN_FOLDER (a run on the same machines) or "
    "--tokens-per-second-{first} N (completion tokens per second of one actor)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """What an earlier run measured, or the user says."""

    rates: dict[Stage, float]  # completion tokens per second of one actor
    sync_s: dict[Stage, float] = field(default_factory=dict)  # of each step: loading (rollout), publishing (trainer)
    completion: float | None = None  # tokens of one completion there
    step_s: float | None = None  # between two steps there
    notes: tuple[str, ...] = ()


def plan_command(argv: Sequence[str]) -> int:
    """The verb `plan`."""
    parser = command_parser("plan", SUMMARY, EXAMPLES)
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    parser.add_argument(
        "--like", type=Path, metavar="RUN_FOLDER", help="take speeds and lengths from this run's record"
    )
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
    report = make_plan(config, speeds, numbers.get("prompt_tokens"), numbers.get("completion_tokens"))
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        show(report)
    return 0


def with_world_model(config: Config) -> Config:
    """The config with the model that its embedded world made earlier; building one is not this verb's work."""
    if config.world.name == "none" or None not in (config.student.model, config.teacher.model):
        return config
    teacher = world_folder(config) / "teacher"
    if not (teacher / "config.json").is_file():
        raise ConfigError(
            f"world.name={config.world.name!r} makes its own model, and {teacher} is not there yet: start the run once "
            "(`raydistill demo` or `train`), or plan with others (--student.model FOLDER --teacher.model FOLDER)"
        )
    student = config.student.model_copy(update={"model": config.student.model or str(teacher)})
    teaching = config.teacher.model_copy(update={"model": config.teacher.model or str(teacher)})
    return config.model_copy(update={"student": student, "teacher": teaching})


def make_plan(
    config: Config, speeds: Speeds, prompt_tokens: float | None = None, completion_tokens: float | None = None
) -> dict[str, Any]:
    """Everything that `plan` prints, as plain values."""
    from raydistill.models import empty_model
    from raydistill.preflight.checks import check_models

    facts = check_models(config)
    student_model = config.student.model
    assert student_model is not None, "check_models refuses that"
    student = student_size(config, empty_model(student_model, config.student.trust_remote_code))
    teacher = None
    if config.needs_teacher:
        same = config.teacher.model in (None, student_model)
        code = config.teacher.trust_remote_code
        teacher = student.model if same else model_size(empty_model(config.teacher.model or student_model, code))
    o = config.objective
    candidates = o.top_k if o.target == "top_k" else None
    answer = Answer(vocab_size=facts.vocab_size, candidates=candidates) if config.needs_teacher else None
    bound = longest(config)
    completion = min(completion_tokens or speeds.completion or bound.completion, config.data.max_length)
    prompt = min(prompt_tokens or bound.prompt, max(config.data.max_length - completion, 1))
    sampled = o.on_policy_fraction * config.trainer.sequences_per_step
    step = Step(
        sampled=sampled, given=config.trainer.sequences_per_step - sampled, prompt=prompt, completion=completion
    )
    parts = memory(config, student, teacher, answer)
    demands = placement_plan(config)
    flops = step_flops(student, teacher, step, config.trainer.gradient_checkpointing)
    wire = wire_bytes(student, step, answer, num_rollouts=config.rollout.num_actors)
    return {
        "is_estimate": True,
        "placement": [_placement_row(config, demand) for demand in demands],
        "memory": [
            {"role": d.role, "count": d.count, **asdict(part)} for d in demands for part in parts[d.role] if part.bytes
        ],
        "wire_bytes_per_step": wire,
        "flops_per_step": flops,
        "duration": duration(config, step, speeds, flops),
        "step": asdict(step),
        "student": asdict(student),
        "teacher": asdict(teacher) if teacher is not None else None,
        "notes": [*_notes(config, prompt_tokens, completion_tokens or speeds.completion), *speeds.notes],
    }


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
    shared = sorted(d.role for d in placement_plan(config) if 0 < d.num_gpus < 1)
    if shared:
        notes.append(f"{', '.join(shared)} may share a GPU with others: add their GPU parts up")
    return notes


def duration(config: Config, step: Step, speeds: Speeds, flops: Mapping[Stage, float]) -> dict[str, Any] | None:
    """Seconds of each stage, of a step and of all steps; None without any speed. Start-up, evaluation and export are left
    out; publishing and loading weights count where a record says how long they took."""
    at_work = [stage for stage in STAGES if flops[stage] > 0]
    if not any(stage in speeds.rates for stage in at_work):
        return None
    actors: dict[Stage, int] = {
        "rollout": config.rollout.num_actors,
        "teacher": config.teacher.num_actors,
        "trainer": config.trainer.num_workers,
    }
    stages = stage_seconds(step, {stage: speeds.rates[stage] for stage in at_work if stage in speeds.rates}, actors)
    stages = {stage: seconds + speeds.sync_s.get(stage, 0.0) for stage, seconds in stages.items()}
    missing = [stage for stage in at_work if stage not in stages]
    step_s = None if missing else step_seconds(stages, config.sync.max_staleness)
    return {
        "tokens_per_second": {stage: speeds.rates[stage] for stage in stages},
        "stage_s": stages,
        "missing": missing,
        "max_staleness": config.sync.max_staleness,
        "step_s": step_s,
        "steps_s": None if step_s is None else step_s * config.trainer.num_steps,
        "recorded_step_s": speeds.step_s,
    }


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


def show(report: Mapping[str, Any]) -> None:
    """The plan as tables on stdout."""
    placement = report["placement"]
    print_table(placement, list(placement[0]), title="actors")
    print_table(
        _memory_rows(report["memory"]), ["role", "place", "part", "size"], title="memory of one actor (estimate)"
    )
    wire = [{"what": name, "size": format_bytes(size)} for name, size in report["wire_bytes_per_step"].items() if size]
    wire.append({"what": "sum", "size": format_bytes(sum(report["wire_bytes_per_step"].values()))})
    print_table(wire, ["what", "size"], title="bytes on the wire of one optimizer step (estimate)")
    time = report["duration"]
    rows = [
        {
            "stage": stage,
            "TFLOP": flops / 1e12,
            "tokens/s of one actor": time and time["tokens_per_second"].get(stage),
            "seconds": time and time["stage_s"].get(stage),
        }
        for stage, flops in report["flops_per_step"].items()
        if flops
    ]
    columns = ["stage", "TFLOP", *(["tokens/s of one actor", "seconds"] if time else [])]
    print_table(rows, columns, title="one optimizer step (estimate)")
    print(_duration_line(report))
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


def _duration_line(report: Mapping[str, Any]) -> str:
    time = report["duration"]
    missing = [s for s, f in report["flops_per_step"].items() if f] if time is None else time["missing"]
    if missing:
        subject = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'}"
        return NO_SPEED.format(missing=subject, first=missing[0])
    staleness, step_s, recorded = time["max_staleness"], time["step_s"], time["recorded_step_s"]
    how = "the sum of the stages" if staleness == 0 else "the slowest stage, or all of them over the steps under way"
    line = f"about {step_s:.3g} s a step (S = {staleness}: {how}), {_clock(time['steps_s'])} for all steps"
    return line if recorded is None else f"{line}; that run took {recorded:.3g} s a step"


def _clock(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
