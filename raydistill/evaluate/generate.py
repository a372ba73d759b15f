"""Exact match of greedy answers: left-padded batches through transformers' `generate`, rows of like length together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from raydistill.data.collate import micro_batches, pad_rows
from raydistill.data.encode import Example
from raydistill.demo.answers import exact_match, final_number
from raydistill.errors import DataError, ModelError
from raydistill.evaluate.paired import RowValues

BATCH_TOKENS = 16_384
"""Prompt and new tokens (padding counted) of one batch: 128 short rows; 2 GB of key-value cache at 8 B parameters."""

OnBatch = Callable[[int], None]
Matches = Callable[[str, str], bool]
"""Whether an answer (first) is right by the reference."""
Ids = Sequence[int] | np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class MatchScore:
    """Which answers were right."""

    hits: tuple[bool, ...]  # in the order of the rows

    @property
    def num_rows(self) -> int:
        return len(self.hits)

    @property
    def share(self) -> float:
        return sum(self.hits) / self.num_rows

    @property
    def standard_error(self) -> float:
        """Of the share, as that of a binomial proportion."""
        return math.sqrt(self.share * (1 - self.share) / self.num_rows)

    def values(self, row_ids: Sequence[str]) -> RowValues:
        """Row by row, for a paired test."""
        hits_R = np.array(self.hits, np.float64)
        return RowValues(row_ids=tuple(row_ids), values_R=hits_R, weights_R=np.ones_like(hits_R))


def match_answers(pairs: Iterable[tuple[Ids, Ids]], tokenizer: Any, matches: Matches = exact_match) -> MatchScore:
    """Compare (answer ids, reference ids) by the final number that each text marks, or as `matches` does."""
    hits = tuple(matches(_text(tokenizer, answer), _text(tokenizer, truth)) for answer, truth in pairs)
    assert hits, "there is no answer to compare"
    return MatchScore(hits=hits)


def require_final_numbers(examples: Sequence[Example], tokenizer: Any) -> None:
    """DataError unless the references mark a final number: without one every answer would count as wrong."""
    without = [e.row_id for e in examples if final_number(_text(tokenizer, e.reference_ids)) is None]
    if without:
        raise DataError(
            f"exact match compares the number after '####', but {len(without)} of {len(examples)} references mark none "
            f"(first {without[0]}); choose rows that do, or measure without exact match"
        )


@torch.inference_mode()
def greedy_completions(
    model: Any,
    prompts: Sequence[np.ndarray],
    eos_ids: Sequence[int],
    max_new_tokens: int,
    batch_tokens: int = BATCH_TOKENS,
    on_batch: OnBatch | None = None,
    num_ids: int | None = None,
    stop: Sequence[str] = (),
    tokenizer: Any = None,
) -> list[list[int]]:
    """The most likely next tokens up to and including the first of `eos_ids`, in the order of `prompts`.

    A batch ends when its last row has ended. on_batch: called with the number of finished rows. num_ids: ids that mean
    something (`num_known_ids`); those above are padding of the vocabulary and never sampled. None: all mean something.
    stop: texts that end an answer as well, with the tokenizer that finds them.

    Property tested: an answer does not depend on the batch it was in.
    """
    if not eos_ids:
        raise ModelError("no end-of-sequence id is known, so no answer would end; set eos_token in the tokenizer")
    answers: list[list[int]] = [[] for _ in prompts]
    done = 0
    endings = {"stop_strings": list(stop), "tokenizer": tokenizer} if stop else {}
    with _greedy_settings(model, eos_ids, max_new_tokens, num_ids):
        for rows in micro_batches([prompt.size + max_new_tokens for prompt in prompts], batch_tokens):
            ids, mask = pad_rows([prompts[row] for row in rows], eos_ids[0], side="left")
            output = model.generate(
                input_ids=torch.from_numpy(ids).long().to(model.device),
                attention_mask=torch.from_numpy(mask).long().to(model.device),
                **endings,
            )
            for row, new in zip(rows, output[:, ids.shape[1] :].tolist(), strict=True):
                answers[row] = _cut(new, eos_ids)
            done += len(rows)
            if on_batch is not None:
                on_batch(done)
    return answers


@contextmanager
def _greedy_settings(model: Any, eos_ids: Sequence[int], max_new_tokens: int, num_ids: int | None) -> Iterator[None]:
    """Plain greedy search. `generate` fills what is not given from the model's own settings (a repetition penalty, for
    example), which would not be the model's most likely token: so these are replaced for the time."""
    from transformers import GenerationConfig

    own = model.generation_config
    padding = list(range(num_ids, model.config.get_text_config().vocab_size)) if num_ids is not None else []
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(eos_ids),
        pad_token_id=eos_ids[0],
        suppress_tokens=padding or None,
    )
    try:
        yield
    finally:
        model.generation_config = own


def _cut(row: list[int], eos_ids: Sequence[int]) -> list[int]:
    end = next((place for place, token in enumerate(row) if token in eos_ids), len(row))
    return row[: end + 1]


def _text(tokenizer: Any, ids: Ids) -> str:
    return str(tokenizer.decode([int(token) for token in ids], skip_special_tokens=True))
