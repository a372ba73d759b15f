"""Treatments of sparse and dense teacher targets against full-vocabulary sums in float64."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from raydistill.losses.divergence import generalized_jsd
from raydistill.losses.targets import (
    TREATMENT_NAMES,
    TREATMENTS,
    complement_logprob,
    dense_classes,
    renormalised_classes,
    tail_classes,
    truncated_classes,
)

V = 12
BETAS = [0.0, 0.3, 0.5, 1.0]


class TopK(NamedTuple):
    ids_NK: Tensor
    logprobs_NK: Tensor
    tail_logprob_N: Tensor


def random_logits(seed: int, num_tokens: int = 7) -> Tensor:
    return torch.randn(num_tokens, V, generator=torch.Generator().manual_seed(seed)).mul(2)


def top_k(teacher_logits: Tensor, k: int) -> TopK:
    logprobs, order = teacher_logits.double().log_softmax(-1).sort(-1, descending=True)
    return TopK(order[:, :k], logprobs[:, :k].float(), logprobs[:, k:].logsumexp(-1).float())


def full_divergence(teacher_logits: Tensor, student_logits: Tensor, beta: float) -> Tensor:
    """Dense float64 definition, without any function of the package."""
    p, q = teacher_logits.double().softmax(-1), student_logits.double().softmax(-1)
    if beta in (0.0, 1.0):
        a, b = (p, q) if beta == 0 else (q, p)
        return (a * (a / b).log()).sum(-1)
    m = beta * p + (1 - beta) * q
    return beta * (p * (p / m).log()).sum(-1) + (1 - beta) * (q * (q / m).log()).sum(-1)


def test_the_registry_has_exactly_the_named_treatments() -> None:
    assert tuple(TREATMENTS) == TREATMENT_NAMES


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("k", [1, 3, V - 1])
def test_tail_never_exceeds_the_full_divergence(beta: float, k: int) -> None:
    teacher, student = random_logits(0, 200), random_logits(1, 200)
    value = generalized_jsd(*tail_classes(student, top_k(teacher, k)), beta)
    assert (value.double() <= full_divergence(teacher, student, beta) + 1e-6).all()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("tail_residue", [-math.inf, -17.0])
def test_tail_equals_the_full_divergence_at_k_equal_v_with_its_gradient(beta: float, tail_residue: float) -> None:
    teacher, student = random_logits(0), random_logits(1).requires_grad_()
    target = top_k(teacher, V)._replace(tail_logprob_N=torch.full((7,), tail_residue))
    value = generalized_jsd(*tail_classes(student, target), beta)
    value.sum().backward()
    dense = student.detach().double().requires_grad_()
    expected = full_divergence(teacher, dense, beta)
    expected.sum().backward()
    assert student.grad is not None and dense.grad is not None
    assert torch.allclose(value.double(), expected, atol=2e-6)
    assert torch.allclose(student.grad.double(), dense.grad, atol=2e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_tail_gradient_equals_the_dense_float64_bucket(beta: float) -> None:
    teacher, student = random_logits(0), random_logits(1).requires_grad_()
    target = top_k(teacher, 3)
    generalized_jsd(*tail_classes(student, target, 2.0), beta).sum().backward()

    dense = student.detach().double().requires_grad_()
    probs = (dense / 2.0).softmax(-1)
    p_selected = target.logprobs_NK.double().exp()
    q_selected = probs.gather(1, target.ids_NK)
    p = torch.cat([p_selected, target.tail_logprob_N.double().exp()[:, None]], 1)
    q = torch.cat([q_selected, 1 - q_selected.sum(1, keepdim=True)], 1)
    full_divergence(p.log(), q.log(), beta).sum().backward()
    assert student.grad is not None and dense.grad is not None
    assert torch.allclose(student.grad.double(), dense.grad, atol=2e-6)


@pytest.mark.parametrize("treatment", TREATMENT_NAMES)
@pytest.mark.parametrize("beta", BETAS)
def test_every_treatment_is_zero_when_student_equals_teacher(treatment: str, beta: float) -> None:
    logits = random_logits(0)
    value = generalized_jsd(*TREATMENTS[treatment](logits, top_k(logits, 4), 1.0), beta)
    assert value.abs().max() < 2e-6


@pytest.mark.parametrize("beta", BETAS)
def test_student_tokens_without_probability_give_no_nan(beta: float) -> None:
    teacher = random_logits(0)
    teacher[:, 5:] = -math.inf
    student = random_logits(1)
    student[:, 5:] = -math.inf
    student.requires_grad_()
    target = top_k(teacher, 5)
    value = generalized_jsd(*tail_classes(student, target), beta)
    value.sum().backward()
    assert torch.isneginf(target.tail_logprob_N).all()
    assert torch.allclose(value.double(), full_divergence(teacher[:, :5], student.detach()[:, :5], beta), atol=2e-6)
    assert student.grad is not None and student.grad.isfinite().all()


def test_an_empty_teacher_tail_makes_only_the_reverse_kl_infinite() -> None:
    target = TopK(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]).log(), torch.tensor([-math.inf]))
    student = torch.zeros(1, V, requires_grad=True)
    assert generalized_jsd(*tail_classes(student, target), 1.0).item() == math.inf
    inside = (
        generalized_jsd(*tail_classes(student, target), 0.5).sum()
        + generalized_jsd(*tail_classes(student, target), 0.0).sum()
    )
    inside.backward()
    assert inside.isfinite() and student.grad is not None and student.grad.isfinite().all()


def test_truncated_kl_goes_negative_where_the_tail_bucket_does_not() -> None:
    target = TopK(torch.tensor([[0, 1]]), torch.tensor([[0.4, 0.2]]).log(), torch.tensor([0.4]).log())
    student = torch.tensor([[0.6, 0.3, 0.05, 0.05]]).log()
    truncated = generalized_jsd(*truncated_classes(student, target), 0.0)
    assert truncated.item() == pytest.approx(0.6 * math.log(0.4 / 0.6), rel=1e-5)  # both ratios are 2/3
    assert truncated.item() < -0.2
    assert generalized_jsd(*tail_classes(student, target), 0.0).item() > 0


def test_truncated_reverse_kl_falls_when_mass_leaves_the_candidates_and_the_tail_bucket_rises() -> None:
    target = TopK(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.4]]).log(), torch.tensor([0.1]).log())
    fair, fled = torch.tensor([[0.5, 0.4, 0.1]]).log(), torch.tensor([[0.05, 0.04, 0.91]]).log()
    assert generalized_jsd(*truncated_classes(fled, target), 1.0) < generalized_jsd(
        *truncated_classes(fair, target), 1.0
    )
    assert generalized_jsd(*tail_classes(fled, target), 1.0) > generalized_jsd(*tail_classes(fair, target), 1.0) + 1


def test_renormalised_does_not_see_mass_outside_the_candidates() -> None:
    target = top_k(random_logits(0), 3)
    student = random_logits(1)
    raised = torch.where(torch.ones(7, V, dtype=torch.bool).scatter(1, target.ids_NK, False), student + 5, student)
    before = generalized_jsd(*renormalised_classes(student, target), 0.0)
    assert torch.allclose(before, generalized_jsd(*renormalised_classes(raised, target), 0.0), atol=1e-6)
    assert not torch.allclose(before, generalized_jsd(*tail_classes(raised, target), 0.0), atol=0.1)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("teacher_pad", "student_pad"), [(0, 0), (3, 0), (0, 3), (2, 4)])
def test_dense_padding_of_either_vocabulary_changes_nothing(beta: float, teacher_pad: int, student_pad: int) -> None:
    teacher, student = random_logits(0), random_logits(1)
    # Where both are padded, the ids both have include padding: then that padding is part of the comparison.
    both = torch.full((7, min(teacher_pad, student_pad)), -30.0)
    teacher_padded = torch.cat([teacher, both, torch.full((7, teacher_pad - both.shape[1]), 0.7)], 1)
    student_padded = torch.cat([student, both, torch.full((7, student_pad - both.shape[1]), -0.3)], 1).requires_grad_()
    if teacher_pad < student_pad:
        teacher_padded = teacher_padded[:, : V + teacher_pad]
    value = generalized_jsd(*dense_classes(student_padded, teacher_padded.log_softmax(-1)), beta)
    value.sum().backward()
    assert torch.allclose(value.double(), full_divergence(teacher, student, beta), atol=2e-6)
    assert student_padded.grad is not None
    assert student_padded.grad[:, V + teacher_pad :].abs().sum() == 0


def test_complement_logprob_by_hand_and_at_its_resolution() -> None:
    logprobs = torch.tensor([[0.6, 0.3], [0.7, 0.3], [0.8, 0.3]]).log()
    value = complement_logprob(logprobs)
    assert value[0].item() == pytest.approx(math.log(0.1), rel=1e-5)
    assert value[2].item() == pytest.approx(-24 * math.log(2.0))
    assert value.isfinite().all()
