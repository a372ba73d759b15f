"""The student as one function on every side: how it is made, what travels, which codes it computes with.

`prepare_student` turns a freshly loaded transformers model into the student, in place; trainer, reference engine and
evaluation all call it. Then `adapter_state` reads what travels, `load_adapter_state` writes it, `student_codes` gives
the codes of the live model. Engines that hold only W use `rebuild_codes` or `rebuild_weight`.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from raydistill.errors import QuantError
from raydistill.quant.grid import QuantizedWeight
from raydistill.quant.packing import unpack
from raydistill.quant.prepare import (
    ADAPTER,
    LoraSettings,
    StudentForm,
    prepare_student,
    quantizable_modules,
    student_form,
)
from raydistill.quant.rebuild import (
    Mode,
    check_adapter,
    merged_weight,
    other_trained,
    rebuild_codes,
    rebuild_weight,
)

__all__ = [
    "LoraSettings", "Mode", "StudentForm", "adapter_state", "base_weight", "check_adapter", "layer_codes",
    "load_adapter_state", "merged_weight", "other_trained", "prepare_student", "quantizable_modules", "rebuild_codes",
    "rebuild_weight", "student_codes", "student_form",
]  # fmt: skip


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """What travels, as float32 copies on the host: "<module>.lora_A" and ".lora_B"; in mode "none" every trained
    parameter under its Hugging Face name."""
    return {key: parameter.detach().to("cpu", torch.float32, copy=True) for key, parameter in _trained(model).items()}


@torch.no_grad()
def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Write a state of `adapter_state` into the model; names and shapes must be exactly the model's."""
    parameters = _trained(model)
    missing, unexpected = sorted(parameters.keys() - state.keys()), sorted(state.keys() - parameters.keys())
    if missing or unexpected:
        raise QuantError(
            f"the adapter does not fit the student: {len(missing)} tensors are missing (first: {missing[:1]}), "
            f"{len(unexpected)} are unexpected (first: {unexpected[:1]}). Use the adapter.mode and adapter.targets it "
            "was trained with."
        )
    for key, parameter in parameters.items():
        if parameter.shape != state[key].shape:
            raise QuantError(
                f"adapter tensor {key} has shape {tuple(state[key].shape)}, the student's is {tuple(parameter.shape)}; "
                "use the adapter.rank it was trained with."
            )
    for key, parameter in parameters.items():
        parameter.copy_(state[key])


def student_codes(model: nn.Module) -> dict[str, QuantizedWeight]:
    """The codes that the live model computes with, by module name; empty for an unquantized student."""
    form = student_form(model)
    return {} if form.fmt is None else {name: layer_codes(model, name) for name in form.quantized}


def layer_codes(model: nn.Module, name: str) -> QuantizedWeight:
    """One quantized layer's codes: for a side that does not want to hold those of all layers."""
    form = student_form(model)
    assert form.fmt is not None, "the student is not quantized"
    if name in form.frozen:
        return unpack(form.frozen[name])
    scaling = 1.0 if form.lora is None else form.lora.scaling
    adapter = {key: value.detach() for key, value in _trained(model).items() if key.rpartition(".")[0] == name}
    return rebuild_codes({name: base_weight(model, name)}, adapter, form.fmt, scaling, form.mode)[name]


def base_weight(model: nn.Module, name: str) -> Tensor:
    """W of a layer of a student, under its adapter if it has one."""
    layer = cast(Any, model.get_submodule(name))
    return (layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer).weight.detach()


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    form = student_form(model)
    if form.mode == "none":
        return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = {name: cast(Any, model.get_submodule(name)) for name in form.targets}
    pairs = {f"{name}.lora_A": layer.lora_A[ADAPTER].weight for name, layer in layers.items()}
    pairs.update({f"{name}.lora_B": layer.lora_B[ADAPTER].weight for name, layer in layers.items()})
    return pairs
