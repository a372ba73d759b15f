"""The rollout actor: one engine with the served student; samples, loads new versions, proves it holds them.

Called by the rollout pool in this order: `prepare` (slow imports, before any model exists), `start` (build the engine),
then `load` and `sample` in any order. Calls run one after another, so a load drains the engine first and no sequence
mixes two policies. Repeating a load is harmless. Several runs may share an actor; each call says for which run it is.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from raydistill.actors.engine import Engine, SamplingSettings, engine_needs
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
    num_adapters: int = 1  # served adapters that stay in the engine at once

    @property
    def builds(self) -> tuple[object, ...]:
        """What runs must have in common to share an engine, which has to be as long as the longest of them needs."""
        needs = engine_needs(self.student.student, self.student.quant, self.student.adapter, self.rollout)
        return *needs, self.eos_ids, self.sampled_ids, self.num_adapters

    @property
    def length(self) -> int:
        """Tokens of a sequence that the engine must have been built for."""
        return self.max_model_len if self.rollout.engine == "vllm" else 0


@dataclass(kw_only=True)
class _Run:
    """What is kept for one run."""

    spec: EngineSpec
    weights: StudentWeights | None = None  # the newest
    sampled_tokens: int = 0
    sampling_cpu_s: float = 0.0

    @property
    def version(self) -> int:
        return -1 if self.weights is None else self.weights.version


class RolloutActor:
    """One sampling engine behind a few typed calls. Runs that share it take turns: it computes with the weights of the run
    that calls."""

    def __init__(self, name: str, engine: str) -> None:
        self._name, self._kind = name, engine
        self._engine: Engine | None = None
        self._builds: tuple[object, ...] | None = None  # what the engine was built from, and how long
        self._length = 0
        self._runs: dict[str, _Run] = {}

    def prepare(self) -> int:
        """Import the engine's library, which takes longer than building an engine. Returns the process id."""
        if self._kind == "vllm":
            from raydistill.actors.vllm_engine import load_vllm

            load_vllm()
        return os.getpid()

    def start(self, run: str, spec: EngineSpec, engine: Engine | None = None) -> str:
        """Build a run's engine (tests hand one in) and name the class that really runs. One that serves it is kept."""
        others = [name for name, one in self._runs.items() if name != run and one.spec.builds != spec.builds]
        assert not others, f"{self._name} serves {', '.join(others)}, whose engine is not that of {run}"
        self._runs[run] = _Run(spec=spec)
        if engine is not None:
            self._engine, self._builds, self._length = engine, spec.builds, spec.length
        elif self._engine is None or self._builds != spec.builds or self._length < spec.length:
            try:
                self._build_anew(spec)
            except Exception:
                del self._runs[run]
                if self._runs:  # runs that had an engine keep one
                    self._build_anew(next(iter(self._runs.values())).spec)
                raise
        assert self._engine is not None
        return self._engine.name

    def _build_anew(self, spec: EngineSpec) -> None:
        """An engine as long as the longest run needs; each run's weights are loaded when its turn comes."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        longest = max((one.spec for one in self._runs.values()), key=lambda one: one.max_model_len)
        self._engine = _build(replace(spec, max_model_len=longest.max_model_len))
        self._builds, self._length = spec.builds, longest.length

    def end(self, run: str) -> None:
        """Forget a run; its engine stays for the next."""
        self._runs.pop(run, None)
        if self._engine is not None:
            self._engine.drop(run)

    def load(self, run: str, weights: StudentWeights, want_codes: bool) -> LoadReport:
        """Hold this version; compare the probes' log-probs with the trainer's at the same version."""
        assert self._engine is not None
        of_run = self._runs[run]
        if weights.version < of_run.version:
            raise StaleWeightsError(f"{self._name} holds version {of_run.version}, it was sent {weights.version}")
        start = time.time()
        weights_hash, codes_hash = self._engine.load(run, weights, want_codes)
        of_run.weights = weights
        loaded_s = time.time() - start
        gap_mean = gap_p99 = None
        if weights.probe is not None:
            gap = np.abs(self._engine.score(of_run.spec.probes) - weights.probe.logprobs_N)
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
        run: str,
        batch: PromptBatch,
        settings: SamplingSettings,
        seeds: tuple[int, ...],
        version: int,
        parts: tuple[tuple[int, ...], ...],
    ) -> tuple[Any, ...]:
        """Answer the prompts with a run's policy `version`; returns (StageReport, one Samples per part).

        `parts` lists, for each trainer rank, the rows of the batch it will train on: each part is an object of its own,
        so that a rank fetches no other rank's tokens.
        """
        assert self._engine is not None
        of_run = self._runs[run]
        if of_run.version < version:  # newer is fresher: a replaced actor is armed with the newest
            raise StaleWeightsError(
                f"{self._name} holds version {of_run.version}, it was asked to sample with {version}"
            )
        start, cpu_start = time.time(), time.process_time()
        if of_run.weights is not None and not self._engine.select(run):  # another run came in between
            self._engine.load(run, of_run.weights, False)
        completions = self._engine.sample(batch.prompts, settings, seeds)
        samples = Samples(
            step=batch.step,
            indices=batch.indices,
            row_ids=batch.row_ids,
            prompts=batch.prompts,
            completions=TokenRows.from_rows([c.ids for c in completions]),
            policy_versions=(of_run.version,) * len(completions),
            finish_reasons=tuple(c.finish_reason for c in completions),
        )
        if batch.step >= 0:  # held-out answers come in larger batches and would flatter the rate
            of_run.sampling_cpu_s += time.process_time() - cpu_start
            of_run.sampled_tokens += samples.completions.num_tokens
        report = StageReport(
            step=batch.step,
            num_sequences=len(samples),
            num_tokens=samples.completions.num_tokens,
            metrics=completion_metrics(samples),
            span=Span(stage="rollout", actor=self._name, step=batch.step, start_s=start, end_s=time.time()),
        )
        return report, *(samples.take(rows) for rows in parts)

    def tokens_per_cpu_second(self, run: str) -> float:
        """A run's training tokens per CPU-second that this process spent sampling them."""
        of_run = self._runs[run]
        return of_run.sampled_tokens / of_run.sampling_cpu_s if of_run.sampling_cpu_s else 0.0


def _build(spec: EngineSpec) -> Engine:
    if spec.rollout.engine == "vllm":
        from raydistill.actors.vllm_engine import VllmEngine

        return VllmEngine(
            spec.student, spec.rollout, spec.max_model_len, spec.eos_ids, spec.sampled_ids, spec.num_adapters
        )
    from raydistill.actors.hf_engine import HfEngine

    return HfEngine(spec.student, spec.eos_ids, spec.sampled_ids)
