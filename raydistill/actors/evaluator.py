"""The evaluation actor: scores held-out rows beside training, and writes checkpoints' exports.

It holds the student as transformers computes it (the trainer's own function) and the teacher's answers for the held-out
rows, scored once at the start of the run. `load` takes the same weight versions as the rollout actors do.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raydistill.checkpoint import load_checkpoint
from raydistill.config import ObjectiveSection
from raydistill.demo.answers import exact_match
from raydistill.losses.divergence import generalized_jsd
from raydistill.losses.targets import TREATMENTS, dense_classes
from raydistill.merge import split_scored
from raydistill.messages import EvalReport, Samples, Scored, Span, StudentWeights, TeacherDense, TeacherTarget
from raydistill.models import StudentSpec, build_student, default_device
from raydistill.quant.export import export_live
from raydistill.quant.student import load_adapter_state
from raydistill.tensors import CompletionModel, SequenceBatch, target_tensors

EVAL_BATCH = 64  # sequences of one forward pass
"""Held-out rows are scored without gradients, so memory is that of one forward pass."""


class EvaluatorActor:
    """One student under evaluation. `start` once, then `load` and `evaluate` for each version."""

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

    def load(self, weights: StudentWeights) -> int:
        """Hold this version from now on."""
        load_adapter_state(self._model, {k: torch.from_numpy(v.copy()) for k, v in weights.tensors.items()})
        self._version = weights.version
        return weights.version

    @torch.inference_mode()
    def evaluate(self, references: Samples | None, *answers: Samples) -> EvalReport:
        """KL to the teacher and perplexity on the references; exact match of `answers`, greedy completions, if given."""
        start = time.time()
        metrics: dict[str, float] = {}
        if self._held_out:
            metrics |= self._divergence_and_perplexity()
        if answers and references is not None:
            metrics |= self._exact_match(references, answers)
        span = Span(stage="evaluate", actor=self._name, step=self._version, start_s=start, end_s=time.time())
        return EvalReport(version=self._version, metrics=metrics, span=span)

    def _divergence_and_perplexity(self) -> dict[str, float]:
        kl_sum = ce_sum = 0.0
        count = 0
        for batch in self._held_out:
            logits_NV = self._completions(SequenceBatch.of_samples(batch.samples, self._device))
            ids_N = torch.from_numpy(batch.samples.completions.ids_T.copy()).long().to(self._device)
            ce_sum += float(torch.nn.functional.cross_entropy(logits_NV.float(), ids_N, reduction="sum"))
            if batch.target is not None:
                kl_sum += float(self._kl(logits_NV, batch.target).sum())
            count += ids_N.numel()
        metrics = {"evaluate/perplexity": math.exp(min(ce_sum / count, 80.0))}
        if any(s.target is not None for s in self._held_out):
            metrics["evaluate/kl_nats"] = kl_sum / count
        return metrics

    def _kl(self, logits_NV: torch.Tensor, target: TeacherTarget) -> torch.Tensor:
        """Forward KL(teacher || student), whatever the training objective: the number that compares runs."""
        tensors = target_tensors(target, self._device)
        if isinstance(target, TeacherDense):
            classes = dense_classes(logits_NV, tensors.logprobs_NV, self._objective.temperature)
        else:
            classes = TREATMENTS["tail"](logits_NV, tensors, self._objective.temperature)
        return generalized_jsd(*classes, 0.0)

    def _exact_match(self, references: Samples, answers: tuple[Samples, ...]) -> dict[str, float]:
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(self._spec.model)
        truth = dict(zip(references.indices, references.completions.rows(), strict=True))
        hits = [
            exact_match(self._decode(ids), self._decode(truth[index]))
            for part in answers
            for index, ids in zip(part.indices, part.completions.rows(), strict=True)
            if index in truth
        ]
        share = float(np.mean(hits))
        return {
            "evaluate/exact_match": share,
            "evaluate/exact_match_se": math.sqrt(share * (1 - share) / len(hits)),
        }

    def _decode(self, ids: np.ndarray) -> str:
        return str(self._tokenizer.decode(ids.tolist(), skip_special_tokens=True))

    def export_checkpoint(self, checkpoint: Path, folder: Path, extra: dict[str, Any]) -> str:
        """Write a checkpoint as a folder that stands alone; returns the hash of its codes."""
        self.load(load_checkpoint(checkpoint))
        return export_live(folder, self._model, self._spec.model, extra)
