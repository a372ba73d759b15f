"""Worked answers, judged by their last line: `#### 42`, as GSM8K writes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raydistill.data.encode import Example
from raydistill.demo.answers import flexible_match
from raydistill.evaluate.answerers import Answerer, OnDone
from raydistill.evaluate.generate import match_answers, require_final_numbers
from raydistill.evaluate.measured import Measured, share
from raydistill.evaluate.paired import EXACT_MATCH, LAST_NUMBER_COLUMN

LAST_NUMBER = "exact_match_last_number"


class FinalNumbers:
    """The measurement: a greedy answer to each prompt, whose final number is compared with the reference's.

    Strictly the number after `####` counts; flexibly the last number of an answer that marks none.
    """

    what = "greedy answers"

    def __init__(self, examples: Sequence[Example], tokenizer: Any, max_new_tokens: int) -> None:
        require_final_numbers(examples, tokenizer)
        self._examples, self._tokenizer, self._max_new_tokens = examples, tokenizer, max_new_tokens
        self.num_sequences = len(examples)
        self.max_tokens = max(example.prompt_ids.size for example in examples) + max_new_tokens

    def measure(self, model: Answerer, on_done: OnDone | None = None) -> Measured:
        """See `Measurement`. The strict score is among the rows only: the table has a column for it."""
        prompts = [example.prompt_ids for example in self._examples]
        answers = model.answers(prompts, self._max_new_tokens, on_done=on_done)
        pairs = [(answer, example.reference_ids) for answer, example in zip(answers, self._examples, strict=True)]
        row_ids = [example.row_id for example in self._examples]
        strict = match_answers(pairs, self._tokenizer).values(row_ids)
        flexible = match_answers(pairs, self._tokenizer, flexible_match).values(row_ids)
        return Measured(
            measures={LAST_NUMBER_COLUMN: share(flexible)}, rows={EXACT_MATCH: strict, LAST_NUMBER: flexible}
        )
