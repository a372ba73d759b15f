"""Dense storage of codes: 2, 3 or 4 bits each, with no bit unused inside a stream.

Codes are shifted to 0 .. 2^B - 1 and written lowest bits first: four 2-bit or two 4-bit codes in a byte, eight 3-bit
codes in three bytes. The stream runs over the tensor row by row; only its last bytes may hold padding (zeros).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from raydistill.errors import QuantError
from raydistill.quant.formats import WeightFormat
from raydistill.quant.grid import QuantizedWeight

CODES_PER_UNIT = 8  # eight codes of B bits are exactly B bytes, for every B


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` codes take."""
    return math.ceil(count * bits / 8)


@torch.no_grad()
def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """int8 codes of any shape, -2^(B-1) .. 2^(B-1) - 1, as a flat uint8 tensor of `packed_size` bytes."""
    unsigned = codes.reshape(-1).to(torch.int32) + 2 ** (bits - 1)
    if unsigned.numel() and (int(unsigned.min()) < 0 or int(unsigned.max()) >= 2**bits):
        raise QuantError(f"codes from {int(codes.min())} to {int(codes.max())} do not fit in {bits} signed bits.")
    count = unsigned.numel()
    units = torch.nn.functional.pad(unsigned, (0, -count % CODES_PER_UNIT)).reshape(-1, CODES_PER_UNIT)
    # int32 holds a unit of 2- and 3-bit codes (24 bits); a unit of 4-bit codes has 32, so build it from bits in bytes.
    packed = torch.zeros(units.shape[0], bits, dtype=torch.int32, device=codes.device)
    for index in range(CODES_PER_UNIT):
        byte, shift = divmod(index * bits, 8)
        packed[:, byte] |= (units[:, index] << shift) & 255
        if shift + bits > 8:
            packed[:, byte + 1] |= units[:, index] >> (8 - shift)
    return packed.to(torch.uint8).reshape(-1)[: packed_size(count, bits)].clone()


@torch.no_grad()
def unpack_codes(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The int8 codes that `pack_codes` packed, in their shape."""
    count = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.numel() != packed_size(count, bits):
        raise QuantError(
            f"{packed.numel()} bytes of {packed.dtype} cannot hold {shape} codes of {bits} bits; "
            f"{packed_size(count, bits)} bytes of uint8 are expected. The file is damaged: export again."
        )
    units = torch.nn.functional.pad(packed.reshape(-1).to(torch.int32), (0, -packed.numel() % bits)).reshape(-1, bits)
    codes = torch.empty(units.shape[0], CODES_PER_UNIT, dtype=torch.int32, device=packed.device)
    for index in range(CODES_PER_UNIT):
        byte, shift = divmod(index * bits, 8)
        value = units[:, byte] >> shift
        if shift + bits > 8:
            value = value | (units[:, byte + 1] << (8 - shift))
        codes[:, index] = value & (2**bits - 1)
    return (codes.reshape(-1)[:count] - 2 ** (bits - 1)).to(torch.int8).reshape(shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight:
    """A `QuantizedWeight` as it lies in a file or waits on the host."""

    codes: Tensor  # uint8, flat
    scale_OG: Tensor
    zero_point: Tensor | None  # uint8, flat
    shape_OI: tuple[int, int]
    fmt: WeightFormat


def pack(quantized: QuantizedWeight) -> PackedWeight:
    """On the host, in contiguous memory."""
    host = quantized.to("cpu")
    bits = host.fmt.bits
    return PackedWeight(
        codes=pack_codes(host.codes_OI, bits),
        scale_OG=host.scale_OG.contiguous(),
        zero_point=None if host.zero_point_OG is None else pack_codes(host.zero_point_OG, bits),
        shape_OI=(host.codes_OI.shape[0], host.codes_OI.shape[1]),
        fmt=host.fmt,
    )


def unpack(packed: PackedWeight) -> QuantizedWeight:
    """The inverse of `pack`, exact."""
    bits, shape_OG = packed.fmt.bits, (packed.scale_OG.shape[0], packed.scale_OG.shape[1])
    zero_point = None if packed.zero_point is None else unpack_codes(packed.zero_point, bits, shape_OG)
    return QuantizedWeight(
        codes_OI=unpack_codes(packed.codes, bits, packed.shape_OI),
        scale_OG=packed.scale_OG,
        zero_point_OG=zero_point,
        fmt=packed.fmt,
    )
