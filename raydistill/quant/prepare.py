"""Turning a transformers model into a student: which layers are quantized, and how an adapter joins them."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from raydistill.errors import QuantError
from raydistill.quant.formats import WeightFormat
from raydistill.quant.grid import check_group_size, dequantize
from raydistill.quant.layers import FakeQuantLinear, MergedLinear
from raydistill.quant.lora import LoraConfig, inject_adapter_in_model
from raydistill.quant.packing import PackedWeight, pack
from raydistill.quant.rebuild import Mode, rebuild_codes

ADAPTER = "default"
FORM_ATTRIBUTE = "raydistill_student"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """A low-rank adapter. targets: linear layers by the end of their names ("q_proj", "mlp.up_proj", a full name)."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 <= self.dropout < 1 or not self.targets:
            raise QuantError(f"{self} is not an adapter; give rank >= 1, 0 <= dropout < 1 and at least one target.")

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentForm:
    """What `prepare_student` made of a model; kept on the model itself."""

    mode: Mode
    fmt: WeightFormat | None
    lora: LoraSettings | None
    quantized: tuple[str, ...]  # Hugging Face names of the quantizable layers, also when fmt is None
    targets: tuple[str, ...]  # those with an adapter
    frozen: dict[str, PackedWeight] = field(repr=False)  # codes of layers whose W was replaced, on the host


def quantizable_modules(model: nn.Module, skip: tuple[str, ...] = ("lm_head",)) -> dict[str, nn.Linear]:
    """Every nn.Linear of the decoder by Hugging Face module name, but the output head and those in `skip` (matched like
    adapter targets). Call it before `prepare_student`."""
    if hasattr(model, FORM_ATTRIBUTE):
        raise QuantError("this model is already a student; load a fresh one.")
    any_model = cast(Any, model)
    head = any_model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    decoder = any_model.get_decoder() if hasattr(model, "get_decoder") else model
    inside = {id(module) for module in (decoder if decoder is not None else model).modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and id(module) in inside
        if not any(_matches(name, ending) for ending in skip)
    }


def prepare_student(
    model: nn.Module,
    fmt: WeightFormat | None,
    mode: Mode,
    lora: LoraSettings | None,
    skip: tuple[str, ...] = ("lm_head",),
) -> nn.Module:
    """Make the model the student, in place, and return it. fmt None leaves the weights unquantized in every mode.

    served: y = Q(W)x + scaling * B(Ax); plain PEFT LoRA beside frozen Q(W).
    merged: y = Q(W + scaling * BA)x for the targets, Q(W)x for the other quantizable layers; only A and B are trained.
    none: y = Q(W)x, everything is trained (quantization-aware training of all parameters).
    A and B are float32 whatever the model's dtype.
    """
    layers = quantizable_modules(model, skip)
    for name, layer in layers.items() if fmt is not None else ():
        check_group_size(layer.in_features, cast(WeightFormat, fmt), name)
    targets = _check_and_resolve(model, layers, mode, lora)
    frozen: dict[str, PackedWeight] = {}
    if mode == "none":
        model.requires_grad_(True)
        for name, layer in layers.items() if fmt is not None else ():
            model.set_submodule(name, FakeQuantLinear(layer, cast(WeightFormat, fmt)))
    else:
        assert lora is not None
        if fmt is not None:
            rest = {name: layer for name, layer in layers.items() if mode == "served" or name not in targets}
            frozen = freeze_quantized(rest, fmt)
        inject_lora(model, lora, targets, partial(MergedLinear, fmt=fmt) if mode == "merged" else None)
    form = StudentForm(mode=mode, fmt=fmt, lora=lora, quantized=tuple(layers), targets=targets, frozen=frozen)
    setattr(model, FORM_ATTRIBUTE, form)
    return model


@torch.no_grad()
def freeze_quantized(layers: Mapping[str, nn.Linear], fmt: WeightFormat) -> dict[str, PackedWeight]:
    """Replace each layer's W by the values of its codes, in place; returns the codes, which quantizing a second time
    would not give back."""
    packed: dict[str, PackedWeight] = {}
    for name, layer in layers.items():
        quantized = rebuild_codes({name: layer.weight}, {}, fmt, 1.0, "served")[name]
        layer.weight.copy_(dequantize(quantized))
        layer.weight.requires_grad_(False)
        packed[name] = pack(quantized)
    return packed


def inject_lora(model: nn.Module, lora: LoraSettings, targets: tuple[str, ...], layer_class: Any = None) -> None:
    """Give each target a PEFT LoRA layer (of `layer_class`); everything but A and B is frozen."""
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=cast(int, lora.alpha),  # PEFT divides it by r; a fraction is fine
        lora_dropout=lora.dropout,
        target_modules=list(targets),
        bias="none",
    )
    if layer_class is not None:
        config._register_custom_module({nn.Linear: layer_class})
    inject_adapter_in_model(config, model, ADAPTER)
    for name in targets:
        layer = cast(Any, model.get_submodule(name))
        layer.lora_A[ADAPTER].float()
        layer.lora_B[ADAPTER].float()


def student_form(model: nn.Module) -> StudentForm:
    """What `prepare_student` recorded."""
    form = getattr(model, FORM_ATTRIBUTE, None)
    if not isinstance(form, StudentForm):
        raise QuantError(f"{type(model).__name__} is not a prepared student; call prepare_student first.")
    return form


def _matches(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _check_and_resolve(
    model: nn.Module, layers: Mapping[str, nn.Linear], mode: Mode, lora: LoraSettings | None
) -> tuple[str, ...]:
    """The full names of the adapter's targets; QuantError for settings that do not go together."""
    if (mode == "none") != (lora is None) or mode not in ("merged", "served", "none"):
        raise QuantError(f"mode={mode!r} with lora={lora}: 'merged' and 'served' need lora settings, 'none' takes none")
    if lora is None:
        return ()
    if mode == "merged" and lora.dropout > 0:
        raise QuantError(
            f"adapter.dropout={lora.dropout} cannot be applied to a merged adapter, whose input is not separate from W's; "
            "use adapter.dropout=0 or adapter.mode='served'."
        )
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    targets = [name for name in linear if any(_matches(name, ending) for ending in lora.targets)]
    kinds = sorted({name.rpartition(".")[2] for name in linear})
    for ending in lora.targets:
        if not any(_matches(name, ending) for name in targets):
            near = difflib.get_close_matches(ending.rpartition(".")[2], kinds, n=1, cutoff=0.0)
            raise QuantError(
                f"adapter.targets: {ending!r} is no linear layer of {type(model).__name__}; did you mean {near[0]!r}? "
                f"Its linear layers are {', '.join(kinds)}."
            )
    outside = [name for name in targets if name not in layers]
    if mode == "merged" and outside:
        raise QuantError(
            f"adapter.targets: {outside[0]} is not quantized (output head, or in quant.skip), so nothing can be merged into "
            "its codes; take it out of adapter.targets or out of quant.skip, or use adapter.mode='served'."
        )
    return tuple(targets)
