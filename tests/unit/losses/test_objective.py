"""The objective against its formula in dense float64, its temperature, and which tokens get which term."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import raydistill.losses.logsumexp as logsumexp
from raydistill.losses.objective import Objective, reference_cross_entropy

N, V = 6, 8
IDS = torch.tensor([1, 0, 7, 3, 3, 5])
IS_REFERENCE = torch.tensor([True, False, True, True, False, False])


class TopK(NamedTuple):
    ids_NK: Tensor
    logprobs_NK: Tensor
    tail_logprob_N: Tensor


class Dense(NamedTuple):
    logprobs_NV: Tensor


def random_logits(seed: int) -> Tensor:
    return torch.randn(N, V, generator=torch.Generator().manual_seed(seed)).mul(2)


def teacher_top_k(logits: Tensor, k: int, temperature: float) -> TopK:
    logprobs, order = (logits.double() / temperature).log_softmax(-1).sort(-1, descending=True)
    return TopK(order[:, :k], logprobs[:, :k].float(), logprobs[:, k:].logsumexp(-1).float())


def by_hand(teacher: Tensor, student: Tensor, objective: Objective) -> Tensor:
    """Full-vocabulary loss in float64, without any function of the package."""
    t, b = objective.temperature, objective.beta
    p, q = (teacher.double() / t).softmax(-1), (student / t).softmax(-1)
    if b == 0:
        divergence = (p * (p / q).log()).sum(-1)
    elif b == 1:
        divergence = (q * (q / p).log()).sum(-1)
    else:
        m = b * p + (1 - b) * q
        divergence = b * (p * (p / m).log()).sum(-1) + (1 - b) * (q * (q / m).log()).sum(-1)
        divergence = divergence / (b * (1 - b)) if objective.scale == "continuous" else divergence
    ce = -student.softmax(-1)[torch.arange(N), IDS].log() * IS_REFERENCE
    return objective.distill_weight * t**2 * divergence + objective.ce_weight * ce


@pytest.mark.parametrize("chunk_elements", [2 * V, 2**25])
@pytest.mark.parametrize("is_dense", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("beta", "scale"), [(0.0, "raw"), (0.3, "raw"), (0.3, "continuous"), (1.0, "raw")])
def test_loss_and_gradient_equal_the_dense_float64_formula(
    monkeypatch: pytest.MonkeyPatch, beta: float, scale: str, temperature: float, is_dense: bool, chunk_elements: int
) -> None:
    monkeypatch.setattr(logsumexp, "CHUNK_ELEMENTS", chunk_elements)
    objective = Objective(
        beta=beta,
        scale=scale,  # type: ignore[arg-type]
        temperature=temperature,
        distill_weight=0.7,
        ce_weight=0.4,
    )
    teacher, student = random_logits(0), random_logits(1).requires_grad_()
    target = Dense((teacher / temperature).log_softmax(-1)) if is_dense else teacher_top_k(teacher, V, temperature)
    result = objective.token_losses(student, target, IDS, IS_REFERENCE)
    result.loss_N.sum().backward()
    dense = student.detach().double().requires_grad_()
    expected = by_hand(teacher, dense, objective)
    expected.sum().backward()
    assert student.grad is not None and dense.grad is not None
    assert torch.allclose(result.loss_N.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(student.grad.double(), dense.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_forward_kl_gradient_is_temperature_times_the_difference_of_probabilities(temperature: float) -> None:
    teacher, student = random_logits(0), random_logits(1).requires_grad_()
    objective = Objective(temperature=temperature)
    target = teacher_top_k(teacher, V, temperature)
    objective.token_losses(student, target, IDS, IS_REFERENCE).loss_N.sum().backward()
    expected = temperature * ((student.detach() / temperature).softmax(-1) - (teacher / temperature).softmax(-1))
    assert student.grad is not None and torch.allclose(student.grad, expected, atol=2e-6)


def test_gradient_keeps_its_size_at_high_temperature() -> None:
    teacher, student = random_logits(0), random_logits(1)
    norms = []
    for temperature in (50.0, 100.0):
        logits = student.clone().requires_grad_()
        target = Dense((teacher / temperature).log_softmax(-1))
        objective = Objective(temperature=temperature)
        objective.token_losses(logits, target, IDS, IS_REFERENCE).loss_N.sum().backward()
        assert logits.grad is not None
        norms.append(logits.grad.norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


def test_terms_are_reported_unweighted_and_detached() -> None:
    objective = Objective(distill_weight=2.0, ce_weight=3.0)
    result = objective.token_losses(
        random_logits(1).requires_grad_(), teacher_top_k(random_logits(0), 3, 1.0), IDS, IS_REFERENCE
    )
    assert result.divergence_N is not None
    assert torch.allclose(result.loss_N, 2 * result.divergence_N + 3 * result.cross_entropy_N)
    assert not result.divergence_N.requires_grad and not result.cross_entropy_N.requires_grad
    assert {result.loss_N.dtype, result.divergence_N.dtype, result.cross_entropy_N.dtype} == {torch.float32}


def test_cross_entropy_reaches_reference_tokens_only() -> None:
    student = random_logits(1)
    student[1] = float("nan")  # not a reference token
    student.requires_grad_()
    value = reference_cross_entropy(student, IDS, IS_REFERENCE)
    value.sum().backward()
    expected = -student.detach().double().log_softmax(-1)[torch.arange(N), IDS]
    assert torch.allclose(value[IS_REFERENCE].double(), expected[IS_REFERENCE], atol=1e-6)
    assert value[~IS_REFERENCE].abs().sum() == 0
    assert student.grad is not None and torch.equal(student.grad[~IS_REFERENCE], torch.zeros(3, V))


def test_cross_entropy_without_reference_tokens_still_runs_backward() -> None:
    student = random_logits(1).requires_grad_()
    none = torch.zeros(N, dtype=torch.bool)
    Objective(distill_weight=0.0, ce_weight=1.0).token_losses(student, None, IDS, none).loss_N.sum().backward()
    assert student.grad is not None and student.grad.abs().sum() == 0


@pytest.mark.parametrize("is_dense", [True, False])
def test_a_micro_batch_without_tokens_still_runs_backward(is_dense: bool) -> None:
    student = torch.zeros(0, V, requires_grad=True)
    empty = torch.zeros(0, dtype=torch.int64)
    sparse = TopK(torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3), torch.zeros(0))
    target = Dense(torch.zeros(0, V)) if is_dense else sparse
    result = Objective(ce_weight=1.0).token_losses(student, target, empty, empty.bool())
    result.loss_N.sum().backward()
    assert result.loss_N.shape == (0,) and student.grad is not None


def test_a_term_of_weight_zero_is_reported_but_never_multiplied_into_the_loss() -> None:
    student = random_logits(1).requires_grad_()
    target = teacher_top_k(random_logits(0), 3, 1.0)
    infinite = target._replace(tail_logprob_N=torch.full((N,), -float("inf")))
    objective = Objective(beta=1.0, distill_weight=0.0, ce_weight=1.0)
    result = objective.token_losses(student, infinite, IDS, IS_REFERENCE)
    result.loss_N.sum().backward()
    assert result.divergence_N is not None and result.divergence_N.isposinf().all()
    assert result.loss_N.isfinite().all() and student.grad is not None and student.grad.isfinite().all()


def test_a_missing_teacher_is_refused_unless_its_weight_is_zero() -> None:
    with pytest.raises(ValueError, match="needs a teacher target"):
        Objective().token_losses(random_logits(1), None, IDS, IS_REFERENCE)
    only_ce = Objective(distill_weight=0.0, ce_weight=1.0).token_losses(random_logits(1), None, IDS, IS_REFERENCE)
    assert only_ce.divergence_N is None


@pytest.mark.parametrize(
    "fields",
    [
        {"beta": 1e-4},
        {"beta": 1 - 1e-4},
        {"beta": -0.1},
        {"beta": float("nan")},
        {"temperature": 0.0},
        {"scale": "log"},
        {"treatment": "top"},
        {"distill_weight": -1.0},
        {"distill_weight": 0.0},
    ],
)
def test_settings_out_of_range_are_refused_by_name(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        Objective(**fields)  # type: ignore[arg-type]


def test_a_sparse_target_keeps_no_float32_copy_of_all_logits_for_backward() -> None:
    student = random_logits(1).bfloat16().requires_grad_()
    target = teacher_top_k(random_logits(0), 2, 1.0)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        Objective(beta=0.5, ce_weight=1.0).token_losses(student, target, IDS, IS_REFERENCE)
    assert saved
    assert not [t for t in saved if t.dtype == torch.float32 and t.numel() >= N * V]
