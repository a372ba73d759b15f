"""What devices can do, and the speed of a stage that follows from it: for plans that no earlier run lends its speeds to.

A stage takes its FLOPs over the device's peak, a decoded token at least the time to read the weights once, and each pass
through the layers some time that does not depend on their size. Every result is rough: a factor of two is nothing unusual.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from raydistill.config import Config, RolloutSection
from raydistill.errors import ConfigError
from raydistill.preflight.estimates import (
    ModelSize,
    Stage,
    Step,
    StudentSize,
    key_value_bytes,
    step_flops,
)

if TYPE_CHECKING:
    from torch import Tensor

TERA, GIGA, GIB = 1e12, 1e9, 2**30
FLOPS_SHARE = 0.4  # of a GPU's peak that training and prefill of a language model commonly reach
MEASURED_SHARE = 0.5  # of a measured layer: quantizing, the loss and the other processes of the machine take the rest
MEASURED_WIDTH = 1024  # at most: wider layers take longer than a plan should, and are no slower for each FLOP
LONGEST_OVER_MEAN = 2.0  # of the completions of a batch, which is sampled until its last one ends
BYTES_SHARE = 0.6  # of the memory's bandwidth while decoding
GPU_LAYER_S, CPU_LAYER_S = 1e-4, 5e-4  # of one layer, one pass: starting its kernels, whatever their size
GPU_DECODE_S, CPU_DECODE_S = 2e-3, 5e-3  # of one decoding step beside the model: scheduling, sampling
TRAINER_PASSES = 3  # forward, and a backward that is twice as much
ASSUMED_GPU = "L4"
MEASURE_S = 0.15  # for the layer, and again for the copy
COPY_BYTES = 2**26  # beyond any cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """Of a data sheet, without sparsity. The float32 peak is that without TF32, as PyTorch computes."""

    bfloat16_tflops: float
    float32_tflops: float
    gb_per_s: float
    memory_gib: float


GPUS: dict[str, Gpu] = {
    "T4": Gpu(bfloat16_tflops=65, float32_tflops=8.1, gb_per_s=320, memory_gib=15),
    "A10G": Gpu(bfloat16_tflops=70, float32_tflops=31, gb_per_s=600, memory_gib=22),
    "A10": Gpu(bfloat16_tflops=125, float32_tflops=31, gb_per_s=600, memory_gib=22),
    "A40": Gpu(bfloat16_tflops=150, float32_tflops=37, gb_per_s=696, memory_gib=45),
    "A6000": Gpu(bfloat16_tflops=155, float32_tflops=39, gb_per_s=768, memory_gib=47),
    "A100-40G": Gpu(bfloat16_tflops=312, float32_tflops=19.5, gb_per_s=1555, memory_gib=39),
    "A100": Gpu(bfloat16_tflops=312, float32_tflops=19.5, gb_per_s=2039, memory_gib=79),
    "L4": Gpu(bfloat16_tflops=121, float32_tflops=30, gb_per_s=300, memory_gib=22),
    "L40S": Gpu(bfloat16_tflops=362, float32_tflops=92, gb_per_s=864, memory_gib=44),
    "RTX 3090": Gpu(bfloat16_tflops=71, float32_tflops=36, gb_per_s=936, memory_gib=23),
    "RTX 4090": Gpu(bfloat16_tflops=165, float32_tflops=83, gb_per_s=1008, memory_gib=23),
    "H100 PCIe": Gpu(bfloat16_tflops=756, float32_tflops=51, gb_per_s=2000, memory_gib=79),
    "H100": Gpu(bfloat16_tflops=989, float32_tflops=67, gb_per_s=3350, memory_gib=79),
    "H200": Gpu(bfloat16_tflops=989, float32_tflops=67, gb_per_s=4800, memory_gib=140),
    "B200": Gpu(bfloat16_tflops=2250, float32_tflops=75, gb_per_s=8000, memory_gib=178),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What one actor computes with, at what is expected of it."""

    text: str
    flops: float  # a second
    bytes_per_s: float
    layer_s: float
    decode_s: float


def gpu_named(name: str) -> str | None:
    """The entry of `GPUS` for a name as CUDA, Ray or a user writes it ("NVIDIA H100 80GB HBM3"); None if there is none."""
    words = name.upper().replace("_", " ")
    if "A100" in words and "40G" in words:
        return "A100-40G"
    known = [entry for entry in GPUS if f" {entry.upper()} " in f" {words.replace('-', ' ')} "]
    return max(known, key=len, default=None) or (name if name in GPUS else None)


def chosen_gpu(name: str | None) -> tuple[str, str | None]:
    """The GPU that a plan counts with, and a remark where nobody said which: --gpu, else this machine's, else one assumed."""
    if name is not None:
        found = gpu_named(name)
        if found is None:
            raise ConfigError(f"--gpu {name!r} is not known; choose from {', '.join(GPUS)}")
        return found, None
    here = local_gpu()
    if here is not None and (found := gpu_named(here)) is not None:
        return found, None
    seen = "no GPU is here" if here is None else f"{here} is not in the table"
    return ASSUMED_GPU, f"{seen}, so speeds are those of {ASSUMED_GPU} GPUs; name yours with --gpu"


def local_gpu() -> str | None:
    """What CUDA calls the first GPU of this machine."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def gpu_device(name: str, dtype: str, num_gpus: float) -> Device:
    """A share of a GPU, or several that work side by side."""
    gpu = GPUS[name]
    tflops = gpu.bfloat16_tflops if dtype == "bfloat16" else gpu.float32_tflops
    return Device(
        text=f"{name}: {FLOPS_SHARE:.0%} of {tflops:g} TFLOP/s ({dtype}), {BYTES_SHARE:.0%} of {gpu.gb_per_s:g} GB/s",
        flops=tflops * TERA * FLOPS_SHARE * num_gpus,
        bytes_per_s=gpu.gb_per_s * GIGA * BYTES_SHARE * num_gpus,
        layer_s=GPU_LAYER_S,
        decode_s=GPU_DECODE_S,
    )


def measure_cpu(dtype: str, model: ModelSize, sequences: int = 8, tokens: int = 64) -> Device:
    """One core of this machine: a layer of about the model's widths on so many tokens, and a copy. Takes 0.5 seconds."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as the actors do
    try:
        kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
        scale = min(1.0, MEASURED_WIDTH / model.hidden)
        hidden, query, mlp = (max(8, int(width * scale)) for width in (model.hidden, model.query, model.mlp))
        shapes = ((query, hidden), (query, hidden), (query, hidden), (hidden, query), (mlp, hidden), (mlp, hidden))
        weights = [torch.rand(shape).to(kind) for shape in (*shapes, (hidden, mlp))]
        states = torch.rand(sequences, tokens, hidden).to(kind)
        with torch.inference_mode():
            layer_s = _seconds(lambda: _layer(states, weights))
        source = torch.zeros(COPY_BYTES, dtype=torch.uint8)
        target = torch.empty_like(source)
        copy_s = _seconds(lambda: target.copy_(source))
    finally:
        torch.set_num_threads(before)
    flops = 2 * sequences * tokens * (sum(w.numel() for w in weights) + tokens * query) / layer_s
    bytes_per_s = 2 * COPY_BYTES / copy_s
    return Device(
        text=f"one core of this machine: {MEASURED_SHARE:.0%} of {flops / GIGA:.3g} GFLOP/s ({dtype}, measured just now), "
        f"{BYTES_SHARE:.0%} of {bytes_per_s / GIGA:.3g} GB/s",
        flops=flops * MEASURED_SHARE,
        bytes_per_s=bytes_per_s * BYTES_SHARE,
        layer_s=CPU_LAYER_S,
        decode_s=CPU_DECODE_S,
    )


def _layer(states: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """A transformer's layer: norms, attention of one head, gated MLP."""
    from torch.nn import functional

    query, key, value, out, gate, up, down = weights
    normed = functional.rms_norm(states, states.shape[-1:])
    q, k, v = (functional.linear(normed, weight) for weight in (query, key, value))
    states = states + functional.linear(functional.scaled_dot_product_attention(q, k, v, is_causal=True), out)
    normed = functional.rms_norm(states, states.shape[-1:])
    inner = functional.silu(functional.linear(normed, gate)) * functional.linear(normed, up)
    return states + functional.linear(inner, down)


def _seconds(call: Callable[[], object]) -> float:
    """The fastest of the calls that fit `MEASURE_S`: others use the machine too."""
    call()
    fastest, deadline = float("inf"), time.perf_counter() + MEASURE_S
    while time.perf_counter() < deadline:
        start = time.perf_counter()
        call()
        fastest = min(fastest, time.perf_counter() - start)
    return max(fastest, 1e-9)


def devices_of(config: Config, model: ModelSize, gpu: str) -> dict[Stage, Device]:
    """What one actor of each stage computes with. A teacher over several GPUs uses one of them at a time."""
    r, t, trainer = config.rollout, config.teacher, config.trainer
    asked: dict[Stage, tuple[str, float]] = {
        "rollout": (config.student.dtype, r.num_gpus),
        "teacher": (t.dtype, min(t.num_gpus, 1)),
        "trainer": (config.student.dtype, trainer.num_gpus),
    }
    cores = {dtype: measure_cpu(dtype, model) for dtype in {kind for kind, gpus in asked.values() if gpus == 0}}
    return {stage: gpu_device(gpu, dtype, gpus) if gpus > 0 else cores[dtype] for stage, (dtype, gpus) in asked.items()}


def rough_rates(
    config: Config, student: StudentSize, teacher: ModelSize | None, step: Step, devices: dict[Stage, Device]
) -> dict[Stage, float]:
    """Completion tokens per second of one actor, for the stages that have work.

    Teacher and trainer: FLOPs / speed, and layers x passes x the time of a layer, for each forward of a batch. Rollout: the
    prompts as one pass; then, until the longest completion ends, a token of all sequences at once takes the larger of its FLOPs
    and of reading the weights and half the KV cache.
    """
    flops = step_flops(student, teacher, step, config.trainer.gradient_checkpointing)
    rates: dict[Stage, float] = {}
    if step.sampled:
        rates["rollout"] = step.sampled * step.completion / (
            _sampling_s(student, replace(step, given=0), config.rollout, devices["rollout"]) * config.rollout.num_actors
        )  # fmt: skip
    if teacher is not None:
        batches = max(1.0, step.sequences * (step.prompt + step.completion) / config.teacher.batch_tokens)
        seconds = flops["teacher"] / devices["teacher"].flops + batches * teacher.layers * devices["teacher"].layer_s
        rates["teacher"] = step.num_completion / seconds
    batches = step.sequences / config.trainer.sequences_per_micro_batch
    overhead = batches * TRAINER_PASSES * student.model.layers * devices["trainer"].layer_s
    rates["trainer"] = step.num_completion / (flops["trainer"] / devices["trainer"].flops + overhead)
    return rates


def _sampling_s(student: StudentSize, step: Step, section: RolloutSection, device: Device) -> float:
    """Seconds of one actor for its share of a step's sequences, which it decodes at the same time."""
    model, mine = student.model, step.sampled / section.num_actors
    whole = step_flops(student, None, replace(step, sampled=mine), checkpointing=False)["rollout"]
    prompts = step_flops(student, None, replace(step, sampled=mine, completion=0), checkpointing=False)["rollout"]
    weights = model.parameters * student.weight_bytes
    cache = key_value_bytes(model, round(mine * (step.prompt + step.completion / 2)), student.weight_bytes)
    one_token = max((whole - prompts) / step.completion / device.flops, (weights + cache) / device.bytes_per_s)
    pass_s = model.layers * device.layer_s
    longest = max(step.completion, min(LONGEST_OVER_MEAN * step.completion, section.max_new_tokens))
    return prompts / device.flops + pass_s + longest * (one_token + pass_s + device.decode_s)
