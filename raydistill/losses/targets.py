"""From student logits and what the teacher said to the class log-probabilities of both, ready for `divergence`.

A teacher says either its K most likely tokens and the mass of the tail (`TopKTarget`) or the whole vocabulary
(`DenseTarget`). Its log-probabilities are taken at the distillation temperature already; the student's logits are
divided by it here. The T^2 that keeps the gradient's size is applied by `objective`, once.
"""

# Shape letters: N completion tokens (flattened), V vocabulary, K teacher candidates, C classes.
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from raydistill.losses.logsumexp import selected_and_rest, selected_logprobs

Treatment = Literal["tail", "truncated", "renormalised"]
TREATMENT_NAMES: tuple[str, ...] = get_args(Treatment)

LOG_COMPLEMENT_RESOLUTION = math.log(2.0**-24)
"""Half a float32 unit at 1, in nats: below it `1 - (sum of probabilities)` holds rounding only."""


@runtime_checkable
class TopKTarget(Protocol):
    """The teacher's K most likely next tokens; log-probs of the softmax over its whole vocabulary at temperature T."""

    @property
    def ids_NK(self) -> Tensor:
        """int64, different within a row, all below the student's V (the teacher cuts its padding before its top-K)."""

    @property
    def logprobs_NK(self) -> Tensor:
        """float32 nats."""

    @property
    def tail_logprob_N(self) -> Tensor:
        """float32 nats: log of the probability of all other tokens."""


@runtime_checkable
class DenseTarget(Protocol):
    """The teacher's log-probs of the whole vocabulary at temperature T."""

    @property
    def logprobs_NV(self) -> Tensor:
        """float32 nats."""


TeacherTarget = TopKTarget | DenseTarget


def tail_classes(student_logits_NV: Tensor, teacher: TopKTarget, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(teacher, student) log-probs over the K candidates and one class for all other tokens: [N, K + 1] each, float32.

    Both sides sum to 1. Merging classes never increases an f-divergence, so every member of the generalized JSD family
    is at most its full-vocabulary value. At K == V no other token exists: the tail class is left out ([N, K]) and the
    value is the full one, whatever rounding residue the teacher's tail carries. At K < V a teacher tail of -inf is
    taken at its word, so the reverse KL is +inf unless the student's is 0 too: a back end that obtains the tail as
    1 - sum must use `complement_logprob`. Gradient reaches all student logits (those in the tail through its sum).

    Property tested: never above the full KL; equal at K == V, gradient too.
    """
    selected_NK, rest_N = selected_and_rest(student_logits_NV, teacher.ids_NK, temperature)
    teacher_NC = teacher.logprobs_NK.float()
    if teacher.ids_NK.shape[1] == student_logits_NV.shape[1]:
        return teacher_NC, selected_NK.log_softmax(-1)
    student_NC = torch.cat([selected_NK, rest_N[:, None]], dim=1).log_softmax(-1)
    return torch.cat([teacher_NC, teacher.tail_logprob_N.float()[:, None]], dim=1), student_NC


def truncated_classes(
    student_logits_NV: Tensor, teacher: TopKTarget, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(teacher, student) full-softmax log-probs of the K candidates, the tail ignored: [N, K] each, float32.

    Biased, for comparison only: neither side sums to 1, so the KL can be negative, the forward one is lowered by moving
    mass from the tail onto the candidates without end, and the reverse one by moving mass off them. Gradient reaches
    all student logits (through the normaliser).

    Property tested: the forward KL is negative where the student puts more mass on the candidates.
    """
    return teacher.logprobs_NK.float(), selected_logprobs(student_logits_NV, teacher.ids_NK, temperature)


def renormalised_classes(
    student_logits_NV: Tensor, teacher: TopKTarget, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(teacher, student) log-probs of the K candidates, each side renormalised to sum to 1: [N, K] each, float32.

    Biased, for comparison only: the student's mass outside the candidates is free. Gradient reaches the candidates'
    logits only.

    Property tested: raising a logit outside the candidates changes nothing.
    """
    student_NK = student_logits_NV.gather(1, teacher.ids_NK).float() / temperature
    return teacher.logprobs_NK.float().log_softmax(-1), student_NK.log_softmax(-1)


TREATMENTS: dict[str, Callable[[Tensor, TopKTarget, float], tuple[Tensor, Tensor]]] = {
    "tail": tail_classes,
    "truncated": truncated_classes,
    "renormalised": renormalised_classes,
}


def dense_classes(
    student_logits_NV: Tensor, teacher_logprobs_NV: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(teacher, student) log-probs of the vocabulary both have: [N, min of the two V] each, float32.

    Models of one family pad their vocabulary to different sizes. The longer side is cut to the ids both have and
    renormalised, so both sum to 1; the padding of a longer student then gets no gradient. That two tokenizers agree on
    the shared ids is checked elsewhere. Makes float32 [N, V] tensors: call it on chunks of rows. Gradient reaches the
    student logits that are kept.

    Property tested: padding either side with any logits changes nothing.
    """
    num_shared = min(student_logits_NV.shape[1], teacher_logprobs_NV.shape[1])
    student_NV = student_logits_NV[:, :num_shared]
    if temperature != 1.0:
        student_NV = student_NV.float() / temperature
    if teacher_logprobs_NV.shape[1] > num_shared:
        teacher_logprobs_NV = teacher_logprobs_NV[:, :num_shared].log_softmax(-1, dtype=torch.float32)
    return teacher_logprobs_NV.float(), student_NV.log_softmax(-1, dtype=torch.float32)


def complement_logprob(logprobs_NK: Tensor) -> Tensor:
    """log(1 - sum_k exp logprob_k), the tail of a back end that returns K < V log-probs and no logits: [N, K] -> [N].

    Exact tails are sums over the other tokens; use this only where those are not to be had. The sum of float32
    probabilities is 1 or more for peaked teachers, so the result is held at the resolution of that difference, 2^-24
    (-16.6 nats): nothing smaller is known, and -inf would make the reverse KL infinite. No gradient is needed.

    Property tested: a sum above 1 gives -16.6, never NaN or -inf.
    """
    tail_N = 1.0 - logprobs_NK.double().exp().sum(-1)
    return tail_N.log().nan_to_num(nan=-math.inf).clamp(min=LOG_COMPLEMENT_RESOLUTION).float()
