"""Grids: weights to codes and back, and the fake quantizer that a student trains through.

Convention: codes are signed, -2^(B-1) .. 2^(B-1) - 1, for symmetric and asymmetric formats alike (as compressed-
tensors stores them), and weight = (code - zero_point) * scale, or codebook[code] * scale. All arithmetic is float32.
Sums over a group are taken pairwise in a fixed order, so the same float32 weights give the same codes on every
device.

Shape letters: O out_features, I in_features, G groups in a row, S inputs in a group, N = O * G groups, C scale factors.
"""

import math
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raydistill.errors import QuantError
from raydistill.quant.formats import WeightFormat

# From .3 of the range to all of it, denser towards 1: at 2 bits the best factor of a group is often near .6, at 4 bits
# above .8. On Gaussian and heavy-tailed weights these 16 come within .3 % (2 bits) and .7 % (4 bits) of the squared
# error of 141 even steps, and a rebuild at every training step stays cheap.
FACTORS: tuple[float, ...] = (
    *(0.30, 0.40, 0.48, 0.55, 0.61, 0.66, 0.71, 0.75),
    *(0.79, 0.83, 0.86, 0.89, 0.92, 0.945, 0.97, 1.00),
)
# Elements of one candidate buffer: a few MB stay in a CPU's cache; it also bounds the memory for large layers.
CHUNK_ELEMENTS = {True: 400_000, False: 64_000_000}  # by "is it a CPU"
# A shrunk range must beat the full one by more than float32 noise, so "searched" is never worse than "absmax".
FULL_RANGE_BONUS = 1 - 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """The quantized form of one linear layer's weight: what is stored, hashed and compared."""

    codes_OI: Tensor  # int8, code_min .. code_max of the format
    scale_OG: Tensor  # in the format's scale_dtype, > 0
    zero_point_OG: Tensor | None  # int8, code_min .. code_max; None for symmetric formats
    fmt: WeightFormat

    def to(self, device: torch.device | str) -> "QuantizedWeight":
        """The same codes on another device."""
        zero_point = None if self.zero_point_OG is None else self.zero_point_OG.to(device)
        return QuantizedWeight(
            codes_OI=self.codes_OI.to(device), scale_OG=self.scale_OG.to(device), zero_point_OG=zero_point, fmt=self.fmt
        )


def check_group_size(in_features: int, fmt: WeightFormat, name: str, field: str = "group_size") -> int:
    """The number of inputs that share a scale in this layer; a QuantError when the group size does not divide it.

    field: what the user knows the group size by."""
    if fmt.group_size is None:
        return in_features
    if in_features % fmt.group_size == 0:
        return fmt.group_size
    fitting = [size for size in range(1, in_features + 1) if in_features % size == 0]
    below = [str(size) for size in fitting if size < fmt.group_size][-1:]
    above = [str(size) for size in fitting if size > fmt.group_size][:1]
    raise QuantError(
        f"{field}={fmt.group_size} does not divide the {in_features} inputs of layer {name}; "
        f"use {' or '.join(below + above)}, or 'channel' for one scale per output channel."
    )


@torch.no_grad()
def quantize(weight_OI: Tensor, fmt: WeightFormat, name: str = "weight") -> QuantizedWeight:
    """Codes, scales and zero points of a weight; computed in float32 whatever its dtype.

    Symmetric: scale = absmax / ((2^B - 1) / 2), code = clip(round(w / scale)).
    Asymmetric: scale = (max - min) / (2^B - 1) of the range widened to hold zero, integer zero point, and
    code = clip(round(w / scale + zero point)). Codebook: scale = absmax, code = the nearest value's place.
    The scale is rounded to the format's scale_dtype first.
    """
    if weight_OI.ndim != 2:
        raise QuantError(f"layer {name} has a weight of shape {tuple(weight_OI.shape)}; only matrices are quantized.")
    out_features, in_features = weight_OI.shape
    size = check_group_size(in_features, fmt, name)
    # Groups lie along the last axis: every operation below then runs over contiguous memory.
    groups_SN = weight_OI.detach().float().reshape(-1, size).t().contiguous()
    low_N, high_N = groups_SN.amin(dim=0), groups_SN.amax(dim=0)
    if fmt.codebook is not None:
        span_N = torch.maximum(-low_N, high_N)
    elif fmt.symmetric:
        span_N = torch.maximum(-low_N, high_N) / ((2**fmt.bits - 1) / 2)
    else:
        low_N = low_N.clamp(max=0)
        span_N = (high_N.clamp(min=0) - low_N) / (2**fmt.bits - 1)
    scale_N = _round_scale(span_N, fmt)
    zero_N = None if fmt.symmetric else (fmt.code_min - low_N / scale_N).clamp_(fmt.code_min, fmt.code_max).round_()
    if fmt.scale == "searched":
        scale_N = _search_scale(groups_SN, span_N, zero_N, fmt)
    scaled_SN = groups_SN / scale_N
    if zero_N is not None:
        scaled_SN += zero_N
    if fmt.codebook is not None:
        codes_SN = _nearest(scaled_SN, fmt)
    else:
        codes_SN = scaled_SN.clamp_(fmt.code_min, fmt.code_max).round_().to(torch.int8)
    shape_OG = (out_features, in_features // size)
    return QuantizedWeight(
        codes_OI=codes_SN.t().reshape(out_features, in_features),
        scale_OG=scale_N.to(getattr(torch, fmt.scale_dtype)).reshape(shape_OG),
        zero_point_OG=None if zero_N is None else zero_N.to(torch.int8).reshape(shape_OG),
        fmt=fmt,
    )


@torch.no_grad()
def dequantize(quantized: QuantizedWeight) -> Tensor:
    """The float32 weight [O, I] that the codes stand for: (code - zero_point) * scale, or codebook[code] * scale."""
    shape, fmt = quantized.codes_OI.shape, quantized.fmt
    values_OI = quantized.codes_OI.float() if fmt.codebook is None else _look_up(quantized.codes_OI, fmt)
    groups_OGS = values_OI.reshape(*quantized.scale_OG.shape, -1)
    if quantized.zero_point_OG is not None:
        groups_OGS -= quantized.zero_point_OG.float()[:, :, None]
    groups_OGS *= quantized.scale_OG.float()[:, :, None]
    return groups_OGS.reshape(shape)


def fake_quantize(weight: Tensor, fmt: WeightFormat) -> Tensor:
    """`dequantize(quantize(weight))` in the weight's dtype, with the gradient of the identity (straight-through).

    The value is bit for bit that of the codes that an export stores; property under test.
    """
    return straight_through(weight, dequantize(quantize(weight, fmt)).to(weight.dtype))


def straight_through(weight: Tensor, value: Tensor) -> Tensor:
    """Exactly `value` forward; backward the gradient goes to `weight` unchanged (Bengio et al., 1308.3432)."""
    return _StraightThrough.apply(weight, value)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, value: Tensor) -> Tensor:
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _nearest(scaled: Tensor, fmt: WeightFormat) -> Tensor:
    """The int8 codes of the codebook's values that lie nearest; the lower of two that are equally near."""
    values = torch.tensor(fmt.codebook, dtype=torch.float32, device=scaled.device)
    return (torch.bucketize(scaled, (values[1:] + values[:-1]) / 2) + fmt.code_min).to(torch.int8)


def _look_up(codes: Tensor, fmt: WeightFormat) -> Tensor:
    values = torch.tensor(fmt.codebook, dtype=torch.float32, device=codes.device)
    return values[codes.long() - fmt.code_min]


def _round_scale(span: Tensor, fmt: WeightFormat) -> Tensor:
    """The scale as it will be stored, held in float32. A scale that is zero (all weights zero, or too small for the
    dtype) becomes the dtype's epsilon, as in compressed-tensors: its codes are then the zero point."""
    limits = torch.finfo(getattr(torch, fmt.scale_dtype))
    stored = span.clamp(max=limits.max).to(getattr(torch, fmt.scale_dtype)).float()
    return stored.masked_fill_(stored == 0, limits.eps)


def _search_scale(groups_SN: Tensor, span_N: Tensor, zero_N: Tensor | None, fmt: WeightFormat) -> Tensor:
    """The scale among span * FACTORS with the least squared error, for each group; of equal ones the largest.

    Both ends of an asymmetric range shrink by the same factor, so the zero point is the same for all candidates.
    """
    factors_C = torch.tensor(FACTORS, dtype=torch.float32, device=groups_SN.device)
    scale_CN = _round_scale(factors_C[:, None] * span_N, fmt)
    size = groups_SN.shape[0]
    step = max(1, CHUNK_ELEMENTS[groups_SN.device.type == "cpu"] // (len(FACTORS) * size))
    best: list[Tensor] = []
    for start in range(0, groups_SN.shape[1], step):
        part_CN = scale_CN[:, start : start + step]
        scaled_SCN, error_SCN = _scratch((size, *part_CN.shape), groups_SN.device)
        torch.div(groups_SN[:, None, start : start + step], part_CN, out=scaled_SCN)
        if zero_N is not None:
            scaled_SCN += zero_N[start : start + step]
        torch.clamp(scaled_SCN, fmt.code_min, fmt.code_max, out=error_SCN)
        error_SCN.round_().sub_(scaled_SCN).square_()
        error_CN = _pairwise_sum(error_SCN).mul_(part_CN.square())
        error_CN[-1].mul_(FULL_RANGE_BONUS)
        winner_CN = error_CN <= error_CN.amin(dim=0)
        best.append(part_CN.mul(winner_CN).amax(dim=0))
    return torch.cat(best)


def _scratch(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Two uninitialised float32 tensors. On CPU they are views of two buffers that each thread keeps: fresh pages for
    every layer would cost more than the arithmetic."""
    if device.type != "cpu":
        return torch.empty(shape, device=device), torch.empty(shape, device=device)
    count = math.prod(shape)
    if _thread.first.numel() < count:
        with torch.inference_mode(False):
            _thread.first, _thread.second = torch.empty(count), torch.empty(count)
    return _thread.first[:count].view(shape), _thread.second[:count].view(shape)


class _Thread(threading.local):
    first = torch.empty(0)
    second = torch.empty(0)


_thread = _Thread()


def _pairwise_sum(values_SCN: Tensor) -> Tensor:
    """Sum over S by halving, in place: one order of additions on every device, whatever the chunk."""
    size = values_SCN.shape[0]
    while size > 1:
        half = (size + 1) // 2
        values_SCN[: size - half].add_(values_SCN[half:size])
        size = half
    return values_SCN[0]
