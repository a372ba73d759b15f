"""What a rollout actor needs from an engine; vLLM and transformers' generate both answer to it.

An engine computes one student at one policy version at a time. `load` replaces that version, `sample` and `score` use it.
Runs that share an engine take turns: what one of them loaded may be there still when its turn comes again (`select`).
Token ids go in and come out; text never appears.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from raydistill.config import AdapterSection, QuantSection, RolloutSection, StudentSection
from raydistill.messages import FinishReason, StudentWeights, TokenRows

ENGINE_FIELDS = ("engine", "num_gpus", "tensor_parallel_size", "gpu_memory_utilization", "kv_cache_gib")
"""Of the rollout section; the others are of a call, or of the pool."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSettings:
    """How completions are sampled; temperature 0 is greedy."""

    temperature: float
    top_p: float
    min_new_tokens: int
    max_new_tokens: int


def engine_needs(
    student: StudentSection, quant: QuantSection, adapter: AdapterSection, rollout: RolloutSection
) -> tuple[object, ...]:
    """What runs must have in common to share an engine, as far as a config says. How long a sequence may be is no part of
    it: an engine can be built anew, longer, for all of them."""
    without_dropout = adapter.model_copy(update={"dropout": 0.0})  # which only the trainer has
    return student, quant, without_dropout, tuple(getattr(rollout, name) for name in ENGINE_FIELDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The ids one prompt was answered with, the end token included where it was sampled."""

    ids: Sequence[int]
    finish_reason: FinishReason


class Engine(Protocol):
    """One student that can sample and score."""

    name: str  # the class that really ran, for the run's record

    def load(self, run: str, weights: StudentWeights, want_codes: bool) -> tuple[str, str | None]:
        """Compute this version of `run` from now on. Returns (hash of the tensors held, hash of the codes or None)."""

    def select(self, run: str) -> bool:
        """Compute what was loaded for `run` last, if it is still held; False where it has to be loaded again."""

    def drop(self, run: str) -> None:
        """Let go of what is held for `run`."""

    def sample(self, prompts: TokenRows, settings: SamplingSettings, seeds: Sequence[int]) -> list[Completion]:
        """One completion per prompt; a prompt's completion depends on its own seed only."""

    def score(self, rows: TokenRows) -> np.ndarray:
        """Log-probs [N] float32 of every token but the first of each row, given the ones before it."""

    def close(self) -> None:
        """Free the engine; another one may follow in the same process."""
