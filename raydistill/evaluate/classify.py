"""Accuracy of a classifier that speaks: of all labels the one whose text the model finds most likely after the prompt.

A label counts as the whole completion, up to and including the token that ends it, as in training: "yes" and "yes, but"
are then told apart, and nothing is generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from raydistill.config import DataSection
from raydistill.data.encode import Example, encode_rows
from raydistill.data.rows import Message, Row
from raydistill.errors import DataError
from raydistill.evaluate.answerers import Answerer, OnDone
from raydistill.evaluate.measured import Measured, share
from raydistill.evaluate.paired import RowValues

ACCURACY = "accuracy"
MOST_LABELS = 64
FEW_LABELS = 8  # may be as many as the rows
SHOWN_LABELS = 6


def labels_of(rows: Sequence[Row]) -> tuple[str, ...]:
    """The different references of the rows, in alphabetical order; DataError unless they can be labels."""
    answers = [row.reference.content for row in rows if row.reference is not None]
    labels = sorted(set(answers))
    if len(labels) < 2:
        raise DataError(
            f"--classify chooses between the rows' answers, and all of them are {labels[0]!r}; give rows with every label"
            if labels
            else "--classify needs rows with an answer, which is the label"
        )
    if len(labels) > min(MOST_LABELS, max(FEW_LABELS, len(answers) // 2)):
        raise DataError(
            f"--classify: {len(answers)} rows have {len(labels)} different answers (first {labels[0][:40]!r}), so they are "
            "no labels; give rows whose answer is one of a few, or leave the switch out"
        )
    return tuple(labels)


class Classification:
    """The measurement: each row's prompt with each label."""

    def __init__(
        self,
        rows: Sequence[Row],
        tokenizer: Any,
        section: DataSection,
        stop_ids: Sequence[int],
    ) -> None:
        answered = [row for row in rows if row.reference is not None]
        self._labels = labels_of(answered)
        self._row_ids = tuple(row.row_id for row in answered)
        self._truth = [self._labels.index(row.reference.content) for row in answered if row.reference is not None]
        self._examples = {label: _labelled(answered, label, tokenizer, section, stop_ids) for label in self._labels}
        self.what = f"one of {len(self._labels)} labels"
        self.num_sequences = len(answered) * len(self._labels)
        self.max_tokens = max(example.num_tokens for some in self._examples.values() for example in some)

    def summary(self) -> str:
        """One line that says what is compared."""
        more = f" and {len(self._labels) - SHOWN_LABELS} more" if len(self._labels) > SHOWN_LABELS else ""
        return f"{len(self._truth)} rows, labels {', '.join(map(repr, self._labels[:SHOWN_LABELS]))}{more}"

    def measure(self, model: Answerer, on_done: OnDone | None = None) -> Measured:
        """See `Measurement`."""
        pairs = [
            (example.prompt_ids, example.reference_ids) for label in self._labels for example in self._examples[label]
        ]
        totals = np.array([found.total for found in model.likelihoods(pairs, on_done)])
        chosen = totals.reshape(len(self._labels), -1).argmax(0)
        hits = (chosen == np.array(self._truth)).astype(np.float64)
        rows = RowValues(row_ids=self._row_ids, values_R=hits, weights_R=np.ones_like(hits))
        return Measured(measures={ACCURACY: share(rows)}, rows={ACCURACY: rows})


def _labelled(
    rows: Sequence[Row], label: str, tokenizer: Any, section: DataSection, stop_ids: Sequence[int]
) -> tuple[Example, ...]:
    said = [replace(row, messages=(*row.prompt, Message("assistant", label))) for row in rows]
    # Every label of a row, or none: a row that the template cannot express stops here.
    return encode_rows(said, tokenizer, section.model_copy(update={"on_bad_row": "error"}), stop_ids=stop_ids)
