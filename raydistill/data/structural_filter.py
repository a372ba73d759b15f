"""Leaves out rows that cannot be trained on: blank messages, no room for a completion, completions too short or long.

With prompt = all messages but a last one of the assistant, and lengths in tokens (EOS counted), a row is kept if
    prompt < max_length - min_prompt_room
    min(full, max_length) - prompt >= min_completion
    full - prompt < max_length
and what reaches beyond max_length is cut from the end of its reference. Rows without a reference only need the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from raydistill.config import DataSection
from raydistill.data.encode import Example
from raydistill.data.rows import Row
from raydistill.errors import DataError

Verdict = Literal["kept", "prompt_too_long", "completion_too_short", "too_long"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterCounts:
    """What became of the rows of one file; the reasons and `kept` sum to `total`."""

    total: int
    bad_rows: int = 0  # malformed, or refused by the chat template; only with data.on_bad_row = "skip"
    empty_messages: int = 0
    prompt_too_long: int = 0
    completion_too_short: int = 0
    too_long: int = 0
    kept: int = 0
    cut: int = 0  # of the kept: reference shortened to data.max_length, so without EOS

    def summary(self) -> str:
        """One line; reasons that did not occur are left out."""
        reasons = ("bad_rows", "empty_messages", "prompt_too_long", "completion_too_short", "too_long")
        parts = [f"{getattr(self, name):,} {name.replace('_', ' ')}" for name in reasons if getattr(self, name)]
        cut = f" ({self.cut:,} cut to data.max_length)" if self.cut else ""
        return ", ".join([f"{self.kept:,} of {self.total:,} rows kept{cut}", *parts])


def length_verdict(num_prompt: int, num_reference: int | None, section: DataSection) -> Verdict:
    """The rule for one row; `num_reference` is None where it has no reference."""
    if num_prompt >= section.max_length - section.min_prompt_room:
        return "prompt_too_long"
    if num_reference is None:
        return "kept"
    if min(num_reference, section.max_length - num_prompt) < section.min_completion:
        return "completion_too_short"
    return "kept" if num_reference < section.max_length else "too_long"


def filter_rows(
    rows: Sequence[Row],
    encode: Callable[[Sequence[Row]], Sequence[Example]],
    section: DataSection,
    *,
    num_bad: int = 0,
    source: str = "data.path",
) -> tuple[tuple[Example, ...], FilterCounts]:
    """Encode the rows without blank messages and keep those whose lengths fit; DataError if none is left.

    encode: may leave rows out; they count as bad. num_bad: rows that were malformed in the file. source: for errors.
    """
    filled = [row for row in rows if all(m.content.strip() for m in row.messages)]
    examples = encode(filled) if filled else ()
    kept: list[Example] = []
    dropped: dict[Verdict, list[Example]] = {"prompt_too_long": [], "completion_too_short": [], "too_long": []}
    num_cut = 0
    for example in examples:
        num_reference = example.reference_ids.size if example.has_reference else None
        verdict = length_verdict(example.prompt_ids.size, num_reference, section)
        if verdict != "kept":
            dropped[verdict].append(example)
            continue
        short = example.cut(section.max_length)
        num_cut += short is not example
        kept.append(short)
    counts = FilterCounts(
        total=len(rows) + num_bad,
        bad_rows=num_bad + len(filled) - len(examples),
        empty_messages=len(rows) - len(filled),
        prompt_too_long=len(dropped["prompt_too_long"]),
        completion_too_short=len(dropped["completion_too_short"]),
        too_long=len(dropped["too_long"]),
        kept=len(kept),
        cut=num_cut,
    )
    if not kept:
        raise DataError(f"no row of {source} is left: {counts.summary()}. {_way_out(dropped, section)}")
    return tuple(kept), counts


def _way_out(dropped: dict[Verdict, list[Example]], section: DataSection) -> str:
    """What to change, by the most frequent reason."""
    most, examples = max(dropped.items(), key=lambda item: len(item[1]))
    if not examples:
        return "Rows need text in every message and must suit the model's chat template"
    if most == "completion_too_short":
        longest = max(min(e.reference_ids.size, section.max_length - e.prompt_ids.size) for e in examples)
        return f"Lower data.min_completion={section.min_completion}: the longest completion has {longest} tokens"
    if most == "prompt_too_long":
        shortest = min(e.prompt_ids.size for e in examples)
        return (
            f"Raise data.max_length={section.max_length} above {shortest + section.min_prompt_room} or lower "
            f"data.min_prompt_room={section.min_prompt_room}: the shortest prompt has {shortest} tokens"
        )
    shortest = min(e.reference_ids.size for e in examples)
    return f"Raise data.max_length={section.max_length}: the shortest completion has {shortest} tokens"


def check_model_length(examples: Sequence[Example], section: DataSection, model_max_length: int) -> None:
    """Raise DataError if an example has more tokens than the model has positions."""
    lengths = [e.num_tokens if e.has_reference else e.num_tokens + 1 for e in examples]  # one token must be sampled
    too_long = sum(length > model_max_length for length in lengths)
    if too_long:
        raise DataError(
            f"data.max_length={section.max_length} keeps {too_long} rows of up to {max(lengths)} tokens, but the model "
            f"has only {model_max_length} positions; set data.max_length to {model_max_length} or less"
        )
