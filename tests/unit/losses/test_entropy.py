"""Student entropy in its two limits and against float64."""

import math

import pytest
import torch

import raydistill.losses.logsumexp as logsumexp
from raydistill.losses.health import student_entropy


def test_entropy_is_log_v_for_equal_logits_and_zero_for_one_possible_token() -> None:
    logits = torch.full((2, 5), -math.inf)
    logits[0] = 3.0
    logits[1, 2] = 1.0
    assert student_entropy(logits).tolist() == pytest.approx([math.log(5), 0.0])


@pytest.mark.parametrize("chunk_elements", [1, 2**25])
def test_entropy_equals_the_float64_sum(monkeypatch: pytest.MonkeyPatch, chunk_elements: int) -> None:
    monkeypatch.setattr(logsumexp, "CHUNK_ELEMENTS", chunk_elements)
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    probs = logits.detach().double().softmax(-1)
    value = student_entropy(logits)
    assert value.tolist() == pytest.approx((-(probs * probs.log()).sum(-1)).tolist(), rel=1e-5)
    assert not value.requires_grad
