"""What a measurement hands back, and what all of them have in common: a name, a length, and a call on one model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from raydistill.evaluate.answerers import Answerer, OnDone
from raydistill.evaluate.paired import RowValues
from raydistill.results.tables import Measure


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One or more numbers about one model."""

    measures: Mapping[str, Measure]  # by the name of their column
    rows: Mapping[str, RowValues] = field(default_factory=dict)  # the same row by row, by the name of the measure


class Measurement(Protocol):
    """Something that is measured on every model in the same way."""

    what: str  # for the progress bar
    num_sequences: int  # of one model; `on_done` counts up to it
    max_tokens: int  # of the longest sequence

    def measure(self, model: Answerer, on_done: OnDone | None = None) -> Measured:
        """Ask the model."""


def share(rows: RowValues) -> Measure:
    """The share of rows that are right, with its standard error as a binomial proportion's."""
    count, mean = rows.values_R.size, rows.mean
    return Measure(value=mean, se=(mean * (1 - mean) / count) ** 0.5, is_share=True)
