"""Divergences against sums written out by hand in float64."""

import math

import pytest
import torch
from torch import Tensor

from raydistill.losses.divergence import generalized_jsd, kl

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


def random_logprobs(seed: int, spread: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 9, generator=generator).mul(spread).log_softmax(-1)


def kl_by_hand(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def jsd_by_hand(p: list[float], q: list[float], beta: float) -> float:
    """TRL's GKD: beta kl_div(mixture, teacher) + (1-beta) kl_div(mixture, student), kl_div(a, b) = KL(b || a)."""
    if beta == 0:
        return kl_by_hand(p, q)
    if beta == 1:
        return kl_by_hand(q, p)
    mixture = [(1 - beta) * b + beta * a for a, b in zip(p, q, strict=True)]
    return beta * kl_by_hand(p, mixture) + (1 - beta) * kl_by_hand(q, mixture)


def test_forward_and_reverse_kl_of_a_coin_by_hand() -> None:
    teacher, student = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log()
    forward = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    reverse = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert generalized_jsd(teacher, student, 0.0).item() == pytest.approx(forward, rel=1e-6)
    assert generalized_jsd(teacher, student, 1.0).item() == pytest.approx(reverse, rel=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_raw_scale_equals_trl_at_temperature_one(beta: float) -> None:
    teacher, student = random_logprobs(0), random_logprobs(1)
    expected = [
        jsd_by_hand(p, q, beta)
        for p, q in zip(teacher.double().exp().tolist(), student.double().exp().tolist(), strict=True)
    ]
    assert generalized_jsd(teacher, student, beta).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("beta", "end"), [(1e-3, 0.0), (1 - 1e-3, 1.0)])
def test_continuous_scale_tends_to_both_kls(beta: float, end: float) -> None:
    # The two differ by far less than 1 / beta, as the limit asks.
    teacher, student = random_logprobs(0, spread=0.5), random_logprobs(1, spread=0.5)
    limit = generalized_jsd(teacher, student, end)
    near = (generalized_jsd(teacher, student, beta, "continuous") - limit).abs().max()
    ten_times_farther = 10 * beta if end == 0 else 1 - 10 * (1 - beta)
    far = (generalized_jsd(teacher, student, ten_times_farther, "continuous") - limit).abs().max()
    assert near < 0.005 * limit.max()
    assert near < 0.2 * far


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_both_scales_agree_exactly_at_the_ends(beta: float) -> None:
    teacher, student = random_logprobs(0), random_logprobs(1)
    assert torch.equal(
        generalized_jsd(teacher, student, beta, "raw"), generalized_jsd(teacher, student, beta, "continuous")
    )


@pytest.mark.parametrize("beta", BETAS)
def test_divergence_is_zero_when_student_equals_teacher(beta: float) -> None:
    teacher = random_logprobs(0)
    assert generalized_jsd(teacher, teacher, beta).abs().max() < 1e-6


@pytest.mark.parametrize("scale", ["raw", "continuous"])
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_classes_without_probability_add_nothing_and_give_no_nan(beta: float, scale: str) -> None:
    p = [[0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]
    q = [[0.25, 0.0, 0.75, 0.0], [0.0, 0.5, 0.5, 0.0]]
    teacher = torch.tensor(p).log().requires_grad_()
    student = torch.tensor(q).log().requires_grad_()
    value = generalized_jsd(teacher, student, beta, scale)  # type: ignore[arg-type]
    value.sum().backward()
    divisor = beta * (1 - beta) if scale == "continuous" else 1.0
    expected = [jsd_by_hand(a, b, beta) / divisor for a, b in zip(p, q, strict=True)]
    assert value.tolist() == pytest.approx(expected, rel=1e-5)
    assert teacher.grad is not None and teacher.grad.isfinite().all()
    assert student.grad is not None and student.grad.isfinite().all()


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_a_class_empty_on_both_sides_is_ignored_at_the_ends(beta: float) -> None:
    logits = torch.tensor([[1.0, 0.0, -math.inf]], requires_grad=True)
    teacher = torch.tensor([[0.5, 0.5, 0.0]]).log()
    value = generalized_jsd(teacher, logits.log_softmax(-1), beta)
    value.sum().backward()
    q = torch.tensor([1.0, 0.0]).double().softmax(0).tolist()
    assert value.item() == pytest.approx(jsd_by_hand([0.5, 0.5], q, beta), rel=1e-5)
    assert logits.grad is not None and logits.grad.isfinite().all() and logits.grad[0, 2] == 0


def test_forward_kl_ignores_what_the_teacher_excludes_and_keeps_a_finite_gradient() -> None:
    logits = torch.tensor([[0.3, -0.2, 0.5]], requires_grad=True)
    value = generalized_jsd(torch.tensor([[0.5, 0.5, 0.0]]).log(), logits.log_softmax(-1), 0.0)
    value.sum().backward()
    assert logits.grad is not None
    assert torch.allclose(logits.grad, logits.detach().softmax(-1) - torch.tensor([[0.5, 0.5, 0.0]]), atol=1e-6)


def test_kl_is_infinite_only_where_it_truly_is() -> None:
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]]).log()
    assert kl(p, q).item() == math.inf
    assert kl(q, p).item() == pytest.approx(math.log(2.0))


@pytest.mark.parametrize("beta", BETAS)
def test_low_precision_input_is_computed_in_float32(beta: float) -> None:
    teacher, student = random_logprobs(0).bfloat16(), random_logprobs(1).bfloat16()
    value = generalized_jsd(teacher, student, beta)
    assert value.dtype == torch.float32
    assert torch.equal(value, generalized_jsd(teacher.float(), student.float(), beta))
