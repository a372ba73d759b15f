"""Turns (prompt ids, completion ids) rows into padded batches: a pure function of the rows and the seed."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from raydistill.demo.tokenizer import TokenRow

LossOn = Literal["completion", "all"]
# Sorting by length inside pools of this many batches leaves 2 % of padding and still mixes the data.
BATCHES_PER_POOL = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Right-padded rows. B sequences, T tokens, C counted positions of the longest row, N of all rows.

    A position counts when its next token is in the loss.
    """

    input_ids_BT: Tensor
    counted_BC: Tensor  # positions, the short rows padded with 0
    keep_N: Tensor  # where the real ones lie in the flattened B*C
    targets_N: Tensor


def make_batches(
    rows: Sequence[TokenRow], batch_size: int, max_length: int, loss_on: LossOn, seed: int
) -> Iterator[Batch]:
    """Endless batches: each epoch shuffled, sorted by length inside pools, the pool's batches shuffled again."""
    rows = [row for row in rows if first_counted(row, loss_on) < min(max_length, len(row[0]) + len(row[1]))]
    if not rows:
        raise ValueError(f"no row has a token to train on within {max_length} tokens")
    rng = random.Random(seed)
    pool_size = BATCHES_PER_POOL * batch_size
    while True:
        order = rng.sample(range(len(rows)), len(rows))
        for start in range(0, len(order), pool_size):
            pool = sorted(order[start : start + pool_size], key=lambda index: sum(map(len, rows[index])))
            batches = [pool[at : at + batch_size] for at in range(0, len(pool), batch_size)]
            rng.shuffle(batches)
            for batch in batches:
                yield collate([rows[index] for index in batch], max_length, loss_on)


def first_counted(row: TokenRow, loss_on: LossOn) -> int:
    """Index of the first token whose prediction is in the loss; the very first token has no prediction."""
    return len(row[0]) if loss_on == "completion" else 1


def collate(rows: Sequence[TokenRow], max_length: int, loss_on: LossOn) -> Batch:
    """Pads on the right and lists the counted positions; rows longer than `max_length` are cut at the end."""
    sequences = [(prompt + completion)[:max_length] for prompt, completion in rows]
    firsts = [first_counted(row, loss_on) for row in rows]
    targets = [sequence[first:] for sequence, first in zip(sequences, firsts, strict=True)]
    width = max(map(len, sequences)) - 1  # the last token predicts nothing
    most = max(map(len, targets))
    padded = [sequence[:-1] + [0] * (width + 1 - len(sequence)) for sequence in sequences]
    counted = [
        [*range(first - 1, first - 1 + len(row)), *[0] * (most - len(row))]
        for row, first in zip(targets, firsts, strict=True)
    ]
    keep = [at * most + offset for at, row in enumerate(targets) for offset in range(len(row))]
    return Batch(
        input_ids_BT=torch.tensor(padded),
        counted_BC=torch.tensor(counted),
        keep_N=torch.tensor(keep),
        targets_N=torch.tensor([target for row in targets for target in row]),
    )
