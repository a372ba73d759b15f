"""From config sections to transformers models: the one place that loads a teacher or builds a student.

User models are read from safetensors only; `trust_remote_code` is off unless asked for. Runs inside actors (it imports
torch); the driver's checks before a run use `model_files` alone. PEFT and what it brings along is imported where a student
is built: a process that only loads a teacher starts without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from raydistill.config import AdapterSection, Config, QuantSection, StudentSection, TeacherSection
from raydistill.errors import ModelError, ResourceError
from raydistill.imports import UNUSED_BY_MODELS, quick_transformers, without
from raydistill.quant.formats import WeightFormat

with without(*UNUSED_BY_MODELS), quick_transformers():
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

if TYPE_CHECKING:
    from raydistill.quant.student import LoraSettings

transformers_logging.disable_progress_bar()
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WEIGHTS_SHARE = 0.85  # of a GPU's free memory, where a model is spread over several


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentSpec:
    """All that decides the student's function: the same on trainer, engines, evaluation and export."""

    student: StudentSection
    quant: QuantSection
    adapter: AdapterSection

    @classmethod
    def of(cls, config: Config) -> StudentSpec:
        return cls(student=config.student, quant=config.quant, adapter=config.adapter)

    @property
    def model(self) -> str:
        assert self.student.model is not None, "launch fills in student.model"
        return self.student.model

    @property
    def weight_format(self) -> WeightFormat | None:
        return self.quant.weight_format

    @property
    def scaling(self) -> float:
        """s of W + s*BA."""
        return self.adapter.alpha / self.adapter.rank

    @property
    def lora(self) -> LoraSettings | None:
        from raydistill.quant.student import LoraSettings

        a = self.adapter
        if a.mode == "none":
            return None
        return LoraSettings(rank=a.rank, alpha=a.alpha, dropout=a.dropout, targets=a.targets)


def load_causal_lm(
    section: StudentSection | TeacherSection,
    field: str,
    device: str = "cpu",
    max_memory: Mapping[int | str, int] | None = None,
) -> nn.Module:
    """A transformers causal language model in eval mode; ModelError names the config field.

    On `device`, or layer by layer over the devices of `max_memory` (GPU number -> bytes it may take): accelerate's hooks
    then move activations from device to device, and input may come from any of them.
    """
    spread = {} if max_memory is None else {"device_map": "auto", "max_memory": dict(max_memory)}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            section.model,
            dtype=DTYPES[section.dtype],
            trust_remote_code=section.trust_remote_code,
            use_safetensors=True,
            **spread,
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{field}={section.model!r} cannot be loaded as a causal language model: {reason}") from error
    if max_memory is None:
        return model.to(device).eval()
    if outside := {str(place) for place in getattr(model, "hf_device_map", {}).values()} - {
        str(place) for place in max_memory
    }:
        # accelerate would go on from the host's memory and the disk, a hundred times slower
        role, dot, _ = field.partition(".")
        more = f"raise {role}.num_gpus" if dot else "use a machine with more"
        raise ModelError(
            f"{field}={section.model!r} does not fit {len(max_memory)} devices with {sum(max_memory.values()) / 2**30:.3g} "
            f"GiB for it together (the rest went to {', '.join(sorted(outside))}); {more} or choose a smaller model"
        )
    return model.eval()


def memory_to_fill(num_gpus: float, free: Sequence[int]) -> dict[int | str, int] | None:
    """Bytes of weights that a model may put on each GPU of an actor that booked `num_gpus` of them; None where one device
    (or the CPU) holds it whole. free: bytes free on each visible GPU.

    The rest of each is for activations and logits.
    """
    if num_gpus <= 1:
        return None
    if len(free) < num_gpus:
        raise ResourceError(
            f"teacher.num_gpus={num_gpus:g}, but the actor sees {len(free)} GPUs: start its node's Ray with as many as the "
            "machine has, or lower the field"
        )
    return {gpu: int(free[gpu] * WEIGHTS_SHARE) for gpu in range(int(num_gpus))}


def free_gpu_memory() -> list[int]:
    """Bytes free on each GPU that this process sees."""
    return [torch.cuda.mem_get_info(gpu)[0] for gpu in range(torch.cuda.device_count())]


def build_student(spec: StudentSpec, device: str = "cpu") -> nn.Module:
    """The student as transformers + PEFT: the function that is trained, and that every engine must reproduce."""
    from raydistill.quant.student import prepare_student

    model = load_causal_lm(spec.student, "student.model", device)
    return prepare_student(model, spec.weight_format, spec.adapter.mode, spec.lora, skip=spec.quant.skip)


def quantizable_weights(spec: StudentSpec) -> dict[str, torch.Tensor]:
    """The full-precision W of every layer that gets quantized, by Hugging Face module name, on the host."""
    from raydistill.quant.student import quantizable_modules

    model = load_causal_lm(spec.student, "student.model")
    return {name: module.weight.detach() for name, module in quantizable_modules(model, spec.quant.skip).items()}


def empty_model(path: str | Path, trust_remote_code: bool = False) -> nn.Module:
    """The architecture without weights (meta device), for checks of names and shapes."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def eos_ids(model_folder: str | Path, tokenizer: Any) -> tuple[int, ...]:
    """All ids that end a completion: the tokenizer's EOS and those of the generation config."""
    from transformers import GenerationConfig

    ids = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    try:
        extra = GenerationConfig.from_pretrained(model_folder).eos_token_id
    except OSError:
        extra = None
    ids.update(extra if isinstance(extra, list) else [] if extra is None else [extra])
    return tuple(sorted(ids))


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
