"""The training objective per completion token: distill_weight * T^2 * divergence + ce_weight * cross-entropy.

The trainer calls `Objective.token_losses` on the selected rows of one micro-batch and hands the result to
`reduction.micro_batch_loss`.
"""

# Shape letters: N completion tokens (flattened), V vocabulary, R reference tokens.
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from raydistill.errors import UserError
from raydistill.losses.divergence import SCALES, Scale, divergence_named
from raydistill.losses.logsumexp import rows_per_chunk, selected_logprobs
from raydistill.losses.targets import TREATMENTS, DenseTarget, TeacherTarget, Treatment, dense_classes

MIN_INNER_BETA = 1e-3
"""Closer to 0 or 1 (but not at it) float32 rounding dominates the generalized JSD: 5 % of it at 1e-4."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLosses:
    """What one micro-batch's tokens cost. All [N] float32 nats."""

    loss_N: Tensor
    """Weighted sum, with gradient."""
    divergence_N: Tensor | None
    """T^2 * divergence, unweighted, detached, for logging; None without a teacher."""
    cross_entropy_N: Tensor
    """Cross-entropy, unweighted, detached, for logging; 0 on tokens that are not reference tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """A divergence, by default that of generalized knowledge distillation (arXiv 2306.13649), plus optional cross-entropy
    on reference tokens."""

    divergence: str = "generalized_jsd"
    """A name of `DIVERGENCES`, or "module:function"."""
    beta: float = 0.0
    """0 = forward KL(teacher || student), 1 = reverse KL(student || teacher), generalized JSD between."""
    scale: Scale = "raw"
    temperature: float = 1.0
    """Of the divergence, on both sides; not the sampling temperature, and not that of the cross-entropy (1)."""
    treatment: Treatment = "tail"
    """How a top-K target is compared; dense targets ignore it."""
    distill_weight: float = 1.0
    ce_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.beta not in (0.0, 1.0) and not MIN_INNER_BETA <= self.beta <= 1 - MIN_INNER_BETA:
            raise UserError(
                f"beta={self.beta}: use exactly 0 (forward KL), exactly 1 (reverse KL), or a value from "
                f"{MIN_INNER_BETA} to {1 - MIN_INNER_BETA}; nearer to an end float32 rounding dominates"
            )
        if self.scale not in SCALES:
            raise UserError(f"scale={self.scale!r}: use one of {', '.join(SCALES)}")
        if self.treatment not in TREATMENTS:
            raise UserError(f"treatment={self.treatment!r}: use one of {', '.join(TREATMENTS)}")
        if not self.temperature > 0:
            raise UserError(f"temperature={self.temperature}: use a positive number (default 1)")
        if min(self.distill_weight, self.ce_weight) < 0 or max(self.distill_weight, self.ce_weight) == 0:
            raise UserError(
                f"distill_weight={self.distill_weight} and ce_weight={self.ce_weight}: use weights of 0 or more, "
                "at least one of them above 0"
            )

    def token_losses(
        self,
        student_logits_NV: Tensor,
        teacher: TeacherTarget | None,
        completion_ids_N: Tensor,
        is_reference_N: Tensor,
    ) -> TokenLosses:
        """distill_weight * T^2 * D(teacher, student at T) + ce_weight * [is reference] * -log q(completion token).

        student_logits_NV: any float dtype, gets the gradient. teacher: at temperature T already, no gradient; None is
        allowed if distill_weight is 0. completion_ids_N: int64. is_reference_N: bool, True for data-set tokens; tokens
        the student sampled get no cross-entropy. A term of weight 0 is computed for logging, without gradient.

        Property tested: the gradient equals autograd of the dense float64 formula.
        """
        if teacher is None and self.distill_weight > 0:
            raise UserError(
                f"distill_weight={self.distill_weight} needs a teacher target; set it to 0 to train without"
            )
        loss_N = torch.zeros(student_logits_NV.shape[0], dtype=torch.float32, device=student_logits_NV.device)
        divergence_N = None
        if teacher is not None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.distill_weight > 0):
                divergence_N = self._divergence(student_logits_NV, teacher) * self.temperature**2
            if self.distill_weight > 0:
                loss_N = loss_N + self.distill_weight * divergence_N
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.ce_weight > 0):
            cross_entropy_N = reference_cross_entropy(student_logits_NV, completion_ids_N, is_reference_N)
        if self.ce_weight > 0:
            loss_N = loss_N + self.ce_weight * cross_entropy_N
        return TokenLosses(
            loss_N=loss_N,
            divergence_N=None if divergence_N is None else divergence_N.detach(),
            cross_entropy_N=cross_entropy_N.detach(),
        )

    def _divergence(self, student_logits_NV: Tensor, teacher: TeacherTarget) -> Tensor:
        """Divergence at temperature T, without the T^2: [N]."""
        if not isinstance(teacher, DenseTarget):
            classes = TREATMENTS[self.treatment](student_logits_NV, teacher, self.temperature)
            return divergence_named(self.divergence)(*classes, self.beta, self.scale)
        # Recomputed in backward chunk by chunk, so the float32 [rows, V] tensors of one chunk only are alive at a time.
        rows = rows_per_chunk(student_logits_NV.shape[1])
        chunks = zip(torch.split(student_logits_NV, rows), torch.split(teacher.logprobs_NV, rows), strict=True)
        values: list[Tensor] = [
            checkpoint(self._dense_divergence, *chunk, use_reentrant=False, preserve_rng_state=False)
            for chunk in chunks
        ]
        return torch.cat(values)

    def _dense_divergence(self, student_logits_NV: Tensor, teacher_logprobs_NV: Tensor) -> Tensor:
        classes = dense_classes(student_logits_NV, teacher_logprobs_NV, self.temperature)
        return divergence_named(self.divergence)(*classes, self.beta, self.scale)


def reference_cross_entropy(logits_NV: Tensor, completion_ids_N: Tensor, is_reference_N: Tensor) -> Tensor:
    """-log softmax(logits)[completion token] on reference tokens, 0 on others: [N, V], [N], [N] -> [N] float32 nats.

    Rows are selected first, so rows that are not reference get no gradient, not even NaN.

    Property tested: zero gradient on other rows; the result stays differentiable without any reference token.
    """
    rows_R = is_reference_N.nonzero(as_tuple=True)[0]
    if rows_R.shape[0] == logits_NV.shape[0]:
        return -selected_logprobs(logits_NV, completion_ids_N[:, None])[:, 0]
    values_R = -selected_logprobs(logits_NV[rows_R], completion_ids_N[rows_R, None])[:, 0]
    zeros_N = torch.zeros(logits_NV.shape[0], dtype=torch.float32, device=logits_NV.device)
    return zeros_N.index_put((rows_R,), values_R)
