"""One function on every side: the trainer's forward, the rebuilt codes and what travels."""

import copy

import pytest
import torch
from torch import nn

from raydistill.errors import QuantError
from raydistill.quant.grid import dequantize, quantize
from raydistill.quant.hashing import hash_codes
from raydistill.quant.student import (
    LoraSettings,
    adapter_state,
    load_adapter_state,
    prepare_student,
    quantizable_modules,
    rebuild_codes,
    student_codes,
)

MODES = ["merged", "served", "none"]
Q_PROJ = "model.layers.0.self_attn.q_proj"


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.weight.detach() for name, layer in quantizable_modules(model).items()}


def plain_forward_weight(student: nn.Module, name: str) -> torch.Tensor:
    """The matrix a layer multiplies with, read off its outputs for the unit vectors."""
    layer = student.get_submodule(name)
    with torch.no_grad():
        unit = torch.eye(layer.in_features)
        bias = getattr(layer, "bias", None)
        bias = layer.get_base_layer().bias if hasattr(layer, "get_base_layer") else bias
        return (layer(unit) - (0 if bias is None else bias)).t()


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma3"])
def test_the_decoders_linear_layers_are_quantizable_and_the_head_is_not(tiny, family: str) -> None:
    names = quantizable_modules(tiny.model(family))
    assert len(names) == 14
    assert all(name.startswith("model.layers.") for name in names)
    assert not any("lm_head" in name for name in quantizable_modules(tiny.model(family), skip=()))
    assert len(quantizable_modules(tiny.model(family), skip=("down_proj", "self_attn.k_proj"))) == 10


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma3"])
@pytest.mark.parametrize("mode", MODES)
def test_rebuilt_codes_equal_the_live_students(tiny, family: str, mode: str) -> None:
    student = tiny.student(mode, family=family)
    base = base_weights(tiny.model(family))
    adapter = {} if mode == "served" else adapter_state(student)
    rebuilt = rebuild_codes(base, adapter, tiny.int2, tiny.lora.scaling, mode)
    assert hash_codes(rebuilt) == hash_codes(student_codes(student))
    assert list(rebuilt) == list(student_codes(student))


@pytest.mark.parametrize("mode", ["merged", "none"])
def test_the_forward_multiplies_with_exactly_the_rebuilt_codes(tiny, mode: str) -> None:
    student = tiny.student(mode, family="llama")
    for name, quantized in student_codes(student).items():
        got = plain_forward_weight(student, name)
        bias = getattr(student.get_submodule(name), "bias", None)
        assert torch.allclose(got, dequantize(quantized), atol=0 if bias is None else 1e-6)
    merged = student.get_submodule(Q_PROJ)
    weight = merged.student_weight() if mode == "merged" else merged.weight
    expected = dequantize(student_codes(student)[Q_PROJ])
    assert torch.equal(weight, expected) or mode == "none"


def test_merged_is_quantize_of_w_plus_scaled_product(tiny) -> None:
    student = tiny.student("merged")
    state, weight = adapter_state(student), tiny.model().get_submodule(Q_PROJ).weight.detach()
    merged = weight + 2.0 * (state[f"{Q_PROJ}.lora_B"] @ state[f"{Q_PROJ}.lora_A"])
    expected = quantize(merged, tiny.int2)
    got = student_codes(student)[Q_PROJ]
    assert float((got.codes_OI == expected.codes_OI).float().mean()) > 0.99
    assert torch.allclose(student.get_submodule(Q_PROJ).student_weight(), dequantize(got), atol=0)


def test_served_is_q_of_w_plus_the_adapter_beside_it(tiny) -> None:
    student = tiny.student("served")
    state, layer = adapter_state(student), student.get_submodule(Q_PROJ)
    x = torch.randn(3, 32)
    frozen = dequantize(quantize(tiny.model().get_submodule(Q_PROJ).weight, tiny.int2))
    side = x @ state[f"{Q_PROJ}.lora_A"].t() @ state[f"{Q_PROJ}.lora_B"].t()
    assert torch.allclose(layer(x), x @ frozen.t() + 2.0 * side, atol=1e-5)
    assert torch.equal(layer.get_base_layer().weight, frozen)


def test_merged_gradients_are_those_of_the_dense_product(tiny) -> None:
    layer = tiny.student("merged").get_submodule(Q_PROJ)
    lora_A, lora_B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x, upstream = torch.randn(5, 32), torch.randn(5, 32)
    layer(x).backward(upstream)
    a, b = (parameter.detach().clone().requires_grad_() for parameter in (lora_A, lora_B))
    (x @ (layer.get_base_layer().weight + 2.0 * (b @ a)).t()).backward(upstream)
    assert torch.allclose(lora_A.grad, a.grad, atol=1e-5)
    assert torch.allclose(lora_B.grad, b.grad, atol=1e-5)
    assert layer.get_base_layer().weight.grad is None


@pytest.mark.parametrize("mode", MODES)
def test_what_is_trained(tiny, mode: str) -> None:
    student = tiny.student(mode, family="llama").train()
    student(tiny.ids()).logits.square().mean().backward()
    trained = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    state = adapter_state(student)
    assert all(value.dtype == torch.float32 for value in state.values())
    if mode == "none":
        assert trained == state.keys() == {name for name, _ in tiny.model("llama").named_parameters()}
    else:
        assert all("lora_" in name for name in trained)
        assert len(trained) == len(state) == 2 * 2 * len(tiny.lora.targets)
        assert f"{Q_PROJ}.lora_A" in state


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fmt", ["int2", None])
def test_a_loaded_adapter_gives_the_same_logits_and_is_seen_at_once(tiny, mode: str, fmt: str | None) -> None:
    chosen = tiny.int2 if fmt else None
    source, target = tiny.student(mode, chosen), tiny.student(mode, chosen)
    tiny.randomize_adapter(source, seed=11)
    before = tiny.logits(target)
    load_adapter_state(target, adapter_state(source))
    assert torch.equal(tiny.logits(target), tiny.logits(source))
    assert not torch.equal(tiny.logits(target), before)
    assert bool(student_codes(target)) == (fmt is not None)


@pytest.mark.parametrize("mode", ["merged", "none"])
def test_a_write_that_leaves_no_trace_on_the_parameter_is_still_seen(tiny, mode: str) -> None:
    student = tiny.student(mode)
    before = tiny.logits(student)
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(1.5)  # does not touch the version counter
    assert not torch.equal(tiny.logits(student), before)
    assert hash_codes(student_codes(student)) == hash_codes(student_codes(copy.deepcopy(student)))


@pytest.mark.parametrize("mode", MODES)
def test_gradient_checkpointing_changes_nothing(tiny, mode: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        student = tiny.student(mode).train()
        if checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        student(tiny.ids(), use_cache=False).logits.square().mean().backward()
        gradients.append({name: p.grad for name, p in student.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize("mode", MODES)
def test_sampling_in_inference_mode_does_not_disturb_training(tiny, mode: str) -> None:
    student = tiny.student(mode)
    with torch.inference_mode():
        sampled = student(tiny.ids()).logits.clone()
    logits = student(tiny.ids()).logits
    assert torch.equal(logits.detach(), sampled)
    logits.mean().backward()


@pytest.mark.parametrize("mode", ["merged", "served"])
def test_a_bfloat16_student_keeps_a_float32_adapter_and_rebuilds_in_float32(tiny, mode: str) -> None:
    student = tiny.student(mode, dtype=torch.bfloat16)
    assert student.get_submodule(Q_PROJ).lora_A["default"].weight.dtype == torch.float32
    base = base_weights(tiny.model(dtype=torch.bfloat16))
    adapter = adapter_state(student) if mode == "merged" else {}
    codes = rebuild_codes(base, adapter, tiny.int2, tiny.lora.scaling, mode)
    assert hash_codes(codes) == hash_codes(student_codes(student))
    if mode == "merged":
        weight = student.get_submodule(Q_PROJ).student_weight()
        assert torch.equal(weight, dequantize(codes[Q_PROJ]).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        student(tiny.ids()).logits.float().mean().backward()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fmt", ["int4", None])
def test_rebuilt_dense_weights_in_a_plain_model_give_the_students_logits(tiny, mode: str, fmt: str | None) -> None:
    chosen = tiny.int4 if fmt else None
    student, plain = tiny.student(mode, chosen), tiny.model()
    adapter = adapter_state(student)
    if mode == "served":
        load_adapter_state(student, {key: value * 0 for key, value in adapter.items()})
    weights = tiny.rebuilt_weights(base_weights(plain), adapter, chosen, tiny.lora.scaling, mode)
    assert not plain.load_state_dict(weights, strict=False).unexpected_keys
    assert torch.equal(tiny.logits(plain), tiny.logits(student))


def test_a_disabled_adapter_leaves_the_quantized_base(tiny) -> None:
    student, plain = tiny.student("merged"), tiny.model()
    for name in quantizable_modules(plain):
        layer = student.get_submodule(name)
        if hasattr(layer, "enable_adapters"):
            layer.enable_adapters(False)
    plain.load_state_dict(tiny.rebuilt_weights(base_weights(plain), {}, tiny.int2, 1.0, "served"), strict=False)
    assert torch.equal(tiny.logits(student), tiny.logits(plain))


def test_bad_settings_say_what_to_do(tiny) -> None:
    def prepare(mode: str, skip: tuple[str, ...] = ("lm_head",), **changes: object) -> None:
        settings = {"rank": 4, "alpha": 8, "targets": ("q_proj",), **changes}
        prepare_student(tiny.model(), tiny.int2, mode, LoraSettings(**settings), skip)

    with pytest.raises(QuantError, match=r"'qproj' is no linear layer .* did you mean 'q_proj'\? .*down_proj.*up_proj"):
        prepare("served", targets=("qproj",))
    with pytest.raises(QuantError, match=r"dropout=0\.1 cannot be applied to a merged adapter"):
        prepare("merged", dropout=0.1)
    with pytest.raises(QuantError, match="'none' takes none"):
        prepare("none")
    with pytest.raises(QuantError, match=r"out of adapter\.targets or out of quant\.skip"):
        prepare("merged", skip=("lm_head", "q_proj"))
    with pytest.raises(QuantError, match="rank >= 1"):
        prepare("merged", rank=0)
    prepare("served", skip=("lm_head", "q_proj"), dropout=0.1)
    with pytest.raises(QuantError, match="already a student"):
        prepare_student(tiny.student("served"), None, "served", tiny.lora)


def test_adapters_that_do_not_fit_are_refused(tiny) -> None:
    student = tiny.student("merged")
    state, base = adapter_state(student), base_weights(tiny.model())
    with pytest.raises(QuantError, match="1 tensors are missing"):
        load_adapter_state(student, {key: value for key, value in state.items() if key != f"{Q_PROJ}.lora_A"})
    with pytest.raises(QuantError, match=r"use the adapter\.rank"):
        load_adapter_state(student, {key: value[:2] for key, value in state.items()})
    with pytest.raises(QuantError, match="pair"):
        rebuild_codes(base, {f"{Q_PROJ}.lora_A": state[f"{Q_PROJ}.lora_A"]}, tiny.int2, 1.0, "merged")
    with pytest.raises(QuantError, match="belongs to no quantized layer"):
        rebuild_codes({}, state, tiny.int2, 1.0, "merged")
    with pytest.raises(QuantError, match=r"model\.layers\.0.* holds NaN"):
        rebuild_codes(base, {key: value * float("nan") for key, value in state.items()}, tiny.int2, 1.0, "merged")
    with pytest.raises(QuantError, match="is missing; mode 'none'"):
        rebuild_codes(base, {}, tiny.int2, 1.0, "none")
    with pytest.raises(QuantError, match="not a prepared student"):
        adapter_state(tiny.model())
