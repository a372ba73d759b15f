"""What each Ray Train worker runs: lease a step's parts, train on them, report, publish.

Rank 0 talks to the feed for all (outcomes, weights); every rank leases its own parts, so a rank fetches only the tokens
it trains on. All waits have a time limit.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from raydistill.checkpoint import save_checkpoint
from raydistill.config import Config
from raydistill.losses.objective import Objective
from raydistill.merge import split_scored
from raydistill.messages import (
    REFERENCE_VERSION,
    ProbeAnswers,
    Scored,
    Span,
    StepOutcome,
    StudentWeights,
    TokenRows,
    reduce_metrics,
)
from raydistill.models import StudentSpec, build_student
from raydistill.quant.hashing import hash_codes, hash_tensors
from raydistill.quant.student import student_codes
from raydistill.tensors import CompletionModel, score_rows
from raydistill.trainer.deepspeed_engine import DeepSpeedEngine
from raydistill.trainer.step import Ranks, run_step


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerJob:
    """What the driver hands to every worker."""

    config: Config
    probes: TokenRows
    feed: Any  # actor handle
    run_folder: Path


def train(job: TrainerJob) -> None:
    """The whole life of one rank."""
    import ray.train

    context = ray.train.get_context()
    TrainerRank(job, context.get_world_rank(), context.get_world_size()).run()
    ray.train.report({"steps": job.config.trainer.num_steps})


class TrainerRank:
    """One rank's model, engine and loop."""

    def __init__(self, job: TrainerJob, rank: int, world_size: int) -> None:
        config = job.config
        torch.manual_seed(config.run.seed)  # the adapter's A starts the same on every rank
        self._job, self._config, self._rank = job, config, rank
        self._device = "cuda" if config.trainer.num_gpus > 0 else "cpu"
        self._spec = StudentSpec.of(config)
        student = build_student(self._spec, self._device)
        if config.trainer.gradient_checkpointing:
            # Recomputation needs a gradient at the embeddings' output, although they are frozen.
            student.enable_input_require_grads()
            student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._model = CompletionModel(student)
        self._model.eval().check_head("student.model")
        self._engine = DeepSpeedEngine(self._model, config.trainer, config.student.dtype)
        self._ranks = Ranks(world_size=world_size, sum=self._sum_over_ranks)
        o = config.objective
        self._objective = Objective(
            beta=o.beta,
            scale=o.scale,
            temperature=o.temperature,
            treatment=o.treatment,
            distill_weight=o.distill_weight,
            ce_weight=o.ce_weight,
        )

    def run(self) -> None:
        """Version 0 goes out first: the engines start from the same weights the trainer does."""
        version, skipped = 0, 0
        weights_hash, codes_hash = self._publish(version)
        self._report_start(weights_hash, codes_hash)
        for step in range(self._config.trainer.num_steps):
            wait_start = time.time()
            micro_batches = self._lease(step)
            self._check_staleness(micro_batches, version)
            start = time.time()
            self._model.train()
            learning_rate = self._engine.learning_rate
            done = run_step(self._engine, self._objective, micro_batches, version, self._ranks, self._device)
            skipped += done.skipped is not None
            version += 1
            trained = time.time()
            weights_hash, codes_hash = self._publish(version)
            if self._rank == 0:
                metrics = reduce_metrics(done.metrics) | {
                    "trainer/learning_rate": learning_rate,
                    "trainer/skipped_steps": float(skipped),
                    "trainer/wait_s": start - wait_start,
                    "trainer/busy_s": trained - start,
                    "trainer/publish_s": time.time() - trained,
                }
                outcome = StepOutcome(
                    step=step,
                    version=version,
                    weights_hash=weights_hash,
                    codes_hash=codes_hash,
                    skipped=done.skipped,
                    metrics=metrics,
                    spans=(self._span("wait", step, wait_start, start), self._span("trainer", step, start, trained)),
                )
                self._ask(self._job.feed.report.remote(outcome))

    def _lease(self, step: int) -> list[Scored]:
        refs = self._ask(self._job.feed.lease.remote(step, self._rank))
        parts = ray.get(refs, timeout=self._config.trainer.timeout_s)
        return split_scored(parts, self._config.trainer.sequences_per_micro_batch)

    def _check_staleness(self, micro_batches: list[Scored], version: int) -> None:
        versions = [v for m in micro_batches for v in m.samples.policy_versions if v != REFERENCE_VERSION]
        oldest = min(versions, default=version)
        assert version - oldest <= self._config.sync.max_staleness, f"version {oldest} reached the trainer at {version}"

    def _publish(self, version: int) -> tuple[str, str | None]:
        """Send version `version` to the feed if anyone needs it; checkpoint it if it will be evaluated."""
        config = self._config
        if not config.publishes(version):
            return "", None
        state = self._engine.adapter_state()
        self._model.eval()
        # Before whole_model: ZeRO-3 fetches for a forward by itself, and lets go of everything afterwards.
        probe = ProbeAnswers(logprobs_N=score_rows(self._model, self._job.probes, self._device))
        with self._engine.whole_model():
            codes = student_codes(self._model.model) if config.checks_codes(version) else {}
        if self._rank != 0:
            return "", None
        tensors = {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in state.items()}
        weights = StudentWeights(version=version, tensors=tensors, probe=probe)
        weights_hash, codes_hash = hash_tensors(state), hash_codes(codes) if codes else None
        if config.evaluates(version):
            description = {"weights_hash": weights_hash, "codes_hash": codes_hash}
            save_checkpoint(self._job.run_folder / "checkpoints", weights, description)
        self._ask(self._job.feed.publish.remote(weights))
        return weights_hash, codes_hash

    def _report_start(self, weights_hash: str, codes_hash: str | None) -> None:
        if self._rank == 0:
            outcome = StepOutcome(
                step=-1, version=0, weights_hash=weights_hash, codes_hash=codes_hash, skipped=None, metrics={}, spans=()
            )
            self._ask(self._job.feed.report.remote(outcome))

    def _ask(self, ref: Any) -> Any:
        return ray.get(ref, timeout=self._config.trainer.timeout_s)

    def _span(self, stage: Any, step: int, start_s: float, end_s: float) -> Span:
        return Span(stage=stage, actor=f"trainer-{self._rank}", step=step, start_s=start_s, end_s=end_s)

    def _sum_over_ranks(self, vector: torch.Tensor) -> torch.Tensor:
        if self._ranks.world_size == 1:
            return vector
        total = vector.to(self._device)
        torch.distributed.all_reduce(total)
        return total.cpu()
