"""The rows that GPTQ and AWQ look at: the student's own training rows, as the student is trained on them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from raydistill.data.encode import Example

DEFAULT_ROWS = 512  # llm-compressor's own default
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Token ids, prompt and reference completion of a row together; rows without a reference give their prompt."""

    rows: tuple[tuple[int, ...], ...]
    num_available: int
    seed: int

    @property
    def num_tokens(self) -> int:
        return sum(len(row) for row in self.rows)

    def summary(self) -> str:
        """One line for the console."""
        source = f"all of {self.num_available:,}"
        if len(self.rows) < self.num_available:
            source = f"drawn with seed {self.seed} from {self.num_available:,}"
        return f"calibration: {len(self.rows):,} rows ({self.num_tokens:,} tokens), {source}"


def draw_rows(rows: Sequence[T], num_rows: int, seed: int) -> tuple[T, ...]:
    """Some of the rows, the same ones for the same seed, in a random order of which a smaller number takes the start."""
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    return tuple(rows[place] for place in order[:num_rows])


def draw_calibration(
    examples: Sequence[Example], num_rows: int, seed: int, num_available: int | None = None
) -> Calibration:
    """`num_rows` of the examples. num_available: rows that they were drawn from already (None: they are all there are)."""
    drawn = draw_rows(examples, num_rows, seed)
    return Calibration(
        rows=tuple((*row.prompt_ids.tolist(), *row.reference_ids.tolist()) for row in drawn),
        num_available=num_available or len(examples),
        seed=seed,
    )
