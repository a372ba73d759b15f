"""Which rows a comparison is measured on: those that no run trained on, by the same rules as during training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from raydistill.config import DataSection
from raydistill.data.rows import Row, read_rows
from raydistill.data.split import pick_rows, split_rows
from raydistill.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    from raydistill.config.sections import Scalar
    from raydistill.data.encode import Example
    from raydistill.data.structural_filter import FilterCounts

DEFAULT_ROWS = 512
"""Of a file that was named: a standard error of at most 2.2 points of exact match."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutRows:
    """Rows to measure on, before they are token ids."""

    rows: tuple[Row, ...]
    source: Path
    num_available: int  # prompts there are to choose from
    of_run: tuple[Row, ...] = ()  # those that a run measured on; its record has their fingerprint


def rows_of_file(path: Path, num_rows: int | None) -> HeldOutRows:
    """Rows of a file that holds nothing else: the same ones whatever the file's order."""
    every = pick_rows(read_rows(path).rows, 2**62)
    return HeldOutRows(rows=every[: num_rows or DEFAULT_ROWS], source=path, num_available=len(every))


def rows_of_run(section: DataSection, num_rows: int | None) -> HeldOutRows:
    """The rows a run held out. Where they were split off its training file, asking for more is refused: those beyond
    data.eval_rows were trained on."""
    if section.eval_path is not None:
        every = pick_rows(read_rows(section.eval_path, section.on_bad_row).rows, 2**62)
        chosen = every[: num_rows or section.eval_rows or DEFAULT_ROWS]
        of_run = every[: section.eval_rows]
        return HeldOutRows(rows=chosen, source=section.eval_path, num_available=len(every), of_run=of_run)
    if section.path is None or section.eval_rows == 0:
        raise DataError("the run held no rows out (data.eval_rows=0); name rows it has not trained on with --data FILE")
    if num_rows is not None and num_rows > section.eval_rows:
        raise DataError(
            f"--rows {num_rows}: the run held out {section.eval_rows} rows of {section.path} and trained on the "
            "others; ask for fewer, or name rows it has not seen with --data FILE"
        )
    held_out = split_rows(read_rows(section.path, section.on_bad_row).rows, section.eval_rows)[1]
    return HeldOutRows(rows=held_out[:num_rows], source=section.path, num_available=len(held_out), of_run=held_out)


def file_section(max_length: int, template: Mapping[str, Scalar] | None = None) -> DataSection:
    """Rules for a file that belongs to no run: every row that the model has room for counts. template: variables of the
    chat template (None: those of a run that sets none)."""
    rules = {"max_length": max_length, "min_prompt_room": 1, "min_completion": 1}
    return DataSection.model_validate(rules if template is None else {**rules, "template": dict(template)})


def encode_held_out(
    chosen: HeldOutRows,
    tokenizer: PreTrainedTokenizerBase,
    section: DataSection,
    model_max_length: int,
    stop_ids: Sequence[int],
    fingerprint: str | None = None,
) -> tuple[tuple[Example, ...], str]:
    """(examples with a reference, one line that says how many there are).

    fingerprint: what the run recorded of its held-out rows. DataError if they are others now.
    """
    from raydistill.data.dataset import fingerprint_of
    from raydistill.data.encode import encode_rows
    from raydistill.data.structural_filter import check_model_length, filter_rows

    def encode(rows: Sequence[Row]) -> tuple[tuple[Example, ...], FilterCounts]:
        return filter_rows(
            rows,
            lambda some: encode_rows(some, tokenizer, section, stop_ids=stop_ids),
            section,
            num_bad=0,
            source=str(chosen.source),
        )

    if fingerprint is not None and (now := fingerprint_of(encode(chosen.of_run)[0])) != fingerprint:
        raise DataError(
            f"{chosen.source} no longer holds the rows that the run measured on (fingerprint {now}, recorded "
            f"{fingerprint}); put the file back, or measure on its rows as they are with --data {chosen.source}"
        )
    examples, counts = encode(chosen.rows)
    check_model_length(examples, section, model_max_length)
    answered = tuple(example for example in examples if example.has_reference)
    if not answered:
        raise DataError(f"no row of {chosen.source} has a reference completion; models are measured on those")
    text = f"{chosen.source}: {counts.summary()}"
    if fingerprint is not None:
        text += f", those of the run (fingerprint {fingerprint})"
    elif chosen.of_run:
        text += ", whose fingerprint the run did not record: they may have changed since"
    if chosen.num_available > len(chosen.rows):
        text += f"; {chosen.num_available:,} are there, choose with --rows"
    return answered, text
