"""Targets as transformers models: exports, plain folders, adapters over a base, checkpoints of a run.

What lies under several adapters or checkpoints is loaded once; what is put over it is exchanged.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, cast, get_args

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig

from raydistill.config import TeacherSection
from raydistill.errors import ModelError
from raydistill.evaluate.run_defaults import EXPORT_FOLDER, config_of
from raydistill.evaluate.targets import ADAPTER_CONFIG, Target
from raydistill.models import (
    WEIGHTS_SHARE,
    StudentSpec,
    build_student,
    default_device,
    empty_model,
    free_gpu_memory,
    load_causal_lm,
    memory_to_fill,
)
from raydistill.quant.export import MANIFEST, export_live, load_exported, packed_bytes, read_manifest
from raydistill.quant.export_files import ADAPTER_WEIGHTS
from raydistill.quant.hashing import hash_codes
from raydistill.quant.student import load_adapter_state, student_codes
from raydistill.recovery.checkpoint import load_checkpoint, read_description
from raydistill.results.tables import Role
from raydistill.tensors import CompletionModel

NO_FORMAT = "none"


class Loader:
    """Loads one target after the other; the model before it is gone by then, or is the same one with other weights."""

    def __init__(self, device: str | None = None) -> None:
        self._device = device or default_device()
        self._held: tuple[object, Any] | None = None  # what it was made from, the model
        self._export_bytes: dict[Path, int] = {}  # of a run's student
        self._numbers = count()  # of adapters

    def load(self, target: Target) -> nn.Module:
        """A transformers model in eval mode on this loader's device."""
        if target.checkpoint is not None:
            model = self._checkpoint(target)
        elif target.adapter is not None:
            model = self._adapter(target)
        else:
            self._held = None
            model = load_exported(target.folder).to(self._device)
        CompletionModel(model).check_head(f"{target.name} ({target.folder})")
        return model

    def release(self) -> None:
        """Forget the model that is held."""
        self._held = None

    def size(self, target: Target) -> int:
        """Bytes of what would be served: weight files and adapter. Of a checkpoint those of an export: its run's, where there
        is one, else one that is made to see."""
        if target.checkpoint is None:
            return packed_bytes(target.folder) + (packed_bytes(target.adapter) if target.adapter else 0)
        if target.run not in self._export_bytes:
            export = target.run / EXPORT_FOLDER
            with tempfile.TemporaryDirectory(prefix="raydistill-size-") as scratch:
                if not export.is_dir():
                    export = Path(scratch) / EXPORT_FOLDER
                    export_live(export, self._checkpoint(target), target.folder, {})
                self._export_bytes[target.run] = packed_bytes(export)
        return self._export_bytes[target.run]

    def _checkpoint(self, target: Target) -> nn.Module:
        assert target.checkpoint is not None
        spec = spec_of(target)
        model = self._holding(spec, lambda: build_student(spec, self._device).eval())
        state = load_checkpoint(target.checkpoint).tensors
        load_adapter_state(model, {name: torch.from_numpy(array.copy()) for name, array in state.items()})
        if trained_codes(target) is not None:
            check_codes(target, hash_codes(student_codes(model)))
        return model

    def _adapter(self, target: Target) -> nn.Module:
        from peft import PeftModel

        check_lora(target)
        folder, name = str(target.adapter), f"adapter{next(self._numbers)}"  # PEFT's name: a target's may hold dots
        is_first = self._held is None or self._held[0] != target.folder
        base = self._holding(target.folder, lambda: load_exported(target.folder).to(self._device))
        try:
            if is_first:
                wrapped = PeftModel.from_pretrained(base, folder, adapter_name=name)
            else:
                wrapped, before = base, base.active_adapter
                wrapped.load_adapter(folder, adapter_name=name)
                wrapped.set_adapter(name)
                wrapped.delete_adapter(before)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelError(f"adapter {target.adapter} does not fit its base {target.folder}: {reason}") from error
        self._held = (target.folder, wrapped)
        return cast(nn.Module, wrapped.get_base_model()).eval()

    def _holding(self, made_from: object, make: Callable[[], Any]) -> Any:
        """What is held already, if it was made from the same; two at once may not fit."""
        if self._held is None or self._held[0] != made_from:
            self._held = None
            self._held = (made_from, make())
        return self._held[1]


def load_teacher(folder: Path, followers: Iterable[Path]) -> nn.Module:
    """The teacher on one device where it fits beside the largest of the models that follow, else spread over all GPUs."""
    device, free = default_device(), free_gpu_memory()
    bounds = None
    if len(free) > 1:
        bounds = teacher_bounds(free, dense_bytes(folder), max(map(dense_bytes, followers), default=0))
    if bounds is None or (folder / MANIFEST).is_file():
        model = load_exported(folder).to(device)
    else:
        dtype = "float32" if dtype_of(folder) == torch.float32 else "bfloat16"
        section = TeacherSection(model=str(folder), dtype=dtype, num_gpus=len(bounds))
        model = load_causal_lm(section, "--teacher", device, bounds)
    CompletionModel(model).check_head(f"teacher {folder}", device)
    return model


def dense_bytes(folder: Path) -> int:
    """Bytes of a model's weights when it is loaded, whatever its files hold."""
    return sum(parameter.numel() for parameter in empty_model(folder).parameters()) * dtype_of(folder).itemsize


def dtype_of(folder: Path) -> torch.dtype:
    """In which a model computes unless told otherwise."""
    return AutoConfig.from_pretrained(folder).get_text_config().dtype or torch.float32


def teacher_bounds(free: Sequence[int], teacher_bytes: int, reserved_bytes: int) -> dict[int | str, int] | None:
    """Bytes of weights that the teacher may put on each GPU; None where the first one (or the CPU) holds it whole beside
    the models that follow it there. free: bytes free on each GPU."""
    if len(free) < 2 or teacher_bytes + reserved_bytes <= free[0] * WEIGHTS_SHARE:
        return None
    return memory_to_fill(len(free), [max(0, free[0] - reserved_bytes), *free[1:]])


def spec_of(target: Target) -> StudentSpec:
    """What decides the function of a checkpoint's student."""
    spec = StudentSpec.of(config_of(target.run))
    return StudentSpec(
        student=spec.student.model_copy(update={"model": str(target.folder)}), quant=spec.quant, adapter=spec.adapter
    )


def trained_codes(target: Target) -> str | None:
    """The hash of the codes that a checkpoint was trained with; None where it has none."""
    assert target.checkpoint is not None
    found: str | None = read_description(target.checkpoint).get("codes_hash")
    return found


def check_codes(target: Target, found: str | None) -> None:
    """ModelError unless a checkpoint over its run's model has the codes that it was trained with."""
    trained = trained_codes(target)
    if trained is not None and found != trained:
        raise ModelError(
            f"{target.checkpoint} was trained with codes {trained}, over {target.folder} it has {found}: that is not the model "
            "that the run started from; put it back, or evaluate the run's export"
        )


def adapter_settings(folder: Path) -> Mapping[str, Any]:
    """adapter_config.json of a PEFT folder."""
    settings: dict[str, Any] = json.loads((folder / ADAPTER_CONFIG).read_text())
    return settings


def check_lora(target: Target) -> None:
    """ModelError for an adapter of another kind: it would not be part of the decoder."""
    assert target.adapter is not None
    kind = adapter_settings(target.adapter).get("peft_type")
    if kind != "LORA":
        raise ModelError(f"adapter {target.adapter} is of type {kind}; LoRA adapters can be evaluated")
    if not (target.adapter / ADAPTER_WEIGHTS).is_file():
        raise ModelError(f"adapter {target.adapter} holds no {ADAPTER_WEIGHTS}; weights are read from safetensors only")


def adapter_layers(folder: Path) -> set[str]:
    """The last part of the name of each layer that an adapter changes, such as q_proj."""
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        return {key.partition(".lora_")[0].rpartition(".")[2] for key in file.keys() if ".lora_" in key}  # noqa: SIM118


def role_of(target: Target) -> Role:
    """What was said, what an export says about itself in raydistill.json (`extra.role`), else "student"; a plain folder:
    "control"."""
    if target.role is not None:
        return target.role
    if not (target.folder / MANIFEST).is_file():
        return "control"
    role = read_manifest(target.folder).get("extra", {}).get("role", "student")
    return cast(Role, role) if role in get_args(Role) else "student"


def format_of(target: Target) -> str:
    """The name of the weight format, or "none"; with the rank of an adapter that stays beside the weights."""
    if target.checkpoint is not None:
        spec = spec_of(target)
        fmt = spec.weight_format
        return (fmt.name if fmt else NO_FORMAT) + (f" + r{spec.adapter.rank}" if spec.adapter.mode == "served" else "")
    manifest = read_manifest(target.folder) if (target.folder / MANIFEST).is_file() else {"format": None}
    name = str(manifest["format"]["name"]) if manifest["format"] else NO_FORMAT
    return name if target.adapter is None else f"{name} + r{adapter_settings(target.adapter).get('r')}"
