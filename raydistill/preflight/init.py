"""The verb `raydistill init`: a commented config that fits a model, a data file and a number of GPUs.

Lengths come from the data (as the model's own template renders it), batch sizes from the memory estimate of `plan`; what
the user will want to change stands in the file with a comment.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from raydistill.cli import command_parser, console
from raydistill.config import Config
from raydistill.config.load import load_config
from raydistill.errors import ConfigError, UserError

SUMMARY = """\
Write a config that fits a model, its data and the GPUs there are. Reads the model's config and tokenizer and the first rows of
the data; loads no weights and starts nothing."""
EXAMPLES = """\
examples:
  raydistill init --model Qwen/Qwen3-4B --data prompts.jsonl --gpus 4 -o mine.toml
        then: raydistill doctor @mine.toml, raydistill plan @mine.toml, raydistill train @mine.toml
  raydistill init --model FOLDER --data prompts.jsonl --format int2 -o mine.toml
        no GPU: everything on this machine's CPU, in float32
"""
ROWS_READ = 512
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
SEQUENCES_PER_RANK = 16
MICRO_BATCHES = (16, 8, 4, 2, 1)
SPLIT_ROLES: tuple[Literal["teacher", "rollout"], ...] = ("teacher", "rollout")
ENGINE_WEIGHTS = 0.6  # of a GPU's memory at most, so that vLLM has a cache to work with
HEADROOM = 0.85  # of a device's memory: contexts and fragmentation are not in the estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """How the GPUs are split; a fraction shares a device."""

    rollout: float
    rollout_actors: int
    teacher: float
    teacher_actors: int
    trainer: float
    trainer_workers: int
    evaluation: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """What the first rows of the data say, in tokens."""

    max_length: int
    max_new_tokens: int
    min_completion: int  # the structural filter's default is made for chat data: short answers would fall out
    has_references: bool


def init_command(argv: Sequence[str]) -> int:
    """The verb `init`."""
    parser = command_parser("init", SUMMARY, EXAMPLES, takes_config=False)
    parser.add_argument("--model", required=True, metavar="FOLDER_OR_ID", help="the model to quantize and train")
    parser.add_argument("--teacher", metavar="FOLDER_OR_ID", help="default: the same model in full precision")
    parser.add_argument("--data", required=True, type=Path, metavar="FILE", help="training rows, JSONL")
    parser.add_argument("--gpus", type=int, default=0, metavar="N", help="GPUs of the cluster (default: 0, CPU only)")
    parser.add_argument(
        "--gpu-memory-gib", type=float, default=80.0, metavar="G", help="of one GPU (default: %(default)g)"
    )
    parser.add_argument("--format", choices=("int4", "int3", "int2"), default="int4", help="default: %(default)s")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the config to write")
    options = parser.parse_args(list(argv))
    if options.output.exists():
        raise UserError(f"-o {options.output} exists; choose another name or remove it")
    if options.gpus < 0:
        raise UserError(f"--gpus {options.gpus} is below 0")
    text = make_config(
        options.model, options.teacher, options.data, options.gpus, options.gpu_memory_gib, options.format
    )
    options.output.write_text(text)
    load_config([f"@{options.output}"])
    console.print(
        f"wrote {options.output}; next: raydistill doctor @{options.output}, then plan, then train", soft_wrap=True
    )
    return 0


def split_devices(num_gpus: int, teacher_gpus: int = 1, rollout_gpus: int = 1) -> Devices:
    """Half of the GPUs train, the others sample and answer; up to three GPUs are shared out by fractions.

    teacher_gpus, rollout_gpus: what one copy of the teacher and one engine need. ConfigError if there are too few.
    """
    if num_gpus == 0:
        return Devices(
            rollout=0, rollout_actors=1, teacher=0, teacher_actors=1, trainer=0, trainer_workers=1, evaluation=0
        )
    needed = teacher_gpus + rollout_gpus + 1
    if needed > 3 and num_gpus < needed:
        raise ConfigError(
            f"--gpus {num_gpus}: one teacher needs {teacher_gpus}, one rollout engine {rollout_gpus} and the trainer at least "
            f"1, together {needed}; give more GPUs, larger ones (--gpu-memory-gib), or smaller models"
        )
    if num_gpus == 1:
        return Devices(
            rollout=0.3, rollout_actors=1, teacher=0.2, teacher_actors=1, trainer=0.4, trainer_workers=1, evaluation=0.1
        )
    if num_gpus == 2:
        return Devices(
            rollout=0.5, rollout_actors=1, teacher=0.4, teacher_actors=1, trainer=1, trainer_workers=1, evaluation=0.1
        )
    teachers = max(1, num_gpus // 4 // teacher_gpus)
    rollouts = max(1, num_gpus // 4 // rollout_gpus)
    # The evaluation actor takes a tenth of one device, of a role whose actors have one.
    sharing = "teacher" if teacher_gpus == 1 else "rollout" if rollout_gpus == 1 else "trainer"
    return Devices(
        rollout=0.9 if sharing == "rollout" else rollout_gpus,
        rollout_actors=rollouts,
        teacher=0.9 if sharing == "teacher" else teacher_gpus,
        teacher_actors=teachers,
        trainer=0.9 if sharing == "trainer" else 1,
        trainer_workers=num_gpus - teachers * teacher_gpus - rollouts * rollout_gpus,
        evaluation=0.1,
    )


def gpus_for(tree: dict[str, Any], role: Literal["teacher", "rollout"], num_gpus: int, gpu_memory_gib: float) -> int:
    """GPUs over which one actor of a role has to be split: the fewest at which its weights and what it computes at once fit
    each of them (of a rollout engine the weights alone: its cache takes what is left). ConfigError if all are too few."""
    from raydistill.preflight.plan import make_plan

    room = gpu_memory_gib * 2**30 * (HEADROOM if role == "teacher" else ENGINE_WEIGHTS)
    needed, number = 0.0, 1
    while number <= max(num_gpus, 1):
        split = {"num_gpus": number} | ({"tensor_parallel_size": number} if role == "rollout" else {})
        parts = [
            part
            for part in make_plan(_validated(tree | {role: tree[role] | split}))["memory"]
            if part["role"] == role and part["place"] == "GPU"
        ]
        needed = sum(part["bytes"] for part in parts if role == "teacher" or part["name"].startswith("weights"))
        if needed <= room:
            return number
        number *= 2  # attention heads divide by powers of two
    raise ConfigError(
        f"one {role} actor needs about {needed / 2**30:.0f} GiB on each of {number // 2} GPUs, there are {room / 2**30:.0f}; "
        "give more GPUs, larger ones (--gpu-memory-gib), or a smaller model"
    )


def measure_lengths(config: Config) -> Lengths:
    """Lengths that keep all but the longest hundredth of the first rows."""
    from raydistill.data.encode import encode_rows
    from raydistill.data.rows import read_rows
    from raydistill.preflight.checks import check_models

    assert config.data.path is not None
    facts = check_models(config)
    rows = read_rows(config.data.path, "skip", ROWS_READ).rows
    examples = encode_rows(rows, facts.tokenizer, config.data, stop_ids=facts.eos_ids)
    has_references = all(example.has_reference for example in examples)
    answers = [example.reference_ids.size for example in examples if example.has_reference]
    new_tokens = _round_up(float(np.quantile(answers, 0.95)), 32) if answers else 256
    longest = float(np.quantile([max(e.num_tokens, e.prompt_ids.size + new_tokens) for e in examples], 0.99))
    fitting = [length for length in LENGTHS if length >= longest] or [LENGTHS[-1]]
    return Lengths(
        max_length=min(fitting[0], facts.max_length),
        max_new_tokens=min(new_tokens, facts.max_length // 2),
        min_completion=max(1, min(32, int(np.quantile(answers, 0.02)))) if answers else 32,
        has_references=has_references,
    )


def make_config(
    model: str, teacher: str | None, data: Path, num_gpus: int, gpu_memory_gib: float, weight_format: str
) -> str:
    """The file's text. ConfigError if one sequence does not fit a trainer's device."""
    devices = split_devices(num_gpus)  # as if every model fits one device, until the lengths are known
    dtype = "bfloat16" if num_gpus else "float32"
    tree: dict[str, Any] = {
        "student": {"model": model, "dtype": dtype},
        "teacher": {
            "model": teacher,
            "dtype": dtype,
            "num_actors": devices.teacher_actors,
            "num_gpus": devices.teacher,
        },
        "data": {"path": str(data), "max_length": 256},
        "quant": {"format": weight_format},
        "rollout": {"num_actors": devices.rollout_actors, "num_gpus": devices.rollout, "max_new_tokens": 32},
        "trainer": {"num_workers": devices.trainer_workers, "num_gpus": devices.trainer},
        "evaluation": {"num_gpus": devices.evaluation},
    }
    lengths = measure_lengths(_validated(tree))
    tree["data"]["max_length"] = lengths.max_length
    tree["rollout"]["max_new_tokens"] = lengths.max_new_tokens
    if num_gpus:
        needed = [gpus_for(tree, role, num_gpus, gpu_memory_gib) for role in SPLIT_ROLES]
        devices = split_devices(num_gpus, *needed)
        tree["teacher"] |= {"num_actors": devices.teacher_actors, "num_gpus": devices.teacher}
        ranks = max(1, int(devices.rollout))
        tree["rollout"] |= {
            "num_actors": devices.rollout_actors,
            "num_gpus": devices.rollout,
            "tensor_parallel_size": ranks,
        }
        tree["trainer"] |= {"num_workers": devices.trainer_workers, "num_gpus": devices.trainer}
    tree["objective"] = {"on_policy_fraction": 0.5 if lengths.has_references else 1.0}
    tree["trainer"]["sequences_per_step"] = SEQUENCES_PER_RANK * devices.trainer_workers
    micro, checkpointing = fit_trainer(tree, devices, gpu_memory_gib)
    return _text(tree, devices, lengths, micro, checkpointing, gpu_memory_gib)


def fit_trainer(tree: dict[str, Any], devices: Devices, gpu_memory_gib: float) -> tuple[int, bool]:
    """(sequences of a micro-batch, gradient checkpointing) of a trainer that fits its share of a device."""
    from raydistill.preflight.plan import make_plan

    room = _memory_of(devices, gpu_memory_gib) * HEADROOM
    needed = 0.0
    for checkpointing in (False, True):
        for micro in MICRO_BATCHES:
            trainer = tree["trainer"] | {"sequences_per_micro_batch": micro, "gradient_checkpointing": checkpointing}
            plan = make_plan(_validated(tree | {"trainer": trainer}))
            place = "GPU" if devices.trainer else "host"
            needed = sum(p["bytes"] for p in plan["memory"] if p["role"] == "trainer" and p["place"] == place)
            if needed <= room:
                return micro, checkpointing
    raise ConfigError(
        f"one sequence of data.max_length={tree['data']['max_length']} needs about {needed / 2**30:.0f} GiB on a trainer, "
        f"there are {room / 2**30:.0f}: use more GPUs with trainer.zero_stage=3 (its weights alone must fit one), "
        "shorter rows, or a smaller model"
    )


def _memory_of(devices: Devices, gpu_memory_gib: float) -> float:
    if devices.trainer:
        return min(devices.trainer, 1.0) * gpu_memory_gib * 2**30
    import psutil

    return psutil.virtual_memory().total / 2  # the other actors live there too


def _validated(tree: dict[str, Any]) -> Config:
    return Config.model_validate(tree)


def _text(
    tree: dict[str, Any], devices: Devices, lengths: Lengths, micro: int, checkpointing: bool, gpu_memory_gib: float
) -> str:
    trainer, rollout, teacher = tree["trainer"], tree["rollout"], tree["teacher"]
    where = f"{gpu_memory_gib:g} GiB GPUs" if devices.trainer else "CPU"
    ranks = rollout.get("tensor_parallel_size", 1)
    parallel = f"\ntensor_parallel_size = {ranks}  # one GPU is too small for the student" if ranks > 1 else ""
    spread = "  # one is too small: its layers are spread over them" if teacher["num_gpus"] > 1 else ""
    share = f"\ngpu_memory_utilization = {devices.rollout * 0.9:.2f}" if 0 < devices.rollout < 1 else ""
    named = f"model = {_quoted(teacher['model'])}" if teacher["model"] else "# model: unset, the student's own model"
    fraction = tree["objective"]["on_policy_fraction"]
    why = (
        "half of the completions come from the data"
        if fraction < 1
        else "the rows have no completions: all are sampled"
    )
    return f"""\
# Written by `raydistill init` for {where}. Next:
#   raydistill doctor @THIS_FILE     models, data, memory and placement
#   raydistill plan @THIS_FILE       what each actor will need
#   raydistill train @THIS_FILE

[student]
model = {_quoted(tree["student"]["model"])}
dtype = {_quoted(tree["student"]["dtype"])}

[teacher]
{named}
dtype = {_quoted(teacher["dtype"])}
num_actors = {teacher["num_actors"]}
num_gpus = {teacher["num_gpus"]:g}{spread}

[data]
path = {_quoted(tree["data"]["path"])}
max_length = {lengths.max_length}  # keeps 99 % of the first {ROWS_READ} rows
min_completion = {lengths.min_completion}  # rows with fewer completion tokens are left out

[objective]
on_policy_fraction = {fraction:g}  # lambda: {why}
beta = 0.5                # 0: forward KL, 1: reverse KL, between: generalized JSD

[quant]
format = {_quoted(tree["quant"]["format"])}
group_size = 32

[adapter]
mode = "merged"  # no extra byte when served; "served" keeps LoRA beside frozen codes
rank = 32
alpha = 64

[rollout]
num_actors = {rollout["num_actors"]}
num_gpus = {rollout["num_gpus"]:g}{share}{parallel}
max_new_tokens = {lengths.max_new_tokens}

[trainer]
num_workers = {trainer["num_workers"]}
num_gpus = {trainer["num_gpus"]:g}
num_steps = 1000
sequences_per_step = {trainer["sequences_per_step"]}
sequences_per_micro_batch = {micro}  # the largest that the memory estimate allows
gradient_checkpointing = {str(checkpointing).lower()}
learning_rate = 1e-4  # sweep it: it matters more than anything else here

[evaluation]
num_gpus = {devices.evaluation:g}
eval_every = 100
"""


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _round_up(number: float, step: int) -> int:
    return max(step, math.ceil(number / step) * step)
