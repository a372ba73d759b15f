"""The plan's memory against what there is: this machine's, and that of the GPUs where they are known."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from raydistill.config import Config
from raydistill.preflight.devices import GIB, GPUS, gpu_named, local_gpu
from raydistill.results.tables import format_bytes

SMALLER = {  # what makes an actor of a role smaller
    "trainer": "trainer.sequences_per_micro_batch, set trainer.gradient_checkpointing=true or raise trainer.zero_stage",
    "rollout": "rollout.kv_cache_gib or rollout.max_new_tokens, or raise rollout.tensor_parallel_size",
    "teacher": "teacher.batch_tokens, set teacher.dtype='bfloat16' or raise teacher.num_gpus",
    "evaluation": "data.max_length or data.eval_rows",
}
ADAPTS = "KV cache"  # vLLM makes it as large as its share of a GPU allows


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuMemory:
    """Of the smallest GPU that an actor may get."""

    name: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRemark:
    """One line about memory."""

    status: Literal["ok", "warning"]
    text: str


def joins_a_cluster(config: Config) -> bool:
    """Whether other machines than this one may hold the actors."""
    return bool(config.cluster.address or os.environ.get("RAY_ADDRESS"))


def gpu_memory_here() -> GpuMemory | None:
    """Of this machine; None without a CUDA device."""
    name = local_gpu()
    if name is None:
        return None
    import torch

    sizes = [torch.cuda.get_device_properties(gpu).total_memory for gpu in range(torch.cuda.device_count())]
    return GpuMemory(name=name, bytes=min(sizes))


def gpu_memory_of(nodes: Sequence[Mapping[str, Any]]) -> GpuMemory | None:
    """Of a cluster, by the accelerator types in what `ray.nodes()` gives; None where one with GPUs has none that is known."""
    found = []
    for resources in (node["Resources"] for node in nodes if node["Alive"] and node["Resources"].get("GPU")):
        types = [key.partition(":")[2] for key in resources if key.startswith("accelerator_type:")]
        entry = gpu_named(types[0]) if types else None
        if entry is None:
            return None
        found.append(GpuMemory(name=entry, bytes=int(GPUS[entry].memory_gib * GIB)))
    return min(found, key=lambda gpu: gpu.bytes, default=None)


def memory_remarks(config: Config, plan: Mapping[str, Any], gpu: GpuMemory | None) -> list[MemoryRemark]:
    """The estimate of `plan`: all host parts against this machine, each role's GPU parts against one GPU, or its share."""
    on_gpus = [row for row in plan["placement"] if row["gpus_each"]]
    return [_host(plan), *(_gpu(config, row, plan["memory"], gpu) for row in on_gpus)]


def _host(plan: Mapping[str, Any]) -> MemoryRemark:
    import psutil

    host: dict[str, int] = {}
    for part in plan["memory"]:
        if part["place"] == "host":
            host[part["role"]] = host.get(part["role"], 0) + part["count"] * part["bytes"]
    there, needed = psutil.virtual_memory().total, sum(host.values())
    parts = ", ".join(f"{role} {format_bytes(size)}" for role, size in host.items())
    text = f"about {format_bytes(needed)} of {format_bytes(there)} host memory if all actors run here ({parts})"
    if needed <= there:
        return MemoryRemark(status="ok", text=text)
    largest = max(host, key=lambda role: host[role])
    return MemoryRemark(status="warning", text=f"{text}; lower {SMALLER[largest]}, or run on more nodes")


def _gpu(
    config: Config, row: Mapping[str, Any], parts: Sequence[Mapping[str, Any]], gpu: GpuMemory | None
) -> MemoryRemark:
    role, share = row["role"], min(1.0, row["gpus_each"])
    adapts = role == "rollout" and config.rollout.engine == "vllm"
    needed = sum(
        part["bytes"]
        for part in parts
        if (part["role"], part["place"]) == (role, "GPU") and not (adapts and part["name"] == ADAPTS)
    )
    beside = " beside its KV cache" if adapts else ""
    text = f"one {role} actor takes about {format_bytes(needed)} of a GPU{beside}"
    if gpu is None:
        return MemoryRemark(status="ok", text=f"{text}; which GPUs the nodes have is not known here")
    there = int(gpu.bytes * (config.rollout.gpu_memory_utilization if adapts else share))
    of = f"{gpu.name} with {format_bytes(gpu.bytes)}"
    if adapts:
        of += f", of which vLLM takes {config.rollout.gpu_memory_utilization:.0%} (rollout.gpu_memory_utilization)"
    elif share < 1:
        of += f", of which {share:.0%} are its share ({role}.num_gpus={share:g})"
    if needed <= there:
        return MemoryRemark(status="ok", text=f"{text} ({of})")
    return MemoryRemark(status="warning", text=f"{text} ({of}); lower {SMALLER[role]}, or use larger GPUs")
