"""The rollout actor: one engine with the served student; samples, loads new versions, proves it holds them.

Called by the rollout pool in this order: `prepare` (slow imports, before any model exists), `start` (build the engine),
then `load` and `sample` in any order. Calls run one after another, so a load drains the engine first and no sequence
mixes two policies. Repeating a load is harmless.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from raydistill.actors.engine import Engine, SamplingSettings
from raydistill.config import RolloutSection
from raydistill.errors import StaleWeightsError
from raydistill.health import completion_metrics
from raydistill.messages import (
    LoadReport,
    PromptBatch,
    Samples,
    Span,
    StageReport,
    StudentWeights,
    TokenRows,
)
from raydistill.models import StudentSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """All an actor needs to build its engine."""

    student: StudentSpec
    rollout: RolloutSection
    max_model_len: int
    eos_ids: tuple[int, ...]
    probes: TokenRows
    sampled_ids: int | None = None  # sample ids below this only: the others are padding; None: all

    @property
    def builds(self) -> tuple[object, ...]:
        """All that an engine is built from; probes may change without a new one."""
        return self.student, self.rollout, self.max_model_len, self.eos_ids, self.sampled_ids


class RolloutActor:
    """One sampling engine behind a few typed calls."""

    def __init__(self, name: str, engine: str) -> None:
        self._name, self._kind = name, engine
        self._engine: Engine | None = None
        self._spec: EngineSpec | None = None
        self._version = -1
        self._sampled_tokens, self._sampling_cpu_s = 0, 0.0

    def prepare(self) -> int:
        """Import the engine's library, which takes longer than building an engine. Returns the process id."""
        if self._kind == "vllm":
            import vllm  # noqa: F401
        return os.getpid()

    def start(self, spec: EngineSpec, engine: Engine | None = None) -> str:
        """Build the engine (tests hand one in) and name the class that really runs. An equal one is kept."""
        before, self._spec = self._spec, spec
        self._version = -1
        self._sampled_tokens, self._sampling_cpu_s = 0, 0.0
        if engine is not None:
            self._engine = engine
        elif self._engine is not None and before is not None and before.builds == spec.builds:
            pass
        elif spec.rollout.engine == "vllm":
            from raydistill.actors.vllm_engine import VllmEngine

            if self._engine is not None:
                self._engine.close()
            self._engine = VllmEngine(spec.student, spec.rollout, spec.max_model_len, spec.eos_ids, spec.sampled_ids)
        else:
            from raydistill.actors.hf_engine import HfEngine

            self._engine = HfEngine(spec.student, spec.eos_ids, spec.sampled_ids)
        return self._engine.name

    def load(self, weights: StudentWeights, want_codes: bool) -> LoadReport:
        """Hold this version; compare the probes' log-probs with the trainer's at the same version."""
        assert self._engine is not None
        if weights.version < self._version:
            raise StaleWeightsError(f"{self._name} holds version {self._version}, it was sent {weights.version}")
        start = time.time()
        weights_hash, codes_hash = self._engine.load(weights, want_codes)
        self._version = weights.version
        loaded_s = time.time() - start
        gap_mean = gap_p99 = None
        if weights.probe is not None:
            assert self._spec is not None
            gap = np.abs(self._engine.score(self._spec.probes) - weights.probe.logprobs_N)
            gap_mean, gap_p99 = float(gap.mean()), float(np.quantile(gap, 0.99))
        return LoadReport(
            actor=self._name,
            version=weights.version,
            weights_hash=weights_hash,
            codes_hash=codes_hash,
            gap_mean_nats=gap_mean,
            gap_p99_nats=gap_p99,
            size_bytes=weights.size_bytes,
            seconds=loaded_s,
        )

    def sample(
        self,
        batch: PromptBatch,
        settings: SamplingSettings,
        seeds: tuple[int, ...],
        version: int,
        parts: tuple[tuple[int, ...], ...],
    ) -> tuple[Any, ...]:
        """Answer the prompts with the policy `version`; returns (StageReport, one Samples per part).

        `parts` lists, for each trainer rank, the rows of the batch it will train on: each part is an object of its own,
        so that a rank fetches no other rank's tokens.
        """
        assert self._engine is not None
        if self._version < version:  # newer is fresher: a replaced actor is armed with the newest
            raise StaleWeightsError(
                f"{self._name} holds version {self._version}, it was asked to sample with {version}"
            )
        start, cpu_start = time.time(), time.process_time()
        completions = self._engine.sample(batch.prompts, settings, seeds)
        samples = Samples(
            step=batch.step,
            indices=batch.indices,
            row_ids=batch.row_ids,
            prompts=batch.prompts,
            completions=TokenRows.from_rows([c.ids for c in completions]),
            policy_versions=(self._version,) * len(completions),
            finish_reasons=tuple(c.finish_reason for c in completions),
        )
        if batch.step >= 0:  # held-out answers come in larger batches and would flatter the rate
            self._sampling_cpu_s += time.process_time() - cpu_start
            self._sampled_tokens += samples.completions.num_tokens
        report = StageReport(
            step=batch.step,
            num_sequences=len(samples),
            num_tokens=samples.completions.num_tokens,
            metrics=completion_metrics(samples),
            span=Span(stage="rollout", actor=self._name, step=batch.step, start_s=start, end_s=time.time()),
        )
        return report, *(samples.take(rows) for rows in parts)

    def tokens_per_cpu_second(self) -> float:
        """Training tokens sampled in this run per CPU-second this process spent sampling them."""
        return self._sampled_tokens / self._sampling_cpu_s if self._sampling_cpu_s else 0.0
