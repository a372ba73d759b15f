"""Muon in float32, all matrices of one shape at once.

`torch.optim.Muon` orthogonalises in bfloat16, one matrix at a time; a CPU without bfloat16 instructions does that 30
times slower than float32, more than the whole forward and backward pass of a tiny model. This one computes the same
update (a test compares the two) in batched float32 products.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# Keller Jordan's quintic: five rounds bring every singular value into about 0.7 .. 1.2.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NUM_ROUNDS = 5


class Muon(torch.optim.Optimizer):
    """Momentum whose every update is replaced by its nearest orthogonal matrix; for 2-D parameters only."""

    def __init__(
        self, params: Iterable[Tensor], lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        if any(parameter.ndim != 2 for group in self.param_groups for parameter in group["params"]):
            raise ValueError("Muon trains matrices; give vectors and embeddings to AdamW")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            same_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    buffer = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                    buffer.lerp_(parameter.grad, 1 - group["momentum"])
                    update = parameter.grad.lerp(buffer, group["momentum"])  # Nesterov
                    rows, columns = parameter.shape
                    same_shape[min(rows, columns), max(rows, columns)].append((parameter, update))
            for pairs in same_shape.values():
                wide = torch.stack([update if update.shape[0] <= update.shape[1] else update.T for _, update in pairs])
                for (parameter, update), direction in zip(pairs, orthogonalise(wide), strict=True):
                    rows, columns = update.shape
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    scale = max(1.0, rows / columns) ** 0.5
                    parameter.add_(direction if rows <= columns else direction.T, alpha=-group["lr"] * scale)


def orthogonalise(matrices: Tensor) -> Tensor:
    """Replaces the singular values of each wide matrix [..., R, C], R <= C, by about 1."""
    linear, cubic, quintic = NEWTON_SCHULZ
    result = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(NUM_ROUNDS):
        gram = result @ result.mT
        result = torch.baddbmm(result, torch.baddbmm(gram, gram, gram, beta=cubic, alpha=quintic), result, beta=linear)
    return result
