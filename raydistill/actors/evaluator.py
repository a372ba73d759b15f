"""The evaluation actor: scores held-out rows beside training, and writes checkpoints' exports.

It holds the student as transformers computes it (the trainer's own function) and the teacher's answers for the held-out
rows, scored once at the start of the run. `evaluate` takes the same weight versions as the rollout actors load.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from raydistill.config import ObjectiveSection
from raydistill.evaluate.generate import match_answers
from raydistill.evaluate.held_out import score_targets
from raydistill.merge import split_scored
from raydistill.messages import EvalReport, Samples, Scored, Span, StudentWeights
from raydistill.models import StudentSpec, build_student, default_device
from raydistill.quant.export import export_live
from raydistill.quant.student import load_adapter_state
from raydistill.recovery.checkpoint import load_checkpoint
from raydistill.tensors import CompletionModel

EVAL_BATCH = 64  # sequences of one forward pass
"""Held-out rows are scored without gradients, so memory is that of one forward pass."""


class EvaluatorActor:
    """One student under evaluation. `start` and `hold_out` for each run, then `evaluate` for each version."""

    def __init__(self, name: str) -> None:
        self._name = name

    def start(self, spec: StudentSpec, objective: ObjectiveSection) -> None:
        """Build the student at version 0."""
        self._spec, self._objective = spec, objective
        self._device = default_device()
        self._model = build_student(spec, self._device).eval()
        self._completions = CompletionModel(self._model)
        self._version = 0
        self._tokenizer: Any = None
        self._held_out: list[Scored] = []

    def hold_out(self, *scored: Scored) -> int:
        """Keep the teacher's answers on the held-out references; returns their completion tokens."""
        self._held_out = split_scored(scored, EVAL_BATCH) if scored else []
        return sum(s.samples.completions.num_tokens for s in scored)

    def _load(self, weights: StudentWeights) -> None:
        load_adapter_state(self._model, {k: torch.from_numpy(v.copy()) for k, v in weights.tensors.items()})
        self._version = weights.version

    @torch.inference_mode()
    def evaluate(self, weights: StudentWeights, references: Samples | None, *answers: Samples) -> EvalReport:
        """KL to the teacher and perplexity of one version on the references; exact match of `answers`, its greedy
        completions, if given."""
        start = time.time()
        self._load(weights)
        metrics: dict[str, float] = {}
        if self._held_out:
            metrics |= self._divergence_and_perplexity()
        if answers and references is not None:
            metrics |= self._exact_match(references, answers)
        span = Span(stage="evaluate", actor=self._name, step=self._version, start_s=start, end_s=time.time())
        return EvalReport(version=self._version, metrics=metrics, span=span)

    def _divergence_and_perplexity(self) -> dict[str, float]:
        score = score_targets(self._completions, self._held_out, self._objective.temperature)
        metrics = {"evaluate/perplexity": score.perplexity}
        if score.kl_nats is not None:
            metrics["evaluate/kl_nats"] = score.kl_nats
        return metrics

    def _exact_match(self, references: Samples, answers: tuple[Samples, ...]) -> dict[str, float]:
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(self._spec.model)
        truth = dict(zip(references.indices, references.completions.rows(), strict=True))
        pairs = (
            (ids, truth[index])
            for part in answers
            for index, ids in zip(part.indices, part.completions.rows(), strict=True)
            if index in truth
        )
        score = match_answers(pairs, self._tokenizer)
        return {"evaluate/exact_match": score.share, "evaluate/exact_match_se": score.standard_error}

    def export_checkpoint(self, checkpoint: Path, folder: Path, extra: dict[str, Any]) -> str:
        """Write a checkpoint as a folder that stands alone; returns the hash of its codes."""
        self._load(load_checkpoint(checkpoint))
        return export_live(folder, self._model, self._spec.model, extra)
