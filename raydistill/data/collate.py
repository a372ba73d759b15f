"""Spreads sequences over actors, ranks and micro-batches, and pads them; pure numpy, deterministic."""

# Shape letters: B sequences, T tokens.
from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np


def split_by_tokens(lengths: Sequence[int] | np.ndarray, num_parts: int, equal_counts: bool = False) -> list[list[int]]:
    """Positions of the sequences of each part, such that parts have about the same number of tokens.

    Longest first, each to the part with the fewest tokens so far. equal_counts: the parts' numbers of sequences differ
    by one at most (by none where they divide), as data-parallel ranks need it. Positions are sorted within a part;
    a part is empty only where there are fewer sequences than parts.
    """
    assert num_parts > 0, f"num_parts={num_parts}"
    sizes = np.asarray(lengths, dtype=np.int64)
    whole, rest = divmod(sizes.size, num_parts)
    room = [whole + (part < rest) if equal_counts else sizes.size for part in range(num_parts)]
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    load = [0] * num_parts
    for position in np.argsort(-sizes, kind="stable").tolist():
        open_parts = [part for part in range(num_parts) if len(parts[part]) < room[part]]
        target = min(open_parts, key=lambda part: (load[part], len(parts[part]), part))
        parts[target].append(position)
        load[target] += int(sizes[position])
    return [sorted(part) for part in parts]


def micro_batches(lengths: Sequence[int] | np.ndarray, max_tokens_padded: int) -> list[list[int]]:
    """Positions in chunks of similar length: sequences x longest <= `max_tokens_padded`, padding counted.

    A sequence longer than the budget is a chunk of its own. Short chunks come first.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    chunks: list[list[int]] = []
    for position in np.argsort(sizes, kind="stable").tolist():
        longest = int(sizes[position])  # of the chunk with this one, as lengths rise
        if chunks and (len(chunks[-1]) + 1) * longest <= max_tokens_padded:
            chunks[-1].append(position)
        else:
            chunks.append([position])
    return chunks


def pad_rows(
    rows: Sequence[np.ndarray], pad_id: int, side: Literal["left", "right"] = "right"
) -> tuple[np.ndarray, np.ndarray]:
    """(ids_BT int32, mask_BT bool): rows padded to the longest; the mask is True on real tokens."""
    width = max((len(row) for row in rows), default=0)
    ids_BT = np.full((len(rows), width), pad_id, np.int32)
    mask_BT = np.zeros((len(rows), width), np.bool_)
    for number, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids_BT[number, place] = row
        mask_BT[number, place] = True
    return ids_BT, mask_BT
