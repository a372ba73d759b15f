"""Reading a few classes out of [N, V] logits, with exact sums over the rest, without float32 copies of all of them.

At V = 152k one float32 [N, V] tensor is 600 MB per thousand tokens, and the obvious expressions make several. The work
is done here over chunks of rows; backward recomputes the softmax and writes one gradient in the dtype of the logits.
"""

# Shape letters: N completion tokens (flattened), V vocabulary, K candidates.
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 2**25
"""Logits handled at once: 128 MiB in float32, large enough that the number of kernel launches does not matter."""


def rows_per_chunk(vocabulary_size: int) -> int:
    """How many rows of [N, V] logits to convert to float32 at once."""
    return max(1, CHUNK_ELEMENTS // max(1, vocabulary_size))


def row_slices(logits_NV: Tensor) -> Iterator[slice]:
    """Slices that cut [N, V] logits into chunks of rows."""
    rows = rows_per_chunk(logits_NV.shape[1])
    for start in range(0, logits_NV.shape[0], rows):
        yield slice(start, start + rows)


def selected_logprobs(logits_NV: Tensor, ids_NK: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / T) at `ids`: [N, V], [N, K] int64 -> [N, K] float32 nats. Gradient reaches the logits.

    Property tested: value and gradient equal float64 log_softmax and gather.
    """
    selected_NK, lse_N = _select_and_reduce(logits_NV, ids_NK, temperature, False)
    return selected_NK - lse_N[:, None]


def selected_and_rest(logits_NV: Tensor, ids_NK: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """z = logits / T at `ids`, and log sum exp z over all *other* tokens: [N, V], [N, K] -> [N, K], [N], float32.

    Unnormalised: softmax over the K + 1 numbers gives the class probabilities. The rest is summed, never obtained as
    1 - (sum of the selected), so it keeps its relative precision at any size. It is -inf if nothing is left (K == V);
    its gradient is then 0. The ids of a row must differ. Gradient reaches the logits.

    Property tested: the rest keeps a relative error of 1e-5 at a probability of 1e-20.
    """
    return _select_and_reduce(logits_NV, ids_NK, temperature, True)


class _SelectAndReduce(torch.autograd.Function):
    """logits [N,V], ids [N,K] -> z at ids [N,K], logsumexp of z [N] with or without those; z = logits / temperature."""

    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, ids_NK: Tensor, temperature: float, is_excluding: bool
    ) -> tuple[Tensor, Tensor]:
        selected_NK = torch.empty(ids_NK.shape, dtype=torch.float32, device=logits_NV.device)
        lse_N = torch.empty(logits_NV.shape[0], dtype=torch.float32, device=logits_NV.device)
        for rows in row_slices(logits_NV):
            z = _scaled_copy(logits_NV[rows], temperature)
            selected_NK[rows] = z.gather(1, ids_NK[rows])
            if is_excluding:
                z.scatter_(1, ids_NK[rows], -math.inf)
            lse_N[rows] = z.logsumexp(1)
        ctx.save_for_backward(logits_NV, ids_NK, lse_N)
        ctx.temperature, ctx.is_excluding = temperature, is_excluding
        return selected_NK, lse_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_selected_NK: Tensor, grad_lse_N: Tensor) -> tuple[Tensor, None, None, None]:
        logits_NV, ids_NK, lse_N = ctx.saved_tensors
        # An empty sum has lse = -inf; any finite shift then gives exp(-inf) = 0 instead of exp(-inf + inf) = NaN.
        shift_N = lse_N.masked_fill(lse_N == -math.inf, 0.0)
        grad_NV = torch.empty_like(logits_NV)
        for rows in row_slices(logits_NV):
            z = _scaled_copy(logits_NV[rows], ctx.temperature)
            if ctx.is_excluding:
                z.scatter_(1, ids_NK[rows], -math.inf)
            z.sub_(shift_N[rows, None]).exp_().mul_(grad_lse_N[rows, None])
            z.scatter_add_(1, ids_NK[rows], grad_selected_NK[rows])
            grad_NV[rows] = z.div_(ctx.temperature)
        return grad_NV, None, None, None


_select_and_reduce = cast(
    Callable[[Tensor, Tensor, float, bool], tuple[Tensor, Tensor]], cast(Any, _SelectAndReduce).apply
)


def _scaled_copy(logits: Tensor, temperature: float) -> Tensor:
    copy = logits.to(torch.float32, copy=True)
    return copy if temperature == 1.0 else copy.div_(temperature)
