"""Dense storage loses nothing, and fingerprints change exactly when a value does."""

import numpy as np
import pytest
import torch

from raydistill.errors import QuantError
from raydistill.quant.formats import WeightFormat
from raydistill.quant.grid import quantize
from raydistill.quant.hashing import hash_codes, hash_tensors
from raydistill.quant.packing import pack, pack_codes, packed_size, unpack, unpack_codes


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (3, 5), (8, 32), (7, 9)])
def test_pack_round_trip_is_exact_and_dense(bits: int, shape: tuple[int, int]) -> None:
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape).to(torch.int8)
    packed = pack_codes(codes, bits)
    assert packed.numel() == packed_size(codes.numel(), bits) == -(-codes.numel() * bits // 8)
    assert torch.equal(unpack_codes(packed, bits, shape), codes)


def test_packed_bits_by_hand() -> None:
    assert pack_codes(torch.tensor([-2, -1, 0, 1], dtype=torch.int8), 2).tolist() == [0b11_10_01_00]
    assert pack_codes(torch.tensor([-8, 7], dtype=torch.int8), 4).tolist() == [0b1111_0000]
    eight = torch.tensor([-4, -3, -2, -1, 0, 1, 2, 3], dtype=torch.int8)
    stream = sum(value << (3 * index) for index, value in enumerate(range(8)))
    assert pack_codes(eight, 3).tolist() == list(stream.to_bytes(3, "little"))


def test_codes_out_of_range_and_files_of_a_wrong_size_are_refused() -> None:
    with pytest.raises(QuantError, match="do not fit in 2 signed bits"):
        pack_codes(torch.tensor([2], dtype=torch.int8), 2)
    with pytest.raises(QuantError, match="8 bytes of uint8 are expected"):
        unpack_codes(torch.zeros(7, dtype=torch.uint8), 4, (4, 4))


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_packed_weight_comes_back_with_the_same_hash(symmetric: bool) -> None:
    fmt = WeightFormat(bits=3, group_size=4, symmetric=symmetric, scale="searched")
    quantized = quantize(torch.randn(5, 12), fmt)
    assert hash_codes({"a": quantized}) == hash_codes({"a": unpack(pack(quantized))})


def test_hash_of_codes_sees_every_part() -> None:
    fmt = WeightFormat(bits=2, group_size=4, symmetric=False, scale="absmax")
    weight = torch.randn(4, 8)
    hashes = {hash_codes({"a": quantize(weight, fmt)}), hash_codes({"b": quantize(weight, fmt)})}
    for part in ("codes_OI", "scale_OG", "zero_point_OG"):
        changed = quantize(weight, fmt)
        getattr(changed, part)[0, 0] += 1
        hashes.add(hash_codes({"a": changed}))
    assert len(hashes) == 5


def test_hash_of_tensors_is_the_same_for_numpy_and_torch_whatever_the_order() -> None:
    a, b = torch.randn(3, 4), torch.randn(2)
    one = hash_tensors({"a": a, "b": b})
    assert one == hash_tensors({"b": b.numpy(), "a": np.asfortranarray(a.numpy())})
    assert one != hash_tensors({"a": a, "b": b.double()})
    assert one != hash_tensors({"a": a.reshape(4, 3), "b": b})
    assert hash_tensors({"a": a.bfloat16()}) != hash_tensors({"a": a.half()})
