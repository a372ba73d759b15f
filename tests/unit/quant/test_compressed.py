"""The same student in three layouts: what other tools read has the run's codes and computes the run's function."""

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from raydistill.errors import QuantError
from raydistill.quant.compressed import compressed_tensors, quantization_config, take_codes
from raydistill.quant.export import export_live, load_exported, packed_bytes, read_manifest
from raydistill.quant.formats import ENGINE_GROUPS, WeightFormat, check_layout, default_layout
from raydistill.quant.grid import dequantize, quantize
from raydistill.quant.hashing import hash_codes
from raydistill.quant.layouts import write_layout
from raydistill.quant.student import adapter_state, base_weight, load_adapter_state, student_form


def int4(group_size: int | None = 32, symmetric: bool = True, scale_dtype: str = "float16") -> WeightFormat:
    return WeightFormat(bits=4, group_size=group_size, symmetric=symmetric, scale="absmax", scale_dtype=scale_dtype)  # type: ignore[arg-type]


def packed_export(tiny, tmp_path: Path, mode: str, fmt: WeightFormat | None, **kwargs):
    """(live student, its packed folder)."""
    tiny.model(**kwargs).save_pretrained(tmp_path / "base")
    student = tiny.student(mode, fmt, **kwargs)
    export_live(tmp_path / "packed", student, tmp_path / "base", {"version": 3})
    return student, tmp_path / "packed"


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 128, None])
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
def test_the_library_unpacks_exactly_our_codes_and_weights(group_size, symmetric, scale_dtype) -> None:
    fmt = int4(group_size, symmetric, scale_dtype)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 256, generator=generator)  # 20 rows: zero points do not fill their last integer
    codes = {"layer": quantize(weight, fmt)}
    tensors = compressed_tensors(codes)
    local = {key.removeprefix("layer."): value for key, value in tensors.items()}
    assert local["weight_packed"].dtype == torch.int32 and local["weight_packed"].shape == (20, 32)
    assert local["weight_scale"].dtype == getattr(torch, scale_dtype)
    assert hash_codes(take_codes(dict(tensors), {"layer": [20, 256]}, fmt)) == hash_codes(codes)

    config = QuantizationConfig.model_validate(quantization_config(fmt, ["lm_head"]))
    in_float32 = local | {"weight_scale": local["weight_scale"].float()}
    theirs = PackedQuantizationCompressor.decompress(in_float32, config.config_groups["group_0"])
    assert torch.equal(theirs["weight"], dequantize(codes["layer"]))


@pytest.mark.parametrize(("family", "symmetric"), [("qwen3", True), ("qwen3", False), ("llama", False)])
def test_transformers_alone_computes_what_the_live_student_computed(tiny, tmp_path, family, symmetric) -> None:
    student, packed = packed_export(tiny, tmp_path, "merged", int4(symmetric=symmetric), family=family)
    manifest = write_layout(packed, tmp_path / "out", "compressed-tensors", extra={"run": "a"})
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert torch.equal(tiny.logits(alone), tiny.logits(student))
    assert torch.equal(tiny.logits(load_exported(tmp_path / "out")), tiny.logits(student))
    assert manifest == read_manifest(tmp_path / "out")
    assert manifest["codes_hash"] == read_manifest(packed)["codes_hash"]
    assert manifest["extra"] == {"version": 3, "run": "a"}
    assert (tmp_path / "out" / "generation_config.json").is_file()


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("layout", ["compressed-tensors", "dequantized"])
def test_a_bfloat16_student_comes_back_bit_for_bit(tiny, tmp_path, layout, scale_dtype) -> None:
    fmt = int4(None, False, scale_dtype)
    student, packed = packed_export(tiny, tmp_path, "merged", fmt, dtype=torch.bfloat16)
    write_layout(packed, tmp_path / "out", layout)
    assert torch.equal(tiny.logits(load_exported(tmp_path / "out")), tiny.logits(student))
    if (
        layout == "dequantized" or scale_dtype == "bfloat16"
    ):  # float16 scales are rounded where they are used in bfloat16
        alone = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
        assert torch.equal(tiny.logits(alone), tiny.logits(student))


@pytest.mark.parametrize("fmt", ["int2", None])
def test_dequantized_weights_are_plain(tiny, tmp_path, fmt) -> None:
    student, packed = packed_export(tiny, tmp_path, "merged", getattr(tiny, fmt) if fmt else None)
    write_layout(packed, tmp_path / "out", "dequantized")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert torch.equal(tiny.logits(alone), tiny.logits(student))
    assert torch.equal(tiny.logits(load_exported(tmp_path / "out")), tiny.logits(student))


def test_a_packed_copy_is_the_same_export(tiny, tmp_path) -> None:
    student, packed = packed_export(tiny, tmp_path, "merged", tiny.int2)
    write_layout(packed, tmp_path / "out", "packed")
    assert torch.equal(tiny.logits(load_exported(tmp_path / "out")), tiny.logits(student))
    assert packed_bytes(tmp_path / "out") == packed_bytes(packed)


@pytest.mark.parametrize("layout", ["packed", "compressed-tensors", "dequantized"])
def test_a_served_student_keeps_its_adapter_beside_the_weights(tiny, tmp_path, layout) -> None:
    student, packed = packed_export(tiny, tmp_path, "served", int4())
    write_layout(packed, tmp_path / "out", layout)
    assert torch.equal(tiny.logits(load_exported(tmp_path / "out")), tiny.logits(student))
    if layout == "packed":
        return
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert not torch.equal(tiny.logits(base), tiny.logits(student))
    assert torch.equal(tiny.logits(PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")), tiny.logits(student))


def test_a_served_adapter_merges_into_plain_weights_only(tiny, tmp_path) -> None:
    student, packed = packed_export(tiny, tmp_path, "served", tiny.int2)
    write_layout(packed, tmp_path / "out", "dequantized", merge_adapter=True)
    assert not (tmp_path / "out" / "adapter").exists()
    for model in (load_exported(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()):
        torch.testing.assert_close(tiny.logits(model), tiny.logits(student), rtol=1e-5, atol=1e-5)
    with pytest.raises(QuantError, match=r"--as dequantized, or train with adapter\.mode=merged"):
        write_layout(packed, tmp_path / "other", "packed", merge_adapter=True)
    assert not (tmp_path / "other").exists()


def test_merging_into_a_bfloat16_student_rounds_nothing_of_the_adapter_away(tiny, tmp_path) -> None:
    student, packed = packed_export(tiny, tmp_path, "served", int4(), dtype=torch.bfloat16)
    state = {key: 0.01 * value for key, value in adapter_state(student).items()}  # as small as training leaves it
    load_adapter_state(student, state)
    export_live(packed, student, tmp_path / "base", {})
    manifest = write_layout(packed, tmp_path / "out", "dequantized", merge_adapter=True)
    assert (manifest["dtype"], manifest["lora"]) == ("float32", None)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    beside, alone = load_exported(packed), AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    for name in student_form(student).targets:
        base = base_weight(beside, name)
        assert base.dtype == torch.bfloat16, "the adapter was trained over weights rounded to it"
        delta = tiny.lora.scaling * state[f"{name}.lora_B"] @ state[f"{name}.lora_A"]
        merged = alone.get_submodule(name).weight
        assert merged.dtype == torch.float32
        torch.testing.assert_close(merged - base.float(), delta, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("layout", ["compressed-tensors", "dequantized"])
def test_damage_is_noticed(tiny, tmp_path, layout) -> None:
    _, packed = packed_export(tiny, tmp_path, "merged", int4())
    write_layout(packed, tmp_path / "out", layout)
    weights = tmp_path / "out" / "model.safetensors"
    good = load_file(weights)
    for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        key = name if name in good else f"{name}_packed"
        changed = {k: value.clone() for k, value in good.items()}
        changed[key].view(-1).view(torch.uint8)[0] ^= 1
        save_file(changed, weights, metadata={"format": "pt"})
        with pytest.raises(QuantError, match="export it again"):
            load_exported(tmp_path / "out")
    weights.unlink()
    with pytest.raises(QuantError, match="missing or damaged"):
        load_exported(tmp_path / "out")


def test_the_default_layout_is_what_serves_the_format() -> None:
    assert {default_layout(int4(size)) for size in ENGINE_GROUPS} == {"compressed-tensors"}
    assert default_layout(int4(16)) == "packed"
    int3 = WeightFormat(bits=3, group_size=32, symmetric=True, scale="absmax")
    assert default_layout(int3) == "packed"
    assert default_layout(None) == "dequantized"
    for fmt in (int3, int4(16), None):
        with pytest.raises(QuantError, match="--as dequantized"):
            check_layout("compressed-tensors", fmt, False, False)
    with pytest.raises(QuantError, match="leave the switch out"):
        check_layout("dequantized", int3, False, True)


def test_layers_that_stay_as_they_are_are_named(tiny, tmp_path) -> None:
    _, packed = packed_export(tiny, tmp_path, "merged", int4(), family="llama")
    write_layout(packed, tmp_path / "out", "compressed-tensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    assert config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] == 32
    assert config["dtype"] == "float32"
