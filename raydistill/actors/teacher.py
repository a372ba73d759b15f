"""The teacher actor: a frozen transformers model that answers with log-probs at completion positions only."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from raydistill.actors.kept_answers import Answer, KeptAnswers, answer_key
from raydistill.config import ObjectiveSection, TeacherSection
from raydistill.data.collate import micro_batches
from raydistill.evaluate.generate import greedy_completions
from raydistill.messages import (
    REFERENCE_VERSION,
    Metric,
    Samples,
    Scored,
    Span,
    StageReport,
    TeacherDense,
    TeacherTarget,
    TeacherTopK,
    TokenRows,
)
from raydistill.models import default_device, free_gpu_memory, load_causal_lm, memory_to_fill
from raydistill.tensors import CompletionModel, SequenceBatch

LOGITS_ROWS = 4096  # completion positions per full-vocabulary block: 2.5 GB of float32 at V = 152k


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherRequest:
    """What a run wants to know of each completion token."""

    target: Literal["top_k", "dense"]
    top_k: int
    temperature: float
    vocab_size: int  # ids that mean something; rows of the head above are padding and cut

    @classmethod
    def of(cls, objective: ObjectiveSection, vocab_size: int) -> TeacherRequest:
        k = objective.top_k if objective.target == "top_k" else 0
        return cls(target=objective.target, top_k=k, temperature=objective.temperature, vocab_size=vocab_size)


class TeacherActor:
    """One copy of the teacher, on one device or spread over the GPUs that the actor booked. `start` loads it, `score`
    answers any run's request; calls run one after another."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._model: CompletionModel | None = None
        self._held: TeacherSection | None = None
        self._kept = KeptAnswers(0)
        self._computed_rows = self._kept_rows = 0

    def start(self, section: TeacherSection) -> str:
        """Load the teacher, unless it is held already. Returns the class name."""
        if self._model is None or self._held != section:
            self._device = default_device()
            self._model, self._held = None, section  # two teachers at once may not fit
            self._kept = KeptAnswers(int(section.cache_gib * 2**30))
            bounds = memory_to_fill(section.num_gpus, free_gpu_memory())
            self._model = CompletionModel(load_causal_lm(section, "teacher.model", self._device, bounds))
            self._model.check_head("teacher.model", self._device)
        return type(self._model.model).__name__

    def score(self, samples: Samples, request: TeacherRequest) -> tuple[StageReport, Scored]:
        """The teacher's answer for every completion token of `samples`, in order."""
        start, kept_before = time.time(), self._kept_rows
        scored = Scored(samples=samples, target=self._target(samples, request))
        span = Span(stage="teacher", actor=self._name, step=samples.step, start_s=start, end_s=time.time())
        metrics: tuple[Metric, ...] = ()
        if self._held is not None and self._held.cache_gib > 0:
            kept = float(self._kept_rows - kept_before)
            metrics = (Metric(name="teacher/kept_fraction", total=kept, weight=float(len(samples))),)
        tokens = samples.completions.num_tokens
        report = StageReport(
            step=samples.step, num_sequences=len(samples), num_tokens=tokens, metrics=metrics, span=span
        )
        return report, scored

    def answer(self, prompts: TokenRows, eos_ids: Sequence[int], max_new_tokens: int) -> list[list[int]]:
        """Greedy completions of a few prompts."""
        assert self._model is not None
        return greedy_completions(self._model.model, prompts.rows(), eos_ids, max_new_tokens)

    def counts(self) -> dict[str, int]:
        """Rows computed and rows answered from those kept, since this actor started."""
        return {"computed_rows": self._computed_rows, "kept_rows": self._kept_rows}

    @torch.inference_mode()
    def _target(self, samples: Samples, request: TeacherRequest) -> TeacherTarget:
        answers = self._answers(samples, request)
        columns = [np.concatenate(column) for column in zip(*answers, strict=True)]
        if request.target == "dense":
            return TeacherDense(logprobs_NV=columns[0])
        return TeacherTopK(ids_NK=columns[0], logprobs_NK=columns[1], tail_logprob_N=columns[2])

    def _answers(self, samples: Samples, request: TeacherRequest) -> list[Answer]:
        """One answer for each row. Rows of the data set may be asked for again, what a student wrote will not."""
        assert self._held is not None
        prompts, completions = samples.prompts.rows(), samples.completions.rows()
        keys: list[bytes | None] = [
            answer_key(request, prompt, completion)
            if version == REFERENCE_VERSION and self._held.cache_gib > 0
            else None
            for prompt, completion, version in zip(prompts, completions, samples.policy_versions, strict=True)
        ]
        answers: list[Answer | None] = [None if key is None else self._kept.get(key) for key in keys]
        missing = [row for row, answer in enumerate(answers) if answer is None]
        self._computed_rows += len(missing)
        self._kept_rows += len(keys) - len(missing)
        lengths = [prompts[row].size + completions[row].size for row in missing]
        for chunk in micro_batches(lengths, self._held.batch_tokens):
            rows = [missing[place] for place in chunk]
            arrays = self._answer(samples.take(rows), request)
            ends = np.cumsum([completions[row].size for row in rows])[:-1]
            for row, *parts in zip(rows, *(np.split(a, ends) for a in arrays), strict=True):
                answers[row] = tuple(parts)
                if (key := keys[row]) is not None:
                    self._kept.put(key, tuple(parts))
        return answers  # type: ignore[return-value]

    def _answer(self, samples: Samples, request: TeacherRequest) -> Answer:
        assert self._model is not None
        hidden_NH = self._model.hidden(SequenceBatch.of_samples(samples, self._device))
        blocks = [_reduce(self._logprobs(block, request), request) for block in hidden_NH.split(LOGITS_ROWS)]
        return tuple(torch.cat(parts).cpu().numpy() for parts in zip(*blocks, strict=True))

    def _logprobs(self, hidden_NH: Tensor, request: TeacherRequest) -> Tensor:
        assert self._model is not None
        logits_NV = self._model.logits(hidden_NH)[:, : request.vocab_size].float()
        return torch.log_softmax(logits_NV / request.temperature, dim=-1)


def _reduce(logprobs_NV: Tensor, request: TeacherRequest) -> tuple[Tensor, ...]:
    if request.target == "dense":
        return (logprobs_NV,)
    return top_k_with_tail(logprobs_NV, min(request.top_k, logprobs_NV.shape[1]))


def top_k_with_tail(logprobs_NV: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [N,K] int32, log-probs [N,K] float32 high to low, log of the mass of all others [N]).

    The tail is the logsumexp of the tokens left out, not log(1 - sum of the top), which cancels for a peaked teacher;
    -inf where K == V.
    """
    top, ids = logprobs_NV.topk(k, dim=-1)
    tail = logprobs_NV.scatter(-1, ids, float("-inf")).logsumexp(-1)
    return ids.int(), top, tail
