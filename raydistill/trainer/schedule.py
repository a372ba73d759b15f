"""Learning-rate schedules as plain functions of the optimizer step; nothing else steps them."""

from __future__ import annotations

import math
from collections.abc import Callable

from raydistill.config import TrainerSection


def _constant(progress: float) -> float:
    return 1.0


def _linear(progress: float) -> float:
    return 1.0 - progress


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


SCHEDULES: dict[str, Callable[[float], float]] = {"constant": _constant, "linear": _linear, "cosine": _cosine}


def learning_rate_factor(section: TrainerSection, step: int) -> float:
    """Factor on the peak learning rate for optimizer step `step` (from 0).

    Rises linearly over `warmup_fraction` of the steps (never 0: the first step trains), then follows the schedule to
    its value at the last step.
    """
    warmup = round(section.warmup_fraction * section.num_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    remaining = max(section.num_steps - warmup, 1)
    return SCHEDULES[section.lr_schedule](min((step - warmup) / remaining, 1.0))
