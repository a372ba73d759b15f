"""The teacher actor: a frozen transformers model that answers with log-probs at completion positions only."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

from raydistill.config import ObjectiveSection, TeacherSection
from raydistill.data.collate import micro_batches
from raydistill.messages import Samples, Scored, Span, StageReport, TeacherDense, TeacherTarget, TeacherTopK
from raydistill.models import default_device, free_gpu_memory, load_causal_lm, memory_to_fill
from raydistill.tensors import CompletionModel, SequenceBatch

LOGITS_ROWS = 4096  # completion positions per full-vocabulary block: 2.5 GB of float32 at V = 152k


class TeacherActor:
    """One copy of the teacher, on one device or spread over the GPUs that the actor booked. `start` loads it, `score`
    answers; calls run one after another."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._model: CompletionModel | None = None
        self._held: TeacherSection | None = None

    def start(self, section: TeacherSection, objective: ObjectiveSection, vocab_size: int) -> str:
        """Load the teacher, unless it is held already. `vocab_size`: ids that mean something; rows above are padding and cut.

        Returns the class name.
        """
        self._device = default_device()
        self._section, self._objective, self._vocab_size = section, objective, vocab_size
        if self._model is None or self._held != section:
            self._model, self._held = None, section  # two teachers at once may not fit
            bounds = memory_to_fill(section.num_gpus, free_gpu_memory())
            self._model = CompletionModel(load_causal_lm(section, "teacher.model", self._device, bounds))
            self._model.check_head("teacher.model", self._device)
        return type(self._model.model).__name__

    def score(self, samples: Samples) -> tuple[StageReport, Scored]:
        """The teacher's answer for every completion token of `samples`, in order."""
        start = time.time()
        scored = Scored(samples=samples, target=self._target(samples))
        span = Span(stage="teacher", actor=self._name, step=samples.step, start_s=start, end_s=time.time())
        tokens = samples.completions.num_tokens
        return StageReport(step=samples.step, num_sequences=len(samples), num_tokens=tokens, span=span), scored

    @torch.inference_mode()
    def _target(self, samples: Samples) -> TeacherTarget:
        prompts, completions = samples.prompts.rows(), samples.completions.rows()
        lengths = [p.size + c.size for p, c in zip(prompts, completions, strict=True)]
        answers: list[tuple[np.ndarray, ...] | None] = [None] * len(lengths)
        for chunk in micro_batches(lengths, self._section.batch_tokens):
            arrays = self._answer(samples.take(chunk))
            ends = np.cumsum([completions[i].size for i in chunk])[:-1]
            for i, *parts in zip(chunk, *(np.split(a, ends) for a in arrays), strict=True):
                answers[i] = tuple(parts)
        columns = [np.concatenate(column) for column in zip(*answers, strict=True)]  # type: ignore[arg-type]
        if self._objective.target == "dense":
            return TeacherDense(logprobs_NV=columns[0])
        return TeacherTopK(ids_NK=columns[0], logprobs_NK=columns[1], tail_logprob_N=columns[2])

    def _answer(self, samples: Samples) -> tuple[np.ndarray, ...]:
        assert self._model is not None
        hidden_NH = self._model.hidden(SequenceBatch.of_samples(samples, self._device))
        blocks = [self._reduce(self._logprobs(block)) for block in hidden_NH.split(LOGITS_ROWS)]
        return tuple(torch.cat(parts).cpu().numpy() for parts in zip(*blocks, strict=True))

    def _logprobs(self, hidden_NH: Tensor) -> Tensor:
        assert self._model is not None
        logits_NV = self._model.logits(hidden_NH)[:, : self._vocab_size].float()
        return torch.log_softmax(logits_NV / self._objective.temperature, dim=-1)

    def _reduce(self, logprobs_NV: Tensor) -> tuple[Tensor, ...]:
        if self._objective.target == "dense":
            return (logprobs_NV,)
        return top_k_with_tail(logprobs_NV, min(self._objective.top_k, logprobs_NV.shape[1]))


def top_k_with_tail(logprobs_NV: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [N,K] int32, log-probs [N,K] float32 high to low, log of the mass of all others [N]).

    The tail is the logsumexp of the tokens left out, not log(1 - sum of the top), which cancels for a peaked teacher;
    -inf where K == V.
    """
    top, ids = logprobs_NV.topk(k, dim=-1)
    tail = logprobs_NV.scatter(-1, ids, float("-inf")).logsumexp(-1)
    return ids.int(), top, tail
