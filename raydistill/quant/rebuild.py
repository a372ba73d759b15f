"""From base weights and an adapter to the student's weights: the one function that every side uses.

The trainer's forward, the rollout engines and the export all call these, so a student that was trained is, code for
code, the student that is sampled and shipped. Adapter states are named by Hugging Face module: "<module>.lora_A" [R, I]
and "<module>.lora_B" [O, R]; in mode "none" by parameter: "<module>.weight" and whatever else was trained.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from raydistill.errors import QuantError
from raydistill.quant.formats import WeightFormat
from raydistill.quant.grid import QuantizedWeight, dequantize, quantize

Mode = Literal["merged", "served", "none"]


@torch.no_grad()
def merged_weight(weight_OI: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """W + scaling * B @ A in float32.

    The product is accumulated in float64 and rounded once: float32 kernels add in an order of their own on every device
    and thread count, and a last bit that differs moves a code at a rounding tie.
    """
    with torch.autocast(weight_OI.device.type, enabled=False):
        delta = (lora_B.double() @ lora_A.double()).mul_(scaling)
        return weight_OI.float() + delta.float()


def rebuild_codes(
    base_weights: Mapping[str, Tensor], adapter: Mapping[str, Tensor], fmt: WeightFormat, scaling: float, mode: Mode
) -> dict[str, QuantizedWeight]:
    """The codes of every quantized layer of the student.

    base_weights: Hugging Face module name -> W, for exactly the layers that are quantized, in the trainer's dtype.
    merged: quantize(W + scaling * B @ A), and quantize(W) for layers without an adapter. served: quantize(W); the
    adapter stays beside it. none: quantize of the trained weight; base_weights then only gives names and dtypes.
    """
    check_adapter(base_weights, adapter, mode)
    return {
        name: quantize(_full_precision(name, weight, adapter, scaling, mode), fmt, name)
        for name, weight in base_weights.items()
    }


def rebuild_weight(
    name: str, weight: Tensor, adapter: Mapping[str, Tensor], fmt: WeightFormat | None, scaling: float, mode: Mode
) -> Tensor:
    """The dense weight of one layer of the student, in W's dtype on W's device, for an engine that loads dense weights; with
    fmt None the unquantized student's. A whole layer, or the part of one that a rank holds."""
    full = _full_precision(name, weight, adapter, scaling, mode)
    dense = full if fmt is None else dequantize(quantize(full, fmt, name))
    return dense.to(weight.dtype)


def other_trained(names: Iterable[str], adapter: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """What mode "none" trains besides the layers `names`: embeddings, norms, biases."""
    layers = {f"{name}.weight" for name in names}
    yield from ((key, value) for key, value in adapter.items() if key not in layers)


def _full_precision(name: str, weight: Tensor, adapter: Mapping[str, Tensor], scaling: float, mode: Mode) -> Tensor:
    """The weight that is quantized."""
    if mode == "none":
        full = adapter[f"{name}.weight"].to(weight.device, weight.dtype)
    elif mode == "merged" and f"{name}.lora_A" in adapter:
        lora_A, lora_B = (adapter[f"{name}.lora_{part}"].to(weight.device) for part in "AB")
        full = merged_weight(weight, lora_A, lora_B, scaling)
    else:
        full = weight
    if not bool(torch.isfinite(full).all()):
        raise QuantError(f"the weight of layer {name} holds NaN or infinity; if training diverged, lower its rate.")
    return full


def check_adapter(base_weights: Mapping[str, Tensor], adapter: Mapping[str, Tensor], mode: Mode) -> None:
    """QuantError unless the adapter's names and shapes fit the layers."""
    if mode == "none":
        _check_full_weights(base_weights, adapter)
    elif mode == "merged":
        for key in adapter:
            name, _, part = key.rpartition(".")
            other = f"{name}.lora_{'B' if part == 'lora_A' else 'A'}"
            if part not in ("lora_A", "lora_B") or name not in base_weights or other not in adapter:
                raise QuantError(
                    f"adapter tensor {key!r} belongs to no quantized layer, or its pair {other!r} is missing; the "
                    "adapter comes from another model or other quant.skip layers."
                )
            size = base_weights[name].shape[part == "lora_A"]
            if adapter[key].ndim != 2 or adapter[key].shape[part == "lora_A"] != size:
                raise QuantError(
                    f"adapter tensor {key!r} has shape {tuple(adapter[key].shape)}, which does not fit the layer's "
                    f"{tuple(base_weights[name].shape)}."
                )
    elif mode != "served":
        raise QuantError(f"mode={mode!r} is not one of 'merged', 'served', 'none'.")


def _check_full_weights(base_weights: Mapping[str, Tensor], adapter: Mapping[str, Tensor]) -> None:
    for name, weight in base_weights.items():
        trained = adapter.get(f"{name}.weight")
        if trained is None or trained.shape != weight.shape:
            found = "is missing" if trained is None else f"has shape {tuple(trained.shape)}"
            raise QuantError(f"trained weight {name}.weight {found}; mode 'none' needs {tuple(weight.shape)}.")
