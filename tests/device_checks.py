"""What must hold on any device, as functions of the device: tests/unit runs them on the CPU, tests/gpu on CUDA."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config

from raydistill.actors import teacher as teacher_module
from raydistill.actors.teacher import TeacherActor, TeacherRequest
from raydistill.config import AdapterSection, ObjectiveSection, QuantSection, StudentSection, TeacherSection
from raydistill.losses.objective import Objective
from raydistill.messages import Samples, TeacherTopK, TokenRows
from raydistill.models import StudentSpec, build_student, load_causal_lm, quantizable_weights
from raydistill.quant.formats import WeightFormat
from raydistill.quant.grid import dequantize, fake_quantize, quantize
from raydistill.quant.hashing import hash_codes, hash_tensors
from raydistill.quant.shards import LayerSplit, join_codes, shard_of
from raydistill.quant.student import adapter_state, load_adapter_state, rebuild_codes, student_codes
from raydistill.tensors import CompletionModel, SequenceBatch, score_rows

CODES = {
    "int2-g32-asym-searched": "e04cc87e14035f7c",
    "int3-g5-sym-absmax": "eec58d1fa8682cd1",
    "int4-channel-asym-searched-bfloat16": "378c06d5ceb937e5",
    "int4-g64-sym-searched": "3e8d77350fe2efea",
}
"""Fingerprints of the codes of one weight, made on a CPU: every device must arrive at the same."""
FORMATS = (
    WeightFormat(bits=2, group_size=32, symmetric=False, scale="searched"),
    WeightFormat(bits=3, group_size=5, symmetric=True, scale="absmax"),
    WeightFormat(bits=4, group_size=None, symmetric=False, scale="searched", scale_dtype="bfloat16"),
    WeightFormat(bits=4, group_size=64, symmetric=True, scale="searched"),
)
NAME = "model.layers.0.mlp.up_proj"
PROMPTS = TokenRows.from_rows([[3, 4, 5], [6], [7, 8, 9, 10]])
COMPLETIONS = TokenRows.from_rows([[20, 21, 1], list(range(22, 34)), [41]])


class Dense(NamedTuple):
    logprobs_NV: Tensor


class TopK(NamedTuple):
    ids_NK: Tensor
    logprobs_NK: Tensor
    tail_logprob_N: Tensor


def draw(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def model_folder(folder: Path) -> Path:
    """A tiny Qwen3 whose logits are not all alike."""
    torch.manual_seed(5)
    shape = {
        "vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(Qwen3Config(**shape, tie_word_embeddings=True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def student_spec(folder: Path) -> StudentSpec:
    return StudentSpec(
        student=StudentSection(model=str(folder), dtype="float32"),
        quant=QuantSection(format="int3"),
        adapter=AdapterSection(rank=4, alpha=8),
    )


def samples() -> Samples:
    return Samples(
        step=0,
        indices=(0, 1, 2),
        row_ids=("a", "b", "c"),
        prompts=PROMPTS,
        completions=COMPLETIONS,
        policy_versions=(0, 0, 0),
        finish_reasons=("stop",) * 3,
    )


def check_codes(device: str, fmt: WeightFormat) -> None:
    """Codes, their dense values and a rebuild from W, A and B are the same bits on every device; also by shards."""
    weight, lora_A, lora_B = draw(0, 48, 320).pow(3), draw(1, 6, 320), draw(2, 48, 6)
    adapter = {f"{NAME}.lora_A": lora_A.to(device), f"{NAME}.lora_B": lora_B.to(device)}
    codes = rebuild_codes({NAME: weight.to(device)}, adapter, fmt, 0.5, "merged")
    assert codes[NAME].codes_OI.device.type == device
    assert hash_codes(codes) == CODES[fmt.name]
    parts = []
    for rank in range(4):
        shard = shard_of((48, 320), LayerSplit(along="inputs", world_size=4), rank, fmt)
        mine = {NAME: shard.of_weight(weight).to(device)}
        part = rebuild_codes(mine, shard.of_adapter(NAME, adapter), fmt, 0.5, "merged")[NAME]
        parts.append((shard, part.to("cpu")))
    assert hash_codes({NAME: join_codes(parts)}) == CODES[fmt.name]
    leaf = weight.clone().to(device).requires_grad_()
    dense = fake_quantize(leaf, fmt)
    dense.sum().backward()
    assert leaf.grad is not None
    assert bool((leaf.grad == 1).all())
    assert torch.equal(dense.detach().cpu(), dequantize(quantize(weight, fmt)))


def check_losses(device: str, beta: float, is_dense: bool) -> None:
    """Loss and gradient of a divergence with cross-entropy, against the formula in float64."""
    teacher, logits = draw(3, 40, 97).mul(3), draw(4, 40, 97).mul(2)
    ids = torch.arange(40) % 97
    objective = Objective(beta=beta, distill_weight=1.0, ce_weight=0.5)
    logprobs, order = teacher.double().log_softmax(-1).sort(-1, descending=True)
    target: Dense | TopK = Dense(teacher.log_softmax(-1).to(device))
    if not is_dense:
        tail = logprobs[:, 97:].logsumexp(-1)
        target = TopK(order.to(device), logprobs.float().to(device), tail.float().to(device))
    mine = logits.clone().to(device).requires_grad_()
    loss_N = objective.token_losses(mine, target, ids.to(device), (ids < 20).to(device)).loss_N
    loss_N.sum().backward()
    exact = logits.double().requires_grad_()
    p, q = teacher.double().softmax(-1), exact.softmax(-1)
    m = beta * p + (1 - beta) * q
    terms = {
        0.0: (p * (p / q).log()).sum(-1),
        1.0: (q * (q / p).log()).sum(-1),
        0.5: (beta * p * (p / m).log() + (1 - beta) * q * (q / m).log()).sum(-1),
    }
    expected = terms[beta] - 0.5 * q[torch.arange(40), ids].log() * (ids < 20)
    expected.sum().backward()
    assert loss_N.device.type == device
    assert mine.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(loss_N.detach().cpu().double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine.grad.cpu().double(), exact.grad, rtol=1e-5, atol=1e-5)


def check_completion_model(device: str, folder: Path) -> None:
    """Logits at completion positions and log-probs of rows, against the whole model in float64 on the CPU."""
    section = TeacherSection(model=str(folder), dtype="float32")
    model = CompletionModel(load_causal_lm(section, "teacher.model", device))
    model.check_head("teacher.model", device)
    with torch.inference_mode():
        logits = model(SequenceBatch.of(PROMPTS, COMPLETIONS, device))
    assert logits.device.type == device
    expected = exact_logits(folder, list(zip(PROMPTS.rows(), COMPLETIONS.rows(), strict=True)))
    torch.testing.assert_close(logits.cpu().double(), expected, rtol=1e-4, atol=1e-4)
    rows = [row for row in COMPLETIONS.rows() if row.size > 1]
    exact = exact_logits(folder, [(row[:1], row[1:]) for row in rows]).log_softmax(-1)
    actual = torch.from_numpy(np.concatenate([row[1:] for row in rows])).long()
    scored = score_rows(model, TokenRows.from_rows(rows), device)
    np.testing.assert_allclose(scored, exact.gather(1, actual[:, None])[:, 0].numpy(), atol=1e-4)


def exact_logits(folder: Path, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> Tensor:
    """[N, V] float64 at the completion positions, one sequence at a time, without padding."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    parts = []
    for prompt, completion in pairs:
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt.tolist(), *completion.tolist()]])).logits[0]
        parts.append(logits[len(prompt) - 1 : -1])
    return torch.cat(parts)


def check_student(device: str, folder: Path) -> None:
    """A merged student on the device: its codes, what travels, and a step's gradients are those of the CPU."""
    spec = student_spec(folder)
    students = {place: build_student(spec, place).eval() for place in {"cpu", device}}
    start = adapter_state(students["cpu"])
    state = {key: value + 0.05 * draw(index, *value.shape) for index, (key, value) in enumerate(sorted(start.items()))}
    found: dict[str, tuple[str, str]] = {}
    gradients: dict[str, dict[str, Tensor]] = {}
    for place, student in students.items():
        load_adapter_state(student, state)
        found[place] = hash_tensors(adapter_state(student)), hash_codes(student_codes(student))
        logits = CompletionModel(student)(SequenceBatch.of_samples(samples(), place))
        logits.float().log_softmax(-1)[:, 3].sum().backward()
        named = student.named_parameters()
        gradients[place] = {name: p.grad.cpu() for name, p in named if p.grad is not None}
    rebuilt = rebuild_codes(
        {name: weight.to(device) for name, weight in quantizable_weights(spec).items()},
        state,
        spec.weight_format,  # type: ignore[arg-type]
        spec.scaling,
        "merged",
    )
    assert found[device] == found["cpu"] == (hash_tensors(state), hash_codes(rebuilt))
    assert gradients[device].keys() == gradients["cpu"].keys() != set()
    for name, gradient in gradients["cpu"].items():
        torch.testing.assert_close(gradients[device][name], gradient, rtol=1e-3, atol=1e-4)


def check_teacher(device: str, folder: Path, num_gpus: float, monkeypatch: pytest.MonkeyPatch) -> TeacherActor:
    """The teacher actor's top-K and tail against float64; returns the actor."""
    monkeypatch.setattr(teacher_module, "default_device", lambda: device)
    actor = TeacherActor("teacher-0")
    section = TeacherSection(model=str(folder), dtype="float32", num_gpus=num_gpus)
    actor.start(section)
    request = TeacherRequest.of(ObjectiveSection(top_k=8), 61)
    target = actor.score(samples(), request)[1].target
    assert isinstance(target, TeacherTopK)
    exact = exact_logits(folder, list(zip(PROMPTS.rows(), COMPLETIONS.rows(), strict=True))).log_softmax(-1)
    top = exact.topk(8, dim=-1)
    np.testing.assert_allclose(target.logprobs_NK, top.values.numpy(), atol=1e-4)
    tail = exact.scatter(-1, top.indices, float("-inf")).logsumexp(-1)
    np.testing.assert_allclose(target.tail_logprob_N, tail.numpy(), atol=1e-4)
    return actor
