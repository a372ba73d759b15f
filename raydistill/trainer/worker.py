"""What each Ray Train worker runs: lease a step's parts, train on them, report, publish.

Rank 0 talks to the feed for all (outcomes, weights); every rank leases its own parts, so a rank fetches only the tokens
it trains on. All waits have a time limit.
"""

from __future__ import annotations

import gc
import time
from contextlib import suppress
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import GetTimeoutError

from raydistill.errors import RunError, UserError
from raydistill.losses.objective import Objective
from raydistill.merge import split_scored
from raydistill.messages import (
    REFERENCE_VERSION,
    ProbeAnswers,
    Scored,
    Span,
    StepOutcome,
    StudentWeights,
    reduce_metrics,
)
from raydistill.models import StudentSpec, build_student
from raydistill.processes import this_process
from raydistill.quant.hashing import hash_tensors
from raydistill.recovery.checkpoint import CHECKPOINTS, read_description, version_of
from raydistill.recovery.ledger import Ledger
from raydistill.recovery.mirror import Mirror
from raydistill.recovery.resume import run_storage
from raydistill.recovery.sampled import SampledTokens
from raydistill.tensors import CompletionModel, score_rows
from raydistill.trainer.deepspeed_engine import DeepSpeedEngine
from raydistill.trainer.job import TrainerJob
from raydistill.trainer.save import load_rank, save_rank
from raydistill.trainer.step import Ranks, run_step
from raydistill.trainer.uploads import RankUploads

JOIN_TIMEOUT_S = 60.0
UPLOAD_SHARE = 0.5  # of trainer.timeout_s, for the uploads of one checkpoint: its step is not to count as lost
LONGEST_UPLOAD_S = 900.0  # the ranks wait for one another, and torch gives up on that after half an hour
Collected = tuple[StudentWeights | None, tuple[str, str | None]]
"""A version's whole trained state and its (weights hash, codes hash); (None, ("", None)) on other ranks than 0."""


def serve(feed: Any) -> None:
    """The whole life of one rank: one job after another."""
    import ray.train

    context = ray.train.get_context()
    rank, number = context.get_world_rank(), 0
    ray.get(feed.join.remote(this_process(f"trainer-{rank}")), timeout=JOIN_TIMEOUT_S)
    while (job := ray.get(feed.next_job.remote(number))) is not None:  # an idle crew waits as long as its driver lives
        train(job, rank, context.get_world_size())
        ray.get(feed.done.remote(number, rank), timeout=JOIN_TIMEOUT_S)
        number += 1
    ray.train.report({"jobs": number})


def train(job: TrainerJob, rank: int, world_size: int) -> None:
    """One job; its model and optimizer are gone when it is over."""
    try:
        TrainerRank(job, rank, world_size).run()
    except (RunError, UserError, AssertionError) as error:  # anything else may be a neighbour's death
        with suppress(ray.exceptions.RayError):  # the feed itself may be what died
            ray.get(job.feed.fail.remote(str(error)), timeout=JOIN_TIMEOUT_S)
        raise
    gc.collect()  # DeepSpeed's engine and its model hold each other
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


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
        self._recent: dict[int, dict[str, float]] = {}  # what a driver that dies may not have written down yet
        self._sampled = SampledTokens(job.run_folder, config)
        self._may_be_unrecorded = config.sync.max_staleness + 2
        self._storage = run_storage(config, job.run_folder)
        self._uploads, self._mirror = None, None
        if self._storage is not None:
            limit_s = min(config.trainer.timeout_s * UPLOAD_SHARE, LONGEST_UPLOAD_S)
            self._uploads = RankUploads(job.run_folder, rank, self._storage, limit_s)
            self._mirror = Mirror(job.run_folder, self._storage, keeps_trying=False)
        self._stored: tuple[int, ...] = ()  # what the next outcome tells
        self._storage_problem: str | None = None
        self._record_ends = 0  # steps before it are in a record that is in the storage, if there is one
        self._ranks = Ranks(world_size=world_size, sum=self._sum_over_ranks)
        o = config.objective
        self._objective = Objective(
            divergence=o.divergence,
            beta=o.beta,
            scale=o.scale,
            temperature=o.temperature,
            treatment=o.treatment,
            distill_weight=o.distill_weight,
            ce_weight=o.ce_weight,
        )

    def run(self) -> None:
        """The first version goes out before anything is trained: the engines start from the trainer's weights."""
        version = self._restore()
        weights_hash, codes_hash = self._hand_out(version)
        self._report_start(version, weights_hash, codes_hash)
        for step in range(version, self._config.trainer.num_steps):
            wait_start = time.time()
            micro_batches = self._lease(step)
            if micro_batches is None:
                self._save(version)
                return
            self._check_staleness(micro_batches, version)
            start = time.time()
            self._model.train()
            learning_rate = self._engine.learning_rate
            done = run_step(self._engine, self._objective, micro_batches, version, self._ranks, self._device)
            if done.skipped is None:
                for micro_batch in micro_batches:
                    self._ledger.add(micro_batch.samples)
            self._skipped += done.skipped is not None
            version += 1
            trained = time.time()
            metrics = reduce_metrics(done.metrics) | {"trainer/learning_rate": learning_rate}
            self._recent[step] = metrics | {"trainer/skipped_steps": float(self._skipped)}
            weights_hash, codes_hash = self._hand_out(version)
            if self._rank == 0:
                metrics = self._recent[step] | {
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
                    stored=self._stored,
                    storage_problem=self._storage_problem,
                )
                self._stored, self._storage_problem = (), None
                self._ask(self._job.feed.report.remote(outcome))
        if self._uploads is not None and self._uploads.waits:
            self._uploads.bring()  # the driver looks what is there when every rank is done

    def _restore(self) -> int:
        """Take up the job's checkpoint, or start at version 0."""
        folder = self._job.resume_from
        if folder is None:
            self._skipped, self._saved = 0, -1
            self._ledger = Ledger(self._job.run_folder, self._rank)
            return 0
        self._ledger = load_rank(folder, self._job.run_folder, self._rank, self._engine, self._storage)
        self._saved = self._record_ends = version_of(folder)
        self._skipped = int(read_description(folder)["skipped_steps"])
        return self._saved

    def _lease(self, step: int) -> list[Scored] | None:
        """This rank's micro-batches of one step; None if the run is to stop before it."""
        refs = self._wait_for_parts(step)
        if refs is None:
            return None
        parts = ray.get(refs, timeout=self._config.trainer.timeout_s)
        kept = self._sampled.keep(step, self._rank, [part.samples for part in parts])
        if kept is not None and self._mirror is not None:
            self._mirror.push(kept)
        return split_scored(parts, self._config.trainer.sequences_per_micro_batch)

    def _wait_for_parts(self, step: int) -> list[Any] | None:
        """As long as it takes to make them, as long as the feed lives: the actors that make them have limits of their own."""
        lease = self._job.feed.lease.remote(step, self._rank)
        while True:
            try:
                refs: list[Any] | None = self._ask(lease)
                return refs
            except GetTimeoutError:
                self._ask(self._job.feed.fatal.remote())

    def _check_staleness(self, micro_batches: list[Scored], version: int) -> None:
        versions = [v for m in micro_batches for v in m.samples.policy_versions if v != REFERENCE_VERSION]
        oldest = min(versions, default=version)
        assert version - oldest <= self._config.sync.max_staleness, f"version {oldest} reached the trainer at {version}"

    def _hand_out(self, version: int) -> tuple[str, str | None]:
        """Checkpoint a version and send it to the feed, where the config wants that; returns its hashes, on rank 0."""
        config = self._config
        if not config.publishes(version) and not config.saves(version):
            return "", None
        collected = self._collect(version)
        if config.saves(version):
            self._save(version, collected)
        weights, hashes = collected
        if weights is not None and config.publishes(version):
            self._ask(self._job.feed.publish.remote(weights))
        return hashes

    def _collect(self, version: int) -> Collected:
        """On rank 0 the whole trained state with its probe answers, and its hashes; every rank takes part."""
        state = self._engine.adapter_state()
        self._model.eval()
        probe = ProbeAnswers(logprobs_N=score_rows(self._model, self._job.probes, self._device))
        codes_hash = self._engine.codes_hash(self._rank) if self._config.checks_codes(version) else None
        if self._rank != 0:
            return None, ("", None)
        tensors = {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in state.items()}
        weights = StudentWeights(version=version, tensors=tensors, probe=probe)
        return weights, (hash_tensors(state), codes_hash)

    def _save(self, version: int, collected: Collected | None = None) -> None:
        """Checkpoint a version, unless it lies there already."""
        if version == self._saved:
            return
        weights, (weights_hash, codes_hash) = collected or self._collect(version)
        unrecorded = version if self._uploads is None else self._record_ends
        self._recent = {step: m for step, m in self._recent.items() if step >= unrecorded - self._may_be_unrecorded}
        description = {
            "weights_hash": weights_hash,
            "codes_hash": codes_hash,
            "skipped_steps": self._skipped,
            "world_size": self._ranks.world_size,
            "steps": self._recent,
            "config": self._config.model_dump(mode="json"),
        }
        root = self._job.run_folder / CHECKPOINTS
        has_storage = self._uploads is not None
        save_rank(root, version, self._rank, self._engine, self._ledger, weights, description, has_storage)
        before, self._saved = self._saved, version
        if self._uploads is not None:
            stored, self._storage_problem = self._uploads.bring(version)
            self._stored += stored
            if stored:
                self._record_ends = max(before, 0)  # the driver sent it when it heard of the version before

    def _report_start(self, version: int, weights_hash: str, codes_hash: str | None) -> None:
        if self._rank == 0:
            outcome = StepOutcome(
                step=-1,
                version=version,
                weights_hash=weights_hash,
                codes_hash=codes_hash,
                skipped=None,
                metrics={},
                spans=(),
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
