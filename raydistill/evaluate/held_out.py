"""Forward KL to the teacher and cross-entropy on held-out completions, as sums over tokens that add up exactly.

The teacher's answers come in one of two forms. A teacher actor sends `TeacherTarget` messages, dense or top-K
(`score_targets`). A teacher in the same process leaves its final hidden states (`answer_held_out`), from which its head
gives the log-probs of the whole vocabulary a few rows at a time: exact, at a few KB per token (`score_answers`).

Shape letters: R rows, N completion tokens (flattened), H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raydistill.data.collate import micro_batches
from raydistill.data.encode import Example
from raydistill.data.schedule import held_out_references
from raydistill.errors import DataError
from raydistill.evaluate.paired import CROSS_ENTROPY, KL, MOST_NATS, RowValues
from raydistill.losses.divergence import kl
from raydistill.losses.logsumexp import rows_per_chunk
from raydistill.losses.targets import dense_classes, tail_classes
from raydistill.messages import Samples, Scored
from raydistill.tensors import CompletionModel, DenseTensors, SequenceBatch, TopKTensors, target_tensors

BATCH_TOKENS = 4096
"""Tokens (padding counted) of one forward pass; small models on a CPU get slower beyond it, as caches overflow."""

KlOfRows = Callable[[Tensor, slice], Tensor]
_Part = tuple[tuple[int, ...], "RowScores"]  # places of a batch's rows among the examples, and their scores


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutScore:
    """Sums over completion tokens."""

    kl_sum: float | None  # nats; None where no teacher answered
    cross_entropy_sum: float  # nats, of the reference completions
    num_tokens: int

    @property
    def kl_nats(self) -> float | None:
        """KL(teacher || student) per completion token."""
        return None if self.kl_sum is None else self.kl_sum / self.num_tokens

    @property
    def perplexity(self) -> float:
        """Of the reference completions."""
        return math.exp(min(self.cross_entropy_sum / self.num_tokens, MOST_NATS))


@dataclass(frozen=True, slots=True, kw_only=True)
class RowScores:
    """The same for each row on its own, in the order of the examples: sums over the row's completion tokens."""

    row_ids: tuple[str, ...]
    kl_R: np.ndarray | None  # float64, nats; None where no teacher answered
    cross_entropy_R: np.ndarray  # float64, nats
    tokens_R: np.ndarray  # float64

    @property
    def total(self) -> HeldOutScore:
        """Of all rows together."""
        return HeldOutScore(
            kl_sum=None if self.kl_R is None else float(self.kl_R.sum()),
            cross_entropy_sum=float(self.cross_entropy_R.sum()),
            num_tokens=int(self.tokens_R.sum()),
        )

    def values(self) -> dict[str, RowValues]:
        """Each measure by its name, for a paired test."""
        sums = {KL: self.kl_R, CROSS_ENTROPY: self.cross_entropy_R}
        return {
            name: RowValues(row_ids=self.row_ids, values_R=sums_R, weights_R=self.tokens_R)
            for name, sums_R in sums.items()
            if sums_R is not None
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class AnsweredBatch:
    """Some held-out references and the teacher's final hidden state at the position before each completion token."""

    samples: Samples
    hidden_NH: Tensor  # on the host


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherAnswers:
    """What a teacher in this process says about the held-out rows, while the weights of its `head` stay the same."""

    batches: tuple[AnsweredBatch, ...]
    head: Callable[[Tensor], Tensor]  # [N, H] -> [N, V] logits


@torch.inference_mode()
def answer_held_out(
    teacher: CompletionModel, examples: Sequence[Example], batch_tokens: int = BATCH_TOKENS, num_ids: int | None = None
) -> TeacherAnswers:
    """Run the teacher once over the examples that have a reference; DataError if none has.

    num_ids: ids that mean something (`num_known_ids`); the teacher's rows above are cut, as during training. None: all.
    """
    device = next(teacher.parameters()).device
    batches = [
        AnsweredBatch(samples=part, hidden_NH=teacher.hidden(SequenceBatch.of_samples(part, device)).cpu())
        for part in _reference_batches(examples, batch_tokens)
    ]
    return TeacherAnswers(batches=tuple(batches), head=lambda hidden_NH: teacher.logits(hidden_NH)[:, :num_ids])


@torch.inference_mode()
def score_answers(student: CompletionModel, answers: TeacherAnswers, temperature: float = 1.0) -> HeldOutScore:
    """KL over the whole vocabulary, both sides at `temperature`, and cross-entropy of the student (at 1).

    Ids that only one of the two models has are padding: both sides are cut to the shared ones (`dense_classes`).

    Property tested: 0 for the teacher itself, otherwise equal to a float64 sum over all tokens.
    """
    return score_rows(student, answers, temperature).total


@torch.inference_mode()
def score_rows(student: CompletionModel, answers: TeacherAnswers, temperature: float = 1.0) -> RowScores:
    """`score_answers` row by row."""
    return _in_order([_score_against_hidden(student, batch, answers.head, temperature) for batch in answers.batches])


@torch.inference_mode()
def score_alone(student: CompletionModel, examples: Sequence[Example], batch_tokens: int = BATCH_TOKENS) -> RowScores:
    """Cross-entropy row by row, without a teacher."""
    return _in_order([_score(student, part, None) for part in _reference_batches(examples, batch_tokens)])


@torch.inference_mode()
def score_targets(student: CompletionModel, scored: Sequence[Scored], temperature: float = 1.0) -> HeldOutScore:
    """The same with the teacher's answers as messages, one batch for each; top-K answers keep the tail as one class.

    temperature: the one at which the teacher answered.
    """
    return _in_order([_score_against_target(student, batch, temperature) for batch in scored]).total


def target_kl(logits_NV: Tensor, target: DenseTensors | TopKTensors, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) per token: [N, V] -> [N] float32 nats, whatever divergence the run trains on."""
    if isinstance(target, DenseTensors):
        return kl(*dense_classes(logits_NV, target.logprobs_NV, temperature))
    return kl(*tail_classes(logits_NV, target, temperature))


def _reference_batches(examples: Sequence[Example], batch_tokens: int) -> list[Samples]:
    """The references by length, `batch_tokens` of them with their padding in one batch; DataError if there are none."""
    references = held_out_references(examples)
    if references is None:
        raise DataError(
            f"none of the {len(examples)} held-out rows has a reference completion; KL and perplexity are measured on "
            "those: give rows with an answer"
        )
    lengths = references.prompts.lengths_B + references.completions.lengths_B
    return [references.take(rows) for rows in micro_batches(lengths, batch_tokens)]


def _score_against_hidden(
    student: CompletionModel, batch: AnsweredBatch, head: Callable[[Tensor], Tensor], temperature: float
) -> _Part:
    hidden_NH = batch.hidden_NH.to(next(student.parameters()).device)

    def kl_of_rows(logits_NV: Tensor, rows: slice) -> Tensor:
        teacher_NV = (head(hidden_NH[rows]).to(logits_NV.device).float() / temperature).log_softmax(-1)
        return target_kl(logits_NV, DenseTensors(logprobs_NV=teacher_NV), temperature)

    return _score(student, batch.samples, kl_of_rows)


def _score_against_target(student: CompletionModel, batch: Scored, temperature: float) -> _Part:
    if batch.target is None:
        return _score(student, batch.samples, None)
    target = target_tensors(batch.target, next(student.parameters()).device)

    def kl_of_rows(logits_NV: Tensor, rows: slice) -> Tensor:
        return target_kl(logits_NV, _rows_of(target, rows), temperature)

    return _score(student, batch.samples, kl_of_rows)


def _rows_of(target: DenseTensors | TopKTensors, rows: slice) -> DenseTensors | TopKTensors:
    if isinstance(target, DenseTensors):
        return DenseTensors(logprobs_NV=target.logprobs_NV[rows])
    return TopKTensors(
        ids_NK=target.ids_NK[rows], logprobs_NK=target.logprobs_NK[rows], tail_logprob_N=target.tail_logprob_N[rows]
    )


def _score(student: CompletionModel, samples: Samples, kl_of_rows: KlOfRows | None) -> _Part:
    """One batch; logits exist for a few rows at a time, where the model's last layer lies. Sums are taken in float64."""
    device = next(student.parameters()).device
    hidden_NH = student.hidden(SequenceBatch.of_samples(samples, device))
    ids_N = torch.from_numpy(samples.completions.ids_T.copy()).long()
    step = rows_per_chunk(student.model.get_output_embeddings().weight.shape[0])
    kl_N, cross_entropy_N = torch.zeros(2, ids_N.numel(), dtype=torch.float64)
    for start in range(0, ids_N.numel(), step):
        rows = slice(start, start + step)
        logits_NV = student.logits(hidden_NH[rows])
        ids = ids_N[rows].to(logits_NV.device)
        cross_entropy_N[rows] = torch.nn.functional.cross_entropy(logits_NV.float(), ids, reduction="none")
        if kl_of_rows is not None:
            kl_N[rows] = kl_of_rows(logits_NV, rows).double()
    # No row is empty: only rows with a reference are scored.
    starts_R = np.cumsum(samples.completions.lengths_B) - samples.completions.lengths_B
    scores = RowScores(
        row_ids=samples.row_ids,
        kl_R=None if kl_of_rows is None else np.add.reduceat(kl_N.numpy(), starts_R),
        cross_entropy_R=np.add.reduceat(cross_entropy_N.numpy(), starts_R),
        tokens_R=samples.completions.lengths_B.astype(np.float64),
    )
    return samples.indices, scores


def _in_order(parts: Sequence[_Part]) -> RowScores:
    """The batches' rows as one, in the order of the examples."""
    assert parts, "there is no held-out batch to score"
    scores = [part for _, part in parts]
    order = np.argsort(np.concatenate([indices for indices, _ in parts]), kind="stable")
    row_ids = [row_id for part in scores for row_id in part.row_ids]
    kl = [part.kl_R for part in scores if part.kl_R is not None]
    return RowScores(
        row_ids=tuple(row_ids[place] for place in order),
        kl_R=np.concatenate(kl)[order] if len(kl) == len(scores) else None,
        cross_entropy_R=np.concatenate([part.cross_entropy_R for part in scores])[order],
        tokens_R=np.concatenate([part.tokens_R for part in scores])[order],
    )
