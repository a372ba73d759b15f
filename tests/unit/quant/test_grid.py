"""Codes, scales and the straight-through gradient, against hand computation and against compressed-tensors."""

import itertools

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize as reference_dequantize
from compressed_tensors.quantization.lifecycle.forward import quantize as reference_quantize
from compressed_tensors.quantization.utils import calculate_qparams

from raydistill.errors import QuantError
from raydistill.quant.baselines import apply_ptq, ptq_grids
from raydistill.quant.formats import BITS, WeightFormat, format_from_dict
from raydistill.quant.grid import FACTORS, QuantizedWeight, dequantize, fake_quantize, quantize

ALL_FORMATS = [
    WeightFormat(bits=bits, group_size=group, symmetric=symmetric, scale=scale)
    for bits, group, symmetric, scale in itertools.product((2, 3, 4), (16, None), (True, False), ("absmax", "searched"))
]


def weights(rows: int = 24, columns: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    return weight * torch.exp(torch.randn(rows, 1, generator=generator))


def squared_error(weight: torch.Tensor, fmt: WeightFormat) -> torch.Tensor:
    groups = (dequantize(quantize(weight, fmt)) - weight).double().reshape(-1, fmt.group_size or weight.shape[1])
    return groups.square().sum(1)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, None])
def test_codes_equal_those_of_compressed_tensors(bits: int, symmetric: bool, group_size: int | None) -> None:
    weight = weights()
    weight[3] = weight[3].abs() + 0.5  # a row without zero in its range
    fmt = WeightFormat(bits=bits, group_size=group_size, symmetric=symmetric, scale="absmax", scale_dtype="float32")
    args = QuantizationArgs(
        num_bits=bits,
        symmetric=symmetric,
        strategy="channel" if group_size is None else "group",
        group_size=group_size,
    )
    groups = weight.reshape(24, -1, group_size or 64)
    scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    expected = reference_quantize(weight, scale, zero_point, args, dtype=torch.int8)

    ours = quantize(weight, fmt)

    assert torch.equal(ours.codes_OI, expected)
    assert torch.equal(ours.scale_OG, scale)
    if not symmetric:
        assert ours.zero_point_OG is not None
        assert torch.equal(ours.zero_point_OG, zero_point.to(torch.int8))
    reference = reference_dequantize(expected, scale, None if symmetric else zero_point, args)
    assert torch.equal(dequantize(ours), reference)


def test_int2_symmetric_by_hand() -> None:
    fmt = WeightFormat(bits=2, group_size=None, symmetric=True, scale="absmax", scale_dtype="float32")
    got = quantize(torch.tensor([[-3.0, -0.8, 0.9, 2.9]]), fmt)
    assert got.scale_OG.tolist() == [[2.0]]  # 3 / 1.5
    assert got.codes_OI.tolist() == [[-2, 0, 0, 1]]  # -1.5 ties to even
    assert dequantize(got).tolist() == [[-4.0, 0.0, 0.0, 2.0]]


def test_int2_asymmetric_by_hand() -> None:
    fmt = WeightFormat(bits=2, group_size=2, symmetric=False, scale="absmax")
    got = quantize(torch.tensor([[-1.0, 2.0, 3.0, 6.0]]), fmt)
    assert got.scale_OG.tolist() == [[1.0, 2.0]]  # [-1, 2] / 3 and, widened to zero, [0, 6] / 3
    assert got.zero_point_OG is not None
    assert got.zero_point_OG.tolist() == [[-1, -2]]
    assert got.codes_OI.tolist() == [[-2, 1, 0, 1]]  # 3 / 2 - 2 = -.5 ties to even
    assert dequantize(got).tolist() == [[-1.0, 2.0, 4.0, 6.0]]


def test_searched_scale_by_hand_shrinks_a_range_that_one_outlier_stretched() -> None:
    fmt = WeightFormat(bits=2, group_size=None, symmetric=True, scale="searched", scale_dtype="float32")
    weight = torch.tensor([[1.0] * 15 + [2.0]])
    best = min(FACTORS, key=lambda f: 15 * (1 - f * 4 / 3) ** 2 + (2 - f * 4 / 3) ** 2)
    assert quantize(weight, fmt).scale_OG.item() == pytest.approx(best * 2 / 1.5, rel=1e-6)


@pytest.mark.parametrize("fmt", [f for f in ALL_FORMATS if f.scale == "searched"], ids=lambda f: f.name)
def test_searched_is_never_worse_than_absmax_in_any_group(fmt: WeightFormat) -> None:
    absmax = format_from_dict({**fmt.to_dict(), "scale": "absmax"})
    assert bool((squared_error(weights(), fmt) <= squared_error(weights(), absmax)).all())
    assert squared_error(weights(), fmt).sum() < 0.97 * squared_error(weights(), absmax).sum() or fmt.bits > 2


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=lambda f: f.name)
def test_fake_quantize_is_bit_equal_to_its_codes_and_has_the_identity_gradient(fmt: WeightFormat) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        weight = weights().to(dtype).requires_grad_()
        value = fake_quantize(weight, fmt)
        assert torch.equal(value, dequantize(quantize(weight.float(), fmt)).to(dtype))
        upstream = torch.randn(weight.shape, dtype=dtype)
        value.backward(upstream)
        assert torch.equal(weight.grad, upstream)


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-9, -2e-8, 3e38])
def test_constant_and_extreme_groups_stay_finite(fmt: WeightFormat, value: float) -> None:
    weight = torch.full((4, 32), value)
    got = quantize(weight, fmt)
    dense = dequantize(got)
    assert bool(torch.isfinite(dense).all())
    assert bool((got.scale_OG > 0).all())
    if value == 0:
        assert not dense.any()
    elif value < 1:
        assert bool(((dense - weight).abs() <= weight.abs()).all())


def test_large_layers_in_chunks_get_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = ALL_FORMATS[1]
    whole: QuantizedWeight = quantize(weights(), fmt)
    monkeypatch.setattr("raydistill.quant.grid.CHUNK_ELEMENTS", {True: 1, False: 1})
    chunked = quantize(weights(), fmt)
    assert torch.equal(whole.scale_OG, chunked.scale_OG)
    assert torch.equal(whole.codes_OI, chunked.codes_OI)


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
def test_codes_are_computed_with_the_stored_scale(scale_dtype: str) -> None:
    fmt = WeightFormat(bits=4, group_size=16, symmetric=True, scale="absmax", scale_dtype=scale_dtype)
    got = quantize(weights(), fmt)
    assert got.scale_OG.dtype == getattr(torch, scale_dtype)
    scale = got.scale_OG.float().repeat_interleave(16, 1)
    assert torch.equal(got.codes_OI, (weights() / scale).clamp(-8, 7).round().to(torch.int8))


def test_a_group_size_that_does_not_divide_names_layer_inputs_and_neighbours() -> None:
    fmt = WeightFormat(bits=2, group_size=40, symmetric=True, scale="absmax")
    with pytest.raises(QuantError, match=r"group_size=40 .* 96 inputs of layer x\.q_proj; use 32 or 48, or 'channel'"):
        quantize(torch.zeros(2, 96), fmt, "x.q_proj")


@pytest.mark.parametrize("wrong", [{"bits": 5}, {"group_size": 0}, {"scale": "mse"}, {"scale_dtype": "int8"}])
def test_an_unknown_format_is_a_user_error(wrong: dict[str, object]) -> None:
    good = WeightFormat(bits=2, group_size=32, symmetric=False, scale="searched").to_dict()
    with pytest.raises(QuantError):
        format_from_dict({**good, **wrong})


def test_format_names() -> None:
    assert WeightFormat(bits=2, group_size=32, symmetric=False, scale="searched").name == "int2-g32-asym-searched"
    wide = WeightFormat(bits=BITS["int4"], group_size=None, symmetric=True, scale="absmax", scale_dtype="float32")
    assert wide.name == "int4-channel-sym-absmax-float32"


def test_ptq_grids_are_the_four_honest_candidates_and_apply_in_place(tiny) -> None:
    grids = ptq_grids(2, 16)
    assert [(g.symmetric, g.scale) for g in grids] == [
        (True, "absmax"), (True, "searched"), (False, "absmax"), (False, "searched"),
    ]  # fmt: skip
    model, original = tiny.model(), tiny.model()
    codes = apply_ptq(model, grids[3])
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(model.get_submodule(name).weight, fake_quantize(original.get_submodule(name).weight, grids[3]))
    assert len(codes) == 14
    assert torch.equal(model.get_input_embeddings().weight, original.get_input_embeddings().weight)
