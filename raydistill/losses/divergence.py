"""Divergences between a teacher and a student distribution, per token.

Pure functions of already selected tokens: class log-probabilities in, one float32 number of nats per token out. No
mask, no mean, no clamp: a negative value is information (rounding, or a target that does not sum to 1).
"""

# Shape letters: N completion tokens (flattened), C classes (the vocabulary, or K candidates and a tail bucket).
from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from typing import Literal, get_args

import torch
from torch import Tensor

from raydistill.errors import UserError

Scale = Literal["raw", "continuous"]
SCALES: tuple[str, ...] = get_args(Scale)
Divergence = Callable[[Tensor, Tensor, float, Scale], Tensor]
"""(teacher_logprobs_NC, student_logprobs_NC, beta, scale) -> [N] nats; the gradient must reach the student's."""


def kl(p_logprobs_NC: Tensor, q_logprobs_NC: Tensor) -> Tensor:
    """KL(p || q) = sum_c p_c (log p_c - log q_c) per token: [N, C], [N, C] -> [N] float32 nats.

    Gradient reaches both inputs. A class with p = 0 (log-prob -inf, or an exp that underflows) adds exactly 0 with
    gradient 0, whatever q is. A class with p > 0 and q = 0 makes the value +inf, because it is infinite.

    Property tested: equal to a float64 sum over the support of p.
    """
    p_logprobs_NC, q_logprobs_NC = p_logprobs_NC.float(), q_logprobs_NC.float()
    p_NC = p_logprobs_NC.exp()
    # `where` both hides -inf - -inf and stops the gradient into the classes outside the support.
    log_ratio_NC = torch.where(p_NC > 0, p_logprobs_NC - q_logprobs_NC, 0.0)
    return (p_NC * log_ratio_NC).sum(-1)


def generalized_jsd(
    teacher_logprobs_NC: Tensor, student_logprobs_NC: Tensor, beta: float, scale: Scale = "raw"
) -> Tensor:
    """Generalized Jensen-Shannon divergence D_beta(p, q), p the teacher, q the student (GKD, arXiv 2306.13649).

    beta = 0: KL(p || q), forward.   beta = 1: KL(q || p), reverse.   Both are exact, at either scale.
    Between:  D = beta KL(p || m) + (1 - beta) KL(q || m)  with  m = beta p + (1 - beta) q.
    scale "raw" returns D (the convention of TRL), which tends to 0 at both ends, so it jumps there. "continuous"
    returns D / (beta (1 - beta)), which tends to the two KLs. Float32 rounding of D dominates that quotient within
    about 1e-3 of an end (`Objective` refuses such values). Before the limit, the mixture caps log(p/q) at log(1/beta)
    and log(q/p) at log(1/(1 - beta)): tokens on which the two differ by more than that stay below their KL.

    Shapes: [N, C], [N, C] -> [N] float32 nats. Gradient reaches both inputs; the teacher's usually needs none.
    Classes of probability 0 on one side or on both give no NaN in value or gradient. The result is +inf only where it
    truly is: forward with q = 0 < p, reverse with p = 0 < q (whose gradient is not finite either). For 0 < beta < 1 the
    value is always finite: D <= log 2.

    Property tested: continuous at beta -> 0 and 1 approaches the forward and the reverse KL.
    """
    if beta == 0.0:
        return kl(teacher_logprobs_NC, student_logprobs_NC)
    if beta == 1.0:
        return kl(student_logprobs_NC, teacher_logprobs_NC)
    teacher_logprobs_NC, student_logprobs_NC = teacher_logprobs_NC.float(), student_logprobs_NC.float()
    mixture_NC = _mixture_logprobs(teacher_logprobs_NC, student_logprobs_NC, beta)
    value_N = beta * kl(teacher_logprobs_NC, mixture_NC) + (1 - beta) * kl(student_logprobs_NC, mixture_NC)
    return value_N / (beta * (1 - beta)) if scale == "continuous" else value_N


def _mixture_logprobs(teacher_logprobs_NC: Tensor, student_logprobs_NC: Tensor, beta: float) -> Tensor:
    """log(beta p + (1 - beta) q). Classes that are empty on both sides get a finite filler: `kl` never reads it."""
    # The gradient of logaddexp(-inf, -inf) is NaN, and NaN * 0 is NaN: take those classes out before.
    is_empty_NC = (teacher_logprobs_NC == -math.inf) & (student_logprobs_NC == -math.inf)
    return torch.logaddexp(
        teacher_logprobs_NC.masked_fill(is_empty_NC, 0.0) + math.log(beta),
        student_logprobs_NC.masked_fill(is_empty_NC, 0.0) + math.log1p(-beta),
    )


DIVERGENCES: dict[str, Divergence] = {"generalized_jsd": generalized_jsd}
"""What `objective.divergence` may name. One more entry is one more loss, on every kind of teacher target."""


def divergence_named(name: str) -> Divergence:
    """An entry of `DIVERGENCES`, or any importable function as "module:function". UserError says what is missing."""
    if name in DIVERGENCES:
        return DIVERGENCES[name]
    module_name, colon, function_name = name.partition(":")
    if not colon:
        near = get_close_matches(name, DIVERGENCES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there is {', '.join(DIVERGENCES)}"
        raise UserError(f"objective.divergence={name!r} is unknown; {hint}; one of your own is module:function")
    folder = os.getcwd()
    if folder not in sys.path:  # the console script has its own folder there, not the one that it is called in
        sys.path.insert(0, folder)
    try:
        found: Divergence = getattr(import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"objective.divergence={name!r} cannot be imported: {error}; run from the folder that holds {module_name}.py, or "
            "put it on PYTHONPATH (on a cluster: ray job submit --working-dir)"
        ) from error
    return found


def check_divergence(name: str) -> None:
    """UserError unless the divergence answers two small distributions with finite numbers [N] that have a gradient."""
    divergence = divergence_named(name)
    teacher_NC = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]).log()
    logits_NC = torch.tensor([[0.1, 0.2, 0.3], [1.0, 0.0, -1.0]], requires_grad=True)
    try:
        value_N = divergence(teacher_NC, logits_NC.log_softmax(-1), 0.5, "raw")
        (gradient_NC,) = torch.autograd.grad(value_N.sum(), logits_NC)
    except Exception as error:
        raise UserError(f"objective.divergence={name!r} fails on a small example: {error!r}") from error
    if value_N.shape != (2,) or not bool(torch.isfinite(value_N).all() and torch.isfinite(gradient_NC).all()):
        raise UserError(
            f"objective.divergence={name!r} answers a small example of 2 tokens with {value_N.detach().tolist()} and the "
            f"gradient {gradient_NC.tolist()}; it must return one finite number of nats per token, with a finite gradient"
        )
