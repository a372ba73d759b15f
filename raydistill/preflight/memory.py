"""The plan's memory against what there is: this machine's, and that of the GPUs where they are known."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
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
ON_CPU = ", set evaluation.num_gpus=0 (on the CPU)"
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))  # v2, v1
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


def host_memory() -> int:
    """Bytes of memory that this machine has for us: its own, or the limit of the container that we are in."""
    import psutil

    limits = [int(text) for path in CGROUP_LIMITS if path.is_file() and (text := path.read_text().strip()).isdecimal()]
    return min([int(psutil.virtual_memory().total), *limits])


def host_remark(plan: Mapping[str, Any]) -> MemoryRemark:
    """The host parts of all actors against this machine."""
    host: dict[str, int] = {}
    for part in plan["memory"]:
        if part["place"] == "host":
            host[part["role"]] = host.get(part["role"], 0) + part["count"] * part["bytes"]
    there, needed = host_memory(), sum(host.values())
    parts = ", ".join(f"{role} {format_bytes(size)}" for role, size in host.items())
    text = f"about {format_bytes(needed)} of {format_bytes(there)} host memory if all actors run here ({parts})"
    if needed <= there:
        return MemoryRemark(status="ok", text=text)
    largest = max(host, key=lambda role: host[role])
    return MemoryRemark(status="warning", text=f"{text}; lower {SMALLER[largest]}, or run on more nodes")


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuLoad:
    """What the actors on one GPU take of it, in bytes."""

    parts: tuple[tuple[str, int], ...]  # (role, bytes) of each actor; of a vLLM engine without its cache
    engines: int  # of them: vLLM's, each of which takes `reserved`, whatever it needs
    reserved: int
    there: int  # what they book together

    @property
    def needed(self) -> int:
        """Of all actors together."""
        return self.engines * self.reserved + self.others

    @property
    def others(self) -> int:
        """Of those that take what they need."""
        return sum(size for role, size in self.parts if not (self.engines and role == "rollout"))

    @property
    def engine(self) -> int:
        """What one engine needs beside its cache."""
        return max((size for role, size in self.parts if self.engines and role == "rollout"), default=0)


def gpu_load(config: Config, actors: Mapping[str, Any], parts: Sequence[Mapping[str, Any]], gpu_bytes: int) -> GpuLoad:
    """Of one row of a plan's "gpus"; parts: the plan's "memory"."""
    adapts, roles = config.rollout.engine == "vllm", actors["roles"]
    return GpuLoad(
        parts=tuple((role, _gpu_bytes(role, parts, adapts)) for role in roles),
        engines=roles.count("rollout") if adapts else 0,
        reserved=int(gpu_bytes * config.rollout.gpu_memory_utilization),
        there=int(gpu_bytes * actors["share"]),
    )


def _gpu_bytes(role: str, parts: Sequence[Mapping[str, Any]], adapts: bool) -> int:
    return sum(
        part["bytes"]
        for part in parts
        if (part["role"], part["place"]) == (role, "GPU")
        and not (adapts and role == "rollout" and part["name"] == ADAPTS)
    )


def gpu_remarks(config: Config, plan: Mapping[str, Any], gpu: GpuMemory | None) -> list[MemoryRemark]:
    """A line for each kind of GPU, by the actors on it: the plan's parts of them all against what they book of the GPU."""
    return [
        _gpu(config, gpu_load(config, row, plan["memory"], gpu.bytes if gpu else 0), row, gpu) for row in plan["gpus"]
    ]


def _gpu(config: Config, load: GpuLoad, actors: Mapping[str, Any], gpu: GpuMemory | None) -> MemoryRemark:
    total, (first, *more) = sum(size for _, size in load.parts), actors["roles"]
    beside = {"rollout": " beside its KV cache"} if load.engines else {}
    if more:
        each = ", ".join(f"{role} {format_bytes(size)}{beside.get(role, '')}" for role, size in load.parts)
        text = f"{len(load.parts)} actors share a GPU and take about {format_bytes(total)} of it ({each})"
    else:
        text = f"one {first} actor takes about {format_bytes(total)} of a GPU{beside.get(first, '')}"
    if gpu is None:
        return MemoryRemark(status="ok", text=f"{text}; which GPUs the nodes have is not known here")
    of = f"{gpu.name} with {format_bytes(gpu.bytes)}"
    if load.engines:
        of += f", of which vLLM takes {config.rollout.gpu_memory_utilization:.0%} (rollout.gpu_memory_utilization)"
    if actors["share"] < 1:
        shares = ", ".join(f"{role}.num_gpus" for role in dict.fromkeys(actors["roles"]))
        of += f", of which {actors['share']:.0%} are booked ({shares})"
    text = f"{text} ({of})"
    if load.engine > load.reserved:
        raised = ", raise rollout.gpu_memory_utilization" if more else ""
        return MemoryRemark(status="warning", text=f"{text}; lower {SMALLER['rollout']}{raised}, or use larger GPUs")
    if load.needed <= load.there:
        return MemoryRemark(status="ok", text=text)
    if load.others <= load.there - load.engine and load.engines:
        return MemoryRemark(status="warning", text=f"{text}; lower rollout.gpu_memory_utilization, or use larger GPUs")
    largest = max(load.parts, key=lambda part: part[1])[0]
    apart = (ON_CPU if largest == "evaluation" else "") + (", book a GPU for each (<role>.num_gpus=1)" if more else "")
    return MemoryRemark(status="warning", text=f"{text}; lower {SMALLER[largest]}{apart}, or use larger GPUs")
