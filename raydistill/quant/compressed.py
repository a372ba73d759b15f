"""compressed-tensors, pack-quantized W4A16: 4-bit weights as vLLM and transformers read them with no code of ours.

    <layer>.weight_packed      int32 [O, I/8]   eight codes in an integer, lowest bits first, shifted to 0 .. 15
    <layer>.weight_scale       [O, G]           as trained, in the format's scale_dtype; "channel": G = 1
    <layer>.weight_zero_point  int32 [O/8, G]   asymmetric formats; packed along O
    <layer>.weight_shape       int64 [2]

The packing is the library's own; weight = (code - zero_point) * scale is ours and the library's convention alike, so
nothing is rounded on the way there or back. vLLM keeps scales in the dtype it computes in (float32 and float16 scales
become bfloat16 under `--dtype bfloat16`); `quant.scale_dtype = "bfloat16"` is trained with what it will use.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
)
from torch import Tensor

from raydistill.errors import QuantError
from raydistill.quant.formats import WeightFormat
from raydistill.quant.grid import QuantizedWeight

METHOD = "compressed-tensors"


def quantization_config(fmt: WeightFormat, ignored: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` of config.json. ignored: linear layers that are stored as they are."""
    weights = QuantizationArgs(
        num_bits=fmt.bits,
        type="int",
        symmetric=fmt.symmetric,
        strategy="channel" if fmt.group_size is None else "group",
        group_size=fmt.group_size,
    )
    packed = CompressionFormat.pack_quantized
    config = QuantizationConfig(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights, format=packed)},
        format=packed.value,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=list(ignored),
    )
    return config.model_dump(mode="json")


@torch.no_grad()
def compressed_tensors(codes: Mapping[str, QuantizedWeight]) -> dict[str, Tensor]:
    """The file's tensors for every quantized layer."""
    tensors: dict[str, Tensor] = {}
    for name, quantized in codes.items():
        weight, bits = quantized.to("cpu"), quantized.fmt.bits
        tensors[f"{name}.weight_packed"] = pack_to_int32(weight.codes_OI, bits).contiguous()
        tensors[f"{name}.weight_scale"] = weight.scale_OG.contiguous()
        tensors[f"{name}.weight_shape"] = torch.tensor(weight.codes_OI.shape)
        if weight.zero_point_OG is not None:
            packed = pack_to_int32(weight.zero_point_OG, bits, packed_dim=0)
            tensors[f"{name}.weight_zero_point"] = packed.contiguous()
    return tensors


@torch.no_grad()
def take_codes(
    tensors: dict[str, Tensor], layers: Mapping[str, Sequence[int]], fmt: WeightFormat
) -> dict[str, QuantizedWeight]:
    """The codes of every layer, unpacked by the library; their tensors leave `tensors`. KeyError if one is missing."""
    codes: dict[str, QuantizedWeight] = {}
    for name, shape in layers.items():
        packed, scale_OG = tensors.pop(f"{name}.weight_packed"), tensors.pop(f"{name}.weight_scale")
        stored = tensors.pop(f"{name}.weight_shape").tolist()
        if stored != list(shape):
            raise QuantError(f"layer {name} has shape {stored} in its file, {list(shape)} in raydistill.json")
        zero_point = None if fmt.symmetric else tensors.pop(f"{name}.weight_zero_point")
        codes[name] = QuantizedWeight(
            codes_OI=unpack_from_int32(packed, fmt.bits, torch.Size(stored)),
            scale_OG=scale_OG,
            zero_point_OG=None
            if zero_point is None
            else unpack_from_int32(zero_point, fmt.bits, scale_OG.shape, packed_dim=0),
            fmt=fmt,
        )
    return codes
