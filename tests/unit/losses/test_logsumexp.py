"""Exact sums over the vocabulary, their gradients, and chunking."""

import math

import pytest
import torch

import raydistill.losses.logsumexp as logsumexp
from raydistill.losses.logsumexp import selected_and_rest, selected_logprobs

IDS = torch.tensor([[2, 0], [4, 1], [3, 2], [0, 4]])


def logits_like(seed: int = 0) -> torch.Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[1, 10, 2**25], ids=["row_by_row", "two_rows", "at_once"])
def chunk_elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(logsumexp, "CHUNK_ELEMENTS", request.param)
    return int(request.param)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_selected_logprobs_equal_dense_float64(chunk_elements: int, temperature: float) -> None:
    logits, dense = logits_like().requires_grad_(), logits_like().double().requires_grad_()
    weights = torch.randn(4, 2, generator=torch.Generator().manual_seed(1))
    value = selected_logprobs(logits, IDS, temperature)
    expected = (dense / temperature).log_softmax(-1).gather(1, IDS)
    (value * weights).sum().backward()
    (expected * weights).sum().backward()
    assert logits.grad is not None and dense.grad is not None
    assert torch.allclose(value.double(), expected, atol=1e-6)
    assert torch.allclose(logits.grad.double(), dense.grad, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_rest_equals_dense_float64(chunk_elements: int, temperature: float) -> None:
    logits, dense = logits_like().requires_grad_(), logits_like().double().requires_grad_()
    selected, rest = selected_and_rest(logits, IDS, temperature)
    scaled = dense / temperature
    others = torch.ones(4, 5, dtype=torch.bool).scatter(1, IDS, False)
    expected = torch.stack([row[keep].exp().sum().log() for row, keep in zip(scaled, others, strict=True)])
    (2 * rest + selected.sum(1)).sum().backward()
    (2 * expected + scaled.gather(1, IDS).sum(1)).sum().backward()
    assert logits.grad is not None and dense.grad is not None
    assert torch.allclose(selected.double(), scaled.gather(1, IDS), atol=1e-6)
    assert torch.allclose(rest.double(), expected, atol=1e-6)
    assert torch.allclose(logits.grad.double(), dense.grad, atol=1e-6)


def test_rest_keeps_its_precision_where_one_minus_the_sum_has_none() -> None:
    logits = torch.tensor([[0.0, -46.0, -47.0, -48.0]])
    _, rest = selected_and_rest(logits, torch.tensor([[0]]))
    expected = math.exp(-46) + math.exp(-47) + math.exp(-48)
    assert expected < 2e-20
    assert math.exp(rest.item()) == pytest.approx(expected, rel=1e-5)


def test_an_empty_rest_is_minus_infinity_with_zero_gradient() -> None:
    logits = torch.randn(2, 3, requires_grad=True)
    _, rest = selected_and_rest(logits, torch.tensor([[0, 1, 2], [2, 0, 1]]))
    rest.sum().backward()
    assert rest.tolist() == [-math.inf, -math.inf]
    assert logits.grad is not None and torch.equal(logits.grad, torch.zeros(2, 3))


def test_gradient_has_the_dtype_of_the_logits_and_values_are_float32() -> None:
    logits = logits_like().bfloat16().requires_grad_()
    selected, rest = selected_and_rest(logits, IDS)
    (selected.sum() + rest.sum()).backward()
    assert (selected.dtype, rest.dtype) == (torch.float32, torch.float32)
    assert logits.grad is not None and logits.grad.dtype == torch.bfloat16


def test_no_rows_stay_differentiable() -> None:
    logits = torch.zeros(0, 5, requires_grad=True)
    selected_logprobs(logits, torch.zeros(0, 2, dtype=torch.int64)).sum().backward()
    assert logits.grad is not None and logits.grad.shape == (0, 5)
