"""Post-training quantization without training: what a distilled student has to beat.

The honest baseline is the best of four grids on validation data, and the student trains on that same grid.
"""

import torch
from torch import nn

from raydistill.quant.formats import SCALE_RULES, ScaleDtype, WeightFormat
from raydistill.quant.grid import QuantizedWeight, dequantize
from raydistill.quant.rebuild import rebuild_codes
from raydistill.quant.student import quantizable_modules

NUM_GRIDS = 4  # of one width


def ptq_grids(
    bits: int, group_size: int | None, scale_dtype: ScaleDtype = "float16"
) -> tuple[WeightFormat, WeightFormat, WeightFormat, WeightFormat]:
    """The four candidates: absmax or searched scales, symmetric or asymmetric."""
    grids = [
        WeightFormat(bits=bits, group_size=group_size, symmetric=symmetric, scale=rule, scale_dtype=scale_dtype)
        for symmetric in (True, False)
        for rule in SCALE_RULES
    ]
    return (grids[0], grids[1], grids[2], grids[3])


@torch.no_grad()
def apply_ptq(model: nn.Module, fmt: WeightFormat, skip: tuple[str, ...] = ("lm_head",)) -> dict[str, QuantizedWeight]:
    """Replace every quantizable weight by the values of its codes, in place; returns the codes, for an export."""
    layers = quantizable_modules(model, skip)
    codes = rebuild_codes({name: layer.weight for name, layer in layers.items()}, {}, fmt, 1.0, "served")
    for name, layer in layers.items():
        layer.weight.copy_(dequantize(codes[name]))
    return codes
