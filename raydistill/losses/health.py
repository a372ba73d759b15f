"""Per-token numbers that show the state of the student; never part of a loss."""

# Shape letters: N completion tokens (flattened), V vocabulary.
from __future__ import annotations

import torch
from torch import Tensor

from raydistill.losses.logsumexp import row_slices


@torch.no_grad()
def student_entropy(logits_NV: Tensor) -> Tensor:
    """Entropy -sum_v q_v log q_v of q = softmax(logits), at temperature 1: [N, V] -> [N] float32 nats. No gradient.

    Tokens of logit -inf add 0. Works in chunks of rows, so no float32 copy of all logits exists.

    Property tested: log V for equal logits, 0 for a single possible token.
    """
    entropy_N = torch.empty(logits_NV.shape[0], dtype=torch.float32, device=logits_NV.device)
    for rows in row_slices(logits_NV):
        probs = logits_NV[rows].softmax(-1, dtype=torch.float32)
        entropy_N[rows] = torch.special.entr(probs).sum(-1)
    return entropy_N
