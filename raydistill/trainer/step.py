"""One optimizer step of one rank: fetch nothing, know no Ray; tokens and targets in, small numbers out.

The gradient is that of (sum of all token losses of the step) / (their count over all ranks and micro-batches); the
count is known before the first backward (METHODS: one normalisation).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from raydistill.losses.health import student_entropy
from raydistill.losses.objective import Objective
from raydistill.losses.reduction import loss_scale, micro_batch_loss
from raydistill.messages import REFERENCE_VERSION, Metric, Samples, Scored
from raydistill.tensors import SequenceBatch, target_tensors

SumOverRanks = Callable[[Tensor], Tensor]
"""All-reduce (sum) of a float64 vector over the data-parallel ranks."""


class Engine(Protocol):
    """What a step needs from DeepSpeed; a test hands in plain torch."""

    def forward(self, batch: SequenceBatch) -> Tensor: ...

    def backward(self, loss: Tensor) -> None: ...

    def step(self, bad: bool) -> tuple[bool, float]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """The data-parallel group a step runs in."""

    world_size: int
    sum: SumOverRanks


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStep:
    """What one optimizer step did, already summed over the ranks."""

    metrics: tuple[Metric, ...]
    skipped: str | None


OLDEST_AGE = 3  # of the staleness histogram: the last bin holds this age and every older one
AGES = tuple(f"age_{age}" for age in range(OLDEST_AGE + 1))
NAMES = ("loss", "kl", "ce", "entropy", "staleness", "tokens", "reference", "sampled", "bad", *AGES)


def run_step(
    engine: Engine,
    objective: Objective,
    micro_batches: Sequence[Scored],
    version: int,
    ranks: Ranks,
    device: str | torch.device,
) -> RankStep:
    """Train on one step's micro-batches; `version` is the policy version before the step."""
    tokens = sum(m.samples.completions.num_tokens for m in micro_batches)
    bad_teacher = any(m.target is not None and not m.target.is_finite for m in micro_batches)
    before = ranks.sum(torch.tensor([tokens, float(bad_teacher)], dtype=torch.float64))
    global_count, skip_reason = int(before[0]), "teacher answers are NaN or infinite" if before[1] else None
    scale = loss_scale(max(global_count, 1), ranks.world_size, len(micro_batches))
    totals = torch.zeros(len(NAMES), dtype=torch.float64)
    norm = float("nan")
    for micro_batch in micro_batches:
        sums, bad = _backward(engine, objective, micro_batch, scale, skip_reason is not None, version, device)
        totals += sums
        last = micro_batch is micro_batches[-1]
        if last:
            totals = ranks.sum(totals)
            if skip_reason is None and totals[NAMES.index("bad")] > 0:
                skip_reason = "the loss is NaN or infinite"
        applied, norm = engine.step(bad=skip_reason is not None if last else bad)
        if last and skip_reason is None and not (applied and math.isfinite(norm)):
            skip_reason = "the gradient is NaN or infinite"
    return RankStep(metrics=_metrics(totals, norm), skipped=skip_reason)


def _backward(
    engine: Engine,
    objective: Objective,
    scored: Scored,
    scale: float,
    poison: bool,
    version: int,
    device: str | torch.device,
) -> tuple[Tensor, bool]:
    samples = scored.samples
    logits_NV = engine.forward(SequenceBatch.of_samples(samples, device))
    ids_N = torch.from_numpy(samples.completions.ids_T.copy()).long().to(device)
    reference_N = token_is_reference(samples).to(device)
    target = None if scored.target is None else target_tensors(scored.target, device)
    losses = objective.token_losses(logits_NV, target, ids_N, reference_N)
    loss = micro_batch_loss(losses.loss_N, scale)
    bad = poison or not bool(torch.isfinite(loss))
    # A NaN gradient on one rank reaches all of them in the reduction, and the optimizer drops the whole step. An infinite
    # loss alone would not do: its gradient may be finite.
    engine.backward(loss * float("nan") if bad else loss)
    if bad:
        sums = torch.zeros(len(NAMES), dtype=torch.float64)
        sums[NAMES.index("bad")] = 1.0
        return sums, True
    ages = [version - v for v in samples.policy_versions if v != REFERENCE_VERSION]
    divergence = losses.divergence_N.sum() if losses.divergence_N is not None else torch.zeros(())
    values = (
        float(losses.loss_N.detach().sum()),
        float(divergence),
        float(losses.cross_entropy_N.sum()),
        float(student_entropy(logits_NV.detach()).sum()),
        float(sum(ages)),
        float(ids_N.numel()),
        float(reference_N.sum()),
        float(len(ages)),
        0.0,
        *(float(sum(min(age, OLDEST_AGE) == bin for age in ages)) for bin in range(OLDEST_AGE + 1)),
    )
    return torch.tensor(values, dtype=torch.float64), False


def token_is_reference(samples: Samples) -> Tensor:
    """[N] bool: completion tokens that come from the data set, not from a policy."""
    is_reference_B = np.array([v == REFERENCE_VERSION for v in samples.policy_versions], dtype=bool)
    return torch.from_numpy(np.repeat(is_reference_B, samples.completions.lengths_B))


def _metrics(totals: Tensor, norm: float) -> tuple[Metric, ...]:
    sums = dict(zip(NAMES, totals.tolist(), strict=True))
    metrics = [
        Metric(name="trainer/loss", total=sums["loss"], weight=sums["tokens"]),
        Metric(name="trainer/divergence_nats", total=sums["kl"], weight=sums["tokens"]),
        Metric(name="trainer/entropy_nats", total=sums["entropy"], weight=sums["tokens"]),
        Metric(name="trainer/grad_norm", total=norm),
        Metric(name="trainer/tokens", total=sums["tokens"]),
    ]
    if sums["reference"]:
        metrics.append(Metric(name="trainer/cross_entropy_nats", total=sums["ce"], weight=sums["reference"]))
    if sums["sampled"]:
        metrics.append(Metric(name="trainer/staleness_steps", total=sums["staleness"], weight=sums["sampled"]))
        metrics += [
            Metric(name=f"trainer/staleness_share/{age.removeprefix('age_')}", total=sums[age], weight=sums["sampled"])
            for age in AGES
        ]
    return tuple(metrics)
