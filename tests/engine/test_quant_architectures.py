"""Each tested architecture becomes a student, is rebuilt from A and B, is exported and comes back, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import ARCHITECTURES, PADDED_VOCAB_SIZE, VOCAB_SIZE, make_world, write_model
from transformers import AutoModelForCausalLM

from raydistill.errors import QuantError
from raydistill.quant.export import export_live, load_exported, read_manifest
from raydistill.quant.formats import WeightFormat, default_layout
from raydistill.quant.hashing import hash_codes
from raydistill.quant.layouts import write_layout
from raydistill.quant.student import (
    LoraSettings,
    adapter_state,
    load_adapter_state,
    prepare_student,
    quantizable_modules,
    student_codes,
)

KINDS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
LORA = LoraSettings(rank=4, alpha=8, targets=tuple(sorted(KINDS)))
FORMATS = {
    "int4": WeightFormat(bits=4, group_size=32, symmetric=False, scale="searched"),
    "int2": WeightFormat(bits=2, group_size=32, symmetric=False, scale="searched"),
}
IDS = torch.randint(0, VOCAB_SIZE, (2, 50), generator=torch.Generator().manual_seed(1))  # longer than Gemma's window


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    tokenizer = make_world(folder / "world").tokenizer
    return {name: write_model(name, tokenizer, folder / name) for name in ARCHITECTURES}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def make_student(tiny: Any, folder: Path, mode: str, fmt: WeightFormat | None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    student = prepare_student(model, fmt, mode, None if mode == "none" else LORA)  # type: ignore[arg-type]
    tiny.randomize_adapter(student)
    return student


def test_the_models_are_what_their_names_say(folders: dict[str, Path]) -> None:
    models = {name: AutoModelForCausalLM.from_pretrained(folder) for name, folder in folders.items()}
    tensors = {name: load_file(folder / "model.safetensors") for name, folder in folders.items()}
    assert {name for name, found in tensors.items() if "lm_head.weight" in found} == {"llama"}
    config = models["llama"].config
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.vocab_size == PADDED_VOCAB_SIZE > VOCAB_SIZE >= int(IDS.max()) + 1
    assert set(models["gemma3"].config.layer_types) == {"sliding_attention", "full_attention"}
    assert models["gemma3"].config.sliding_window < IDS.shape[1]
    assert "model.layers.0.post_feedforward_layernorm.weight" in tensors["gemma3"]
    for name in ("qwen3", "gemma3"):
        assert "model.layers.0.self_attn.q_norm.weight" in tensors[name]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_decoders_linear_layers_are_quantized_and_the_head_is_not(folders: dict[str, Path], name: str) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folders[name])
    layers = quantizable_modules(model)
    assert {layer.rpartition(".")[2] for layer in layers} == KINDS
    assert len(layers) == len(KINDS) * model.config.num_hidden_layers


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("mode", ["merged", "none"])
def test_weights_rebuilt_from_what_travels_are_those_of_the_trainer(
    tiny: Any, folders: dict[str, Path], name: str, mode: str
) -> None:
    """What a rollout worker writes into its engine, in a plain model of the architecture."""
    student = make_student(tiny, folders[name], mode, FORMATS["int2"])
    plain: Any = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32).eval()
    base = {layer: module.weight for layer, module in quantizable_modules(plain).items()}
    rebuilt = tiny.rebuilt_weights(base, adapter_state(student), FORMATS["int2"], LORA.scaling, mode)  # type: ignore[arg-type]
    keys = plain.load_state_dict(rebuilt, strict=False)
    assert keys.unexpected_keys == []
    reference = logits(student)
    if mode == "merged":
        assert torch.equal(logits(plain), reference)
    else:  # every other parameter was trained too
        torch.testing.assert_close(logits(plain), reference, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_merged_and_served_are_the_same_function_without_quantization(
    tiny: Any, folders: dict[str, Path], name: str
) -> None:
    merged, served = (make_student(tiny, folders[name], mode, None) for mode in ("merged", "served"))
    load_adapter_state(served, adapter_state(merged))
    torch.testing.assert_close(logits(served), logits(merged), rtol=1e-4, atol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32).eval()
    assert float((logits(base) - logits(merged)).abs().max()) > 0.1, "the adapter does nothing"


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("mode", ["merged", "served", "none"])
def test_every_layout_of_an_export_computes_what_was_trained(
    tiny: Any, folders: dict[str, Path], tmp_path: Path, name: str, fmt: str, mode: str
) -> None:
    student = make_student(tiny, folders[name], mode, FORMATS[fmt])
    packed = tmp_path / "packed"
    assert export_live(packed, student, folders[name], {}) == hash_codes(student_codes(student))
    expected = logits(student)
    assert torch.equal(logits(load_exported(packed)), expected)
    layouts = {default_layout(FORMATS[fmt]), "dequantized"} - {"packed"}
    for layout in layouts:
        manifest = write_layout(packed, tmp_path / layout, layout)  # type: ignore[arg-type]
        assert manifest["codes_hash"] == read_manifest(packed)["codes_hash"]
        assert torch.equal(logits(load_exported(tmp_path / layout)), expected)
        if mode != "served":  # as anyone loads it
            alone = AutoModelForCausalLM.from_pretrained(tmp_path / layout, dtype="auto").eval()
            assert torch.equal(logits(alone), expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_group_size_that_does_not_divide_is_refused(folders: dict[str, Path], name: str) -> None:
    fmt = WeightFormat(bits=4, group_size=96, symmetric=False, scale="absmax")
    with pytest.raises(QuantError, match=r"group_size=96 does not divide the 64 inputs of layer model\.layers\.0"):
        prepare_student(AutoModelForCausalLM.from_pretrained(folders[name]), fmt, "merged", LORA)
