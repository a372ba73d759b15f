"""The verb `raydistill init`: a commented config that fits a model, a data file and a number of GPUs.

Lengths come from the data (as the model's own template renders it), batch sizes from the memory estimate of `plan`; what
the user will want to change stands in the file with a comment.
"""

from __future__ import annotations

import json
import math
import os
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from raydistill.cli import command_parser, console
from raydistill.config import Config
from raydistill.errors import UserError

if TYPE_CHECKING:
    from raydistill.preflight.layouts import Layout

SUMMARY = """\
Write a config that fits a model, its data and the GPUs there are. Reads the model's config and tokenizer and the first rows of
the data; loads no weights and starts nothing."""
EXAMPLES = """\
examples:
  raydistill init --model Qwen/Qwen3-4B --data prompts.jsonl --gpus 4
        writes Qwen3-4B.toml here; then: raydistill doctor @Qwen3-4B.toml, plan @Qwen3-4B.toml, train @Qwen3-4B.toml
  raydistill init --model FOLDER --data prompts.jsonl --format int2 -o mine.toml
        no GPU: everything on this machine's CPU, in float32
  raydistill init --model FOLDER --data prompts.jsonl --gpus 1 -o - | less
        to stdout
"""
ROWS_READ = 512
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
SPLIT_ROLES: tuple[Literal["teacher", "rollout"], ...] = ("teacher", "rollout")
ASSUMED_GIB = 80.0  # of a GPU, where none is here and nobody says
STDOUT = "-"


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
        "--gpu-memory-gib",
        type=float,
        metavar="G",
        help=f"memory of one GPU (default: of this machine's, {ASSUMED_GIB:g} where it has none)",
    )
    parser.add_argument("--format", choices=("int4", "int3", "int2"), default="int4", help="default: %(default)s")
    parser.add_argument("-o", "--output", metavar="FILE", help="default: MODEL.toml, after the model; -: print it")
    options = parser.parse_args(list(argv))
    output = None if options.output == STDOUT else Path(options.output or f"{_name_of(options.model)}.toml")
    if output is not None:
        check_output(output)
    if options.gpus < 0:
        raise UserError(f"--gpus {options.gpus} is below 0")
    if options.gpu_memory_gib is not None and not 0 < options.gpu_memory_gib < math.inf:
        raise UserError(f"--gpu-memory-gib {options.gpu_memory_gib:g} is not above 0")
    memory = options.gpu_memory_gib or gpu_memory_gib(options.gpus)
    text = make_config(options.model, options.teacher, options.data, options.gpus, memory, options.format)
    if output is None:
        print(text, end="")
        return 0
    output.write_text(text)
    console.print(f"wrote {output}; next: raydistill doctor @{output}, then plan, then train", soft_wrap=True)
    return 0


def check_output(output: Path) -> None:
    """UserError where the config could not be written there, or something is there already."""
    if output.exists():
        raise UserError(f"{output} exists; choose another name with -o, or remove it")
    folder = output.parent
    if not folder.is_dir():
        raise UserError(f"-o {output}: there is no folder {folder}; create it, or choose another with -o")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"-o {output}: {folder.absolute()} cannot be written; choose another folder with -o")


def _name_of(model: str) -> str:
    return Path(model).expanduser().resolve().name if Path(model).is_dir() else Path(model).name


def gpu_memory_gib(num_gpus: int) -> float:
    """Of this machine's smallest GPU, where it has one; else an assumption."""
    from raydistill.preflight.devices import GIB
    from raydistill.preflight.memory import gpu_memory_here

    here = gpu_memory_here() if num_gpus else None
    return here.bytes / GIB if here else ASSUMED_GIB


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
    """The file's text. ConfigError if no layout of the actors fits the devices."""
    from raydistill.preflight.layouts import fit, gpus_for, laid_out, layouts, validated
    from raydistill.preflight.plan import planned_sizes

    dtype = "bfloat16" if num_gpus else "float32"
    tree: dict[str, Any] = {
        "student": {"model": model, "dtype": dtype},
        "teacher": {"model": teacher, "dtype": dtype},
        "data": {"path": str(data), "max_length": 256},
        "quant": {"format": weight_format},
        "rollout": {"max_new_tokens": 32},
    }
    lengths = measure_lengths(validated(tree))
    tree["data"] |= {"max_length": lengths.max_length, "min_completion": lengths.min_completion}
    tree["rollout"]["max_new_tokens"] = lengths.max_new_tokens
    tree["objective"] = {"on_policy_fraction": 0.5 if lengths.has_references else 1.0}
    sizes = planned_sizes(validated(tree))
    needed = [gpus_for(tree, sizes, role, num_gpus, gpu_memory_gib) for role in SPLIT_ROLES] if num_gpus else []
    layout = fit(tree, sizes, layouts(num_gpus, *needed), gpu_memory_gib)
    text = _text(laid_out(tree, layout), layout, gpu_memory_gib)
    validated(tomllib.loads(text))
    return text


def _text(tree: dict[str, Any], layout: Layout, gpu_memory_gib: float) -> str:
    from raydistill.preflight.layouts import UTILIZATION

    trainer, rollout, teacher, evaluation = (tree[name] for name in ("trainer", "rollout", "teacher", "evaluation"))
    where = f"GPUs of {gpu_memory_gib:.3g} GiB" if trainer["num_gpus"] else "CPU"
    ranks = rollout["tensor_parallel_size"]
    parallel = f"\ntensor_parallel_size = {ranks}  # one GPU is too small for the student" if ranks > 1 else ""
    spread = "  # one is too small: its layers are spread over them" if teacher["num_gpus"] > 1 else ""
    share = ""
    if rollout["num_gpus"] and layout.utilization < UTILIZATION:
        share = f"\ngpu_memory_utilization = {layout.utilization:.2f}  # what the actors beside it leave"
    shares = (
        "  # it holds a student too, and shares a GPU where there is room" if 0 < evaluation["num_gpus"] < 1 else ""
    )
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
max_length = {tree["data"]["max_length"]}  # keeps 99 % of the first {ROWS_READ} rows
min_completion = {tree["data"]["min_completion"]}  # rows with fewer completion tokens are left out

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
max_new_tokens = {rollout["max_new_tokens"]}

[trainer]
num_workers = {trainer["num_workers"]}
num_gpus = {trainer["num_gpus"]:g}
num_steps = 1000
sequences_per_step = {trainer["sequences_per_step"]}
sequences_per_micro_batch = {layout.micro_batch}  # the largest that the memory estimate allows
gradient_checkpointing = {str(layout.checkpointing).lower()}
learning_rate = 1e-4  # sweep it: it matters more than anything else here

[evaluation]
num_gpus = {evaluation["num_gpus"]:g}{shares}
eval_every = 100
"""


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _round_up(number: float, step: int) -> int:
    return max(step, math.ceil(number / step) * step)
