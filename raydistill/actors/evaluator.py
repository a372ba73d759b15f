"""The evaluation actor: scores held-out rows beside training, and writes checkpoints' exports.

It holds the student as transformers computes it (the trainer's own function) and for each run the teacher's answers for
the held-out rows, scored once at its start. `evaluate` takes the same weight versions as the rollout actors load.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from raydistill.config import ObjectiveSection
from raydistill.errors import StorageError, disk_errors
from raydistill.evaluate.generate import greedy_completions, match_answers
from raydistill.evaluate.held_out import score_targets
from raydistill.merge import split_scored
from raydistill.messages import EvalReport, Exported, Samples, Scored, Span, StudentWeights, TokenRows
from raydistill.models import StudentSpec, build_student, default_device
from raydistill.quant.export import export_live
from raydistill.quant.student import load_adapter_state
from raydistill.recovery.bring import put_folder
from raydistill.recovery.checkpoint import digests, load_checkpoint
from raydistill.recovery.storage import Storage
from raydistill.recovery.stored import make_whole
from raydistill.tensors import CompletionModel

EVAL_BATCH = 64  # sequences of one forward pass
"""Held-out rows are scored without gradients, so memory is that of one forward pass."""


@dataclass(kw_only=True)
class _Run:
    """What is kept for one run."""

    spec: StudentSpec
    objective: ObjectiveSection
    held_out: list[Scored] = field(default_factory=list)


class EvaluatorActor:
    """One student under evaluation at a time. `start` and `hold_out` for each run, then `evaluate` for each version."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._runs: dict[str, _Run] = {}
        self._spec: StudentSpec | None = None  # of the student that is built
        self._tokenizers: dict[str, Any] = {}

    def start(self, run: str, spec: StudentSpec, objective: ObjectiveSection) -> None:
        """Build the student of a run."""
        self._runs[run] = _Run(spec=spec, objective=objective)
        self._build(spec)

    def end(self, run: str) -> None:
        """Forget a run."""
        self._runs.pop(run, None)

    def hold_out(self, run: str, *scored: Scored) -> int:
        """Keep the teacher's answers on a run's held-out references; returns their completion tokens."""
        self._runs[run].held_out = split_scored(scored, EVAL_BATCH) if scored else []
        return sum(s.samples.completions.num_tokens for s in scored)

    def _build(self, spec: StudentSpec) -> None:
        """The student of `spec`, unless it is there: each evaluation loads its own weights."""
        if self._spec != spec:
            self._spec = None
            self._model = build_student(spec, default_device()).eval()
            self._completions = CompletionModel(self._model)
            self._spec = spec

    def _load(self, run: _Run, weights: StudentWeights) -> None:
        self._build(run.spec)
        load_adapter_state(self._model, {k: torch.from_numpy(v.copy()) for k, v in weights.tensors.items()})

    @torch.inference_mode()
    def evaluate(self, run: str, weights: StudentWeights, references: Samples | None, *answers: Samples) -> EvalReport:
        """KL to the teacher and perplexity of one version on the references; exact match of `answers`, its greedy
        completions, if given. Answers that other weights wrote are counted, and none is matched then."""
        start, of_run = time.time(), self._runs[run]
        self._load(of_run, weights)
        metrics: dict[str, float] = {}
        if of_run.held_out:
            metrics |= self._divergence_and_perplexity(of_run)
        stale = sum(version != weights.version for part in answers for version in part.policy_versions)
        if answers and references is not None and not stale:
            metrics |= self._exact_match(references, answers)
        span = Span(stage="evaluate", actor=self._name, step=weights.version, start_s=start, end_s=time.time())
        return EvalReport(version=weights.version, metrics=metrics, span=span, stale_answers=stale)

    def _divergence_and_perplexity(self, run: _Run) -> dict[str, float]:
        score = score_targets(self._completions, run.held_out, run.objective.temperature)
        metrics = {"evaluate/perplexity": score.perplexity}
        if score.kl_nats is not None:
            metrics["evaluate/kl_nats"] = score.kl_nats
        return metrics

    def _exact_match(self, references: Samples, answers: tuple[Samples, ...]) -> dict[str, float]:
        assert self._spec is not None
        tokenizer = self._tokenizers.get(self._spec.model)
        if tokenizer is None:
            from transformers import AutoTokenizer

            tokenizer = self._tokenizers[self._spec.model] = AutoTokenizer.from_pretrained(self._spec.model)
        truth = dict(zip(references.indices, references.completions.rows(), strict=True))
        pairs = (
            (ids, truth[index])
            for part in answers
            for index, ids in zip(part.indices, part.completions.rows(), strict=True)
            if index in truth
        )
        score = match_answers(pairs, tokenizer)
        return {"evaluate/exact_match": score.share, "evaluate/exact_match_se": score.standard_error}

    def answer(
        self, run: str, weights: StudentWeights, prompts: TokenRows, eos_ids: Sequence[int], max_new_tokens: int
    ) -> list[list[int]]:
        """Greedy completions of a few prompts by one version."""
        self._load(self._runs[run], weights)
        return greedy_completions(self._model, prompts.rows(), eos_ids, max_new_tokens)

    def export_checkpoint(
        self, run: str, checkpoint: Path, folder: Path, extra: dict[str, Any], storage: Storage | None = None
    ) -> Exported:
        """Write a run's checkpoint as a folder that stands alone. storage: the run's folder in run.storage, where the
        checkpoint comes from if it does not lie here, and the export goes. RunError where the disk is full."""
        of_run = self._runs[run]
        make_whole(checkpoint, storage)
        self._load(of_run, load_checkpoint(checkpoint))
        with disk_errors(f"the export to {folder}", SafetensorError):
            codes_hash = export_live(folder, self._model, of_run.spec.model, extra)
        if storage is None:
            return Exported(codes_hash=codes_hash)
        problem = None
        try:
            put_folder(folder, storage.below(folder.name))
        except StorageError as error:
            problem = str(error)
        return Exported(codes_hash=codes_hash, files=digests(folder), storage_problem=problem)
