"""One call from the config's `data` section to token ids: read, split, encode, filter, check.

A held-out prompt is never trained on: without `eval_path` rows are held out by a hash of their prompt (the whole file
is read for that, `max_rows` limits what is trained on); with it, files that share a prompt are an error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from raydistill.config import DataSection
from raydistill.data.encode import Example, encode_rows, require_references
from raydistill.data.rows import Row, RowFile, read_rows
from raydistill.data.split import check_disjoint, pick_rows, split_rows
from raydistill.data.structural_filter import FilterCounts, check_model_length, filter_rows
from raydistill.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Training and held-out examples as token ids."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]  # empty where data.eval_rows is 0
    counts: FilterCounts  # of the training rows
    held_out_counts: FilterCounts | None
    num_set_aside: int  # rows in neither part, because their prompt is that of a held-out row
    fingerprint: str  # of every id and token: two runs with the same fingerprint and seed see the same steps
    held_out_fingerprint: str | None  # of the held-out part alone: what a later evaluation measures on

    def summary(self) -> str:
        """A few lines for the console."""
        lines = [f"data {self.fingerprint}: {len(self.train):,} training rows, {len(self.held_out):,} held out"]
        lines.append(f"  training: {self.counts.summary()}")
        if self.held_out_counts is not None:
            lines.append(f"  held out: {self.held_out_counts.summary()}")
        if self.num_set_aside:
            lines.append(f"  {self.num_set_aside:,} more rows left out of training: they repeat a held-out prompt")
        return "\n".join(lines)


def load_dataset(
    section: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    model_max_length: int,
    needs_reference: bool,
    *,
    stop_ids: Sequence[int] = (),
) -> Dataset:
    """Read, split, encode and filter the rows that `section` names.

    model_max_length: positions of the shorter of the two models.
    needs_reference: some steps use the data set's completions (objective.on_policy_fraction < 1).
    stop_ids: token ids besides the tokenizer's EOS at which the model stops (the model's generation config).
    """
    if section.path is None:
        raise DataError("data.path is not set; give the JSONL file of training rows")
    file, train_rows, held_out_rows, num_bad_held_out = _read_and_split(section)
    set_aside = 0 if section.eval_path is not None else len(file.rows) - len(train_rows) - len(held_out_rows)
    train_rows = train_rows[: section.max_rows]

    def encode(rows: Sequence[Row]) -> tuple[Example, ...]:
        return encode_rows(rows, tokenizer, section, stop_ids=stop_ids)

    train, counts = filter_rows(train_rows, encode, section, num_bad=file.num_bad, source="data.path")
    held_out: tuple[Example, ...] = ()
    held_out_counts = None
    if held_out_rows:
        source = "data.path" if section.eval_path is None else "data.eval_path"
        held_out, held_out_counts = filter_rows(
            held_out_rows, encode, section, num_bad=num_bad_held_out, source=f"{source} (held-out rows)"
        )
    check_model_length((*train, *held_out), section, model_max_length)
    if needs_reference:
        require_references(train)
    return Dataset(
        train=train,
        held_out=held_out,
        counts=counts,
        held_out_counts=held_out_counts,
        num_set_aside=set_aside,
        fingerprint=fingerprint_of(train, held_out),
        held_out_fingerprint=fingerprint_of(held_out) if held_out else None,
    )


def _read_and_split(section: DataSection) -> tuple[RowFile, tuple[Row, ...], tuple[Row, ...], int]:
    """(training file, training rows, held-out rows, malformed rows of the held-out file)."""
    assert section.path is not None
    if section.eval_rows == 0:
        file = _read("data.path", section.path, section, section.max_rows)
        return file, file.rows, (), 0
    if section.eval_path is None:
        file = _read("data.path", section.path, section)
        return file, *split_rows(file.rows, section.eval_rows), 0
    file = _read("data.path", section.path, section, section.max_rows)
    other = _read("data.eval_path", section.eval_path, section)
    check_disjoint(file.rows, other.rows)
    return file, file.rows, pick_rows(other.rows, section.eval_rows), other.num_bad


def _read(field: str, path: Path, section: DataSection, max_rows: int | None = None) -> RowFile:
    """`read_rows`, whose complaints then name the field."""
    try:
        return read_rows(path, section.on_bad_row, max_rows)
    except DataError as error:
        raise DataError(f"{field}: {error}") from error


def fingerprint_of(*parts: Sequence[Example]) -> str:
    """Changes with any id, token or the order of the examples."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"part {len(part)}\n".encode())
        for example in part:
            sizes = f"{example.row_id} {example.prompt_ids.size} {example.reference_ids.size}\n"
            digest.update(sizes.encode() + example.prompt_ids.tobytes() + example.reference_ids.tobytes())
    return digest.hexdigest()[:16]
