"""Taking messages apart and putting them together again by sequence; pure numpy, no stage of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np

from raydistill.messages import Samples, Scored, TokenRows


def take_scored(scored: Scored, rows: Sequence[int]) -> Scored:
    """The given sequences (positions in the message) with their completion tokens' answers."""
    ends = np.cumsum(scored.samples.completions.lengths_B)
    starts = ends - scored.samples.completions.lengths_B
    target = scored.target
    if target is not None:
        arrays = {f.name: getattr(target, f.name) for f in fields(target)}
        target = replace(
            target, **{name: np.concatenate([a[starts[r] : ends[r]] for r in rows]) for name, a in arrays.items()}
        )
    return Scored(samples=scored.samples.take(rows), target=target)


def merge_samples(parts: Sequence[Samples]) -> Samples:
    """Parts of one step as one message, in the order given."""
    return Samples(
        step=parts[0].step,
        indices=tuple(i for part in parts for i in part.indices),
        row_ids=tuple(r for part in parts for r in part.row_ids),
        prompts=TokenRows.from_rows([row for part in parts for row in part.prompts.rows()]),
        completions=TokenRows.from_rows([row for part in parts for row in part.completions.rows()]),
        policy_versions=tuple(v for part in parts for v in part.policy_versions),
        finish_reasons=tuple(f for part in parts for f in part.finish_reasons),
    )


def merge_scored(parts: Sequence[Scored]) -> Scored:
    """Parts of one step, all with answers of one type or all without, in the order given."""
    targets = [part.target for part in parts]
    first = targets[0]
    merged = None
    if first is not None:
        names = [f.name for f in fields(first)]
        merged = replace(first, **{n: np.concatenate([getattr(t, n) for t in targets]) for n in names})
    return Scored(samples=merge_samples([part.samples for part in parts]), target=merged)


def split_scored(parts: Sequence[Scored], sequences: int) -> list[Scored]:
    """One rank's sequences of a step as micro-batches of `sequences`, longest together, the same on every repeat."""
    whole = merge_scored(parts)
    samples = whole.samples
    lengths = samples.prompts.lengths_B + samples.completions.lengths_B
    # Order by (length, index): the order in which parts arrived must not matter.
    order = sorted(range(len(samples)), key=lambda r: (-int(lengths[r]), samples.indices[r]))
    return [take_scored(whole, order[first : first + sequences]) for first in range(0, len(order), sequences)]
