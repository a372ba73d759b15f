"""How `raydistill init` splits GPUs among the actors: the layouts there are, and the first whose memory fits every GPU.

Memory is that of `plan`, held against the GPUs by the doctor's own sums (`memory.gpu_load`), with some head-room.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from raydistill.config import Config
from raydistill.errors import ConfigError
from raydistill.preflight.devices import GIB
from raydistill.preflight.memory import GpuLoad, gpu_load, host_memory
from raydistill.preflight.plan import Sizes, actors_memory

SEQUENCES_PER_RANK = 16
MICRO_BATCHES = (16, 8, 4, 2, 1)
HEADROOM = 0.85  # of a device's memory: contexts and fragmentation are not in the estimate
ENGINE_WEIGHTS = 0.7  # of what vLLM takes at most, so that it has a cache to work with
UTILIZATION, LEAST_UTILIZATION = 0.85, 0.1  # of a GPU that vLLM takes, alone and beside others
ROUNDING = 1e-6


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
class Layout:
    """What fits."""

    devices: Devices
    micro_batch: int  # sequences
    checkpointing: bool
    utilization: float  # of a GPU that vLLM takes


def layouts(num_gpus: int, teacher_gpus: int = 1, rollout_gpus: int = 1) -> list[Devices]:
    """Ways to split the GPUs, the best first: half of them train, the others sample and answer; one or two are shared out by
    fractions. They differ in whom the evaluation actor, which holds a student too, shares its GPU with.

    teacher_gpus, rollout_gpus: what one copy of the teacher and one engine need. ConfigError if there are too few.
    """
    needed = teacher_gpus + rollout_gpus + 1
    if needed > 3 and num_gpus < needed:
        raise ConfigError(
            f"--gpus {num_gpus}: one teacher needs {teacher_gpus}, one rollout engine {rollout_gpus} and the trainer at least "
            f"1, together {needed}; give more GPUs, larger ones (--gpu-memory-gib), or smaller models"
        )
    if num_gpus < 3:
        return [_one_each(*shares) for shares in FEW[num_gpus]]
    teachers = max(1, num_gpus // 4 // teacher_gpus)
    rollouts = max(1, num_gpus // 4 // rollout_gpus)
    trainers = num_gpus - teachers * teacher_gpus - rollouts * rollout_gpus
    sharing = [role for role, gpus in (("teacher", teacher_gpus), ("rollout", rollout_gpus)) if gpus == 1]
    alone = [""] if trainers > 1 else []  # the evaluation takes a GPU from the trainers
    return [
        Devices(
            rollout=0.9 if role == "rollout" else rollout_gpus,
            rollout_actors=rollouts,
            teacher=0.9 if role == "teacher" else teacher_gpus,
            teacher_actors=teachers,
            trainer=0.9 if role == "trainer" else 1,
            trainer_workers=trainers if role else trainers - 1,
            evaluation=0.1 if role else 1,
        )
        for role in (*sharing, "trainer", *alone)
    ]


FEW: dict[int, tuple[tuple[float, float, float, float], ...]] = {  # rollout, teacher, trainer, evaluation
    0: ((0, 0, 0, 0),),
    1: ((0.3, 0.2, 0.4, 0.1),),
    2: (  # Ray puts a share on the fullest GPU that has room for it, so each line is another company for the trainer
        (0.5, 0.4, 1, 0.1),
        (0.5, 0.5, 0.9, 0.1),
        (0.5, 0.9, 0.5, 0.1),
        (0.9, 0.5, 0.5, 0.1),
        (0.4, 1, 0.5, 0.1),
        (1, 0.4, 0.5, 0.1),
    ),
}


def _one_each(rollout: float, teacher: float, trainer: float, evaluation: float) -> Devices:
    return Devices(
        rollout=rollout, rollout_actors=1, teacher=teacher, teacher_actors=1, trainer=trainer, trainer_workers=1,
        evaluation=evaluation,
    )  # fmt: skip


def gpus_for(
    tree: dict[str, Any], sizes: Sizes, role: Literal["teacher", "rollout"], num_gpus: int, gpu_memory_gib: float
) -> int:
    """GPUs over which one actor of a role has to be split: the fewest at which its weights and what it computes at once fit
    each of them (of a rollout engine the weights alone: its cache takes what is left). ConfigError if all are too few."""
    room = gpu_memory_gib * GIB * (HEADROOM if role == "teacher" else UTILIZATION * ENGINE_WEIGHTS)
    needed, number = 0.0, 1
    while number <= max(num_gpus, 1):
        split = {"num_gpus": number} | ({"tensor_parallel_size": number} if role == "rollout" else {})
        parts = [
            part
            for part in actors_memory(validated(tree | {role: tree[role] | split}), sizes)["memory"]
            if part["role"] == role and part["place"] == "GPU"
        ]
        needed = sum(part["bytes"] for part in parts if role == "teacher" or part["name"].startswith("weights"))
        if needed <= room:
            return number
        number *= 2  # attention heads divide by powers of two
    raise ConfigError(
        f"one {role} actor needs about {needed / GIB:.0f} GiB on each of {number // 2} GPUs, there are {room / GIB:.0f}; "
        "give more GPUs, larger ones (--gpu-memory-gib), or a smaller model"
    )


def fit(tree: Mapping[str, Any], sizes: Sizes, options: Sequence[Devices], gpu_memory_gib: float) -> Layout:
    """The first layout in which every GPU holds its actors, with the largest micro-batch, and with gradient checkpointing only
    where nothing fits without; without GPUs all actors have to fit this machine. ConfigError with the sum that came nearest."""
    gpu_bytes, least, nearest = int(gpu_memory_gib * GIB), math.inf, ""
    for checkpointing in (False, True):
        for micro_batch in MICRO_BATCHES:
            for devices in options:
                layout = Layout(
                    devices=devices, micro_batch=micro_batch, checkpointing=checkpointing, utilization=UTILIZATION
                )
                config = validated(laid_out(tree, layout))
                report = actors_memory(config, sizes)
                loads = [gpu_load(config, row, report["memory"], gpu_bytes) for row in report["gpus"]]
                over, text = max((_over(load, gpu_bytes) for load in loads), default=_over_host(report["memory"]))
                if over <= 0:
                    return replace(layout, utilization=min([UTILIZATION, *_utilizations(loads, gpu_bytes)]))
                if over < least:
                    least, nearest = over, text
    way = (
        "give more GPUs (--gpus), larger ones (--gpu-memory-gib), shorter rows or a smaller model; in a config of your own "
        "adapter.mode='served' keeps no dense copy of the weights, trainer.zero_stage=3 splits those of the trainer, and "
        "evaluation.num_gpus=0 puts the evaluation on the CPU"
    )
    raise ConfigError(
        f"one sequence of data.max_length={tree['data']['max_length']} at a time does not fit: {nearest}; "
        f"{way if options[0].trainer else 'give GPUs (--gpus), shorter rows or a smaller model'}"
    )


def laid_out(tree: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """The config's sections with a layout's numbers."""
    d = layout.devices
    changes: dict[str, dict[str, Any]] = {
        "teacher": {"num_actors": d.teacher_actors, "num_gpus": d.teacher},
        "rollout": {
            "num_actors": d.rollout_actors,
            "num_gpus": d.rollout,
            "tensor_parallel_size": max(1, int(d.rollout)),
            "gpu_memory_utilization": layout.utilization,
        },
        "trainer": {
            "num_workers": d.trainer_workers,
            "num_gpus": d.trainer,
            "sequences_per_step": SEQUENCES_PER_RANK * d.trainer_workers,
            "sequences_per_micro_batch": layout.micro_batch,
            "gradient_checkpointing": layout.checkpointing,
        },
        "evaluation": {"num_gpus": d.evaluation},
    }
    return {**tree, **{section: tree.get(section, {}) | values for section, values in changes.items()}}


def validated(tree: Mapping[str, Any]) -> Config:
    """The config of these sections."""
    return Config.model_validate(tree)


def _over(load: GpuLoad, gpu_bytes: int) -> tuple[float, str]:
    """Bytes beyond what may be used of a GPU, and the sum in words."""
    needed, room = load.others + load.engines * _engine_needs(load, gpu_bytes), _room(load, gpu_bytes)
    roles = " + ".join(role for role, _ in load.parts)
    return needed - room, f"{roles} on one GPU need about {needed / GIB:.1f} GiB of {room / GIB:.1f}"


def _engine_needs(load: GpuLoad, gpu_bytes: int) -> float:
    return max(load.engine / ENGINE_WEIGHTS, LEAST_UTILIZATION * gpu_bytes)


def _room(load: GpuLoad, gpu_bytes: int) -> float:
    return min(HEADROOM * gpu_bytes, load.there)


def _utilizations(loads: Sequence[GpuLoad], gpu_bytes: int) -> list[float]:
    """What the other actors leave to each engine."""
    left = [(_room(load, gpu_bytes) - load.others) / load.engines / gpu_bytes for load in loads if load.engines]
    return [math.floor(share * 100 + ROUNDING) / 100 for share in left]


def _over_host(parts: Sequence[Mapping[str, Any]]) -> tuple[float, str]:
    needed = sum(part["count"] * part["bytes"] for part in parts if part["place"] == "host")
    room = HEADROOM * host_memory()
    return needed - room, f"all actors together need about {needed / GIB:.1f} GiB of {room / GIB:.1f} of this machine"
