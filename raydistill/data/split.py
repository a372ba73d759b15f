"""Holds rows out for evaluation by a hash of their prompt, never by their order, and proves that nothing leaks.

The same file in another order, or with other reference completions, has the same held-out prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

from raydistill.data.rows import Row, text_key
from raydistill.errors import DataError

EXCERPT_CHARS = 60


def prompt_key(row: Row) -> str:
    """Hash of the prompt's text: rows with the same key are the same question."""
    return text_key(row.prompt)


def pick_rows(rows: Sequence[Row], num_rows: int) -> tuple[Row, ...]:
    """The rows of the `num_rows` prompts with the smallest hashes, one row for each prompt, in hash order.

    Where a prompt has several rows, the one with the smallest text hash is taken.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(prompt_key(row), []).append(row)
    return tuple(min(groups[key], key=lambda row: text_key(row.messages)) for key in sorted(groups)[:num_rows])


def split_rows(rows: Sequence[Row], eval_rows: int) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """(training rows in file order, held-out rows in hash order).

    Rows that repeat a held-out prompt are in neither.
    """
    if eval_rows == 0:
        return tuple(rows), ()
    held_out = pick_rows(rows, eval_rows)
    keys = {prompt_key(row) for row in held_out}
    train = tuple(row for row in rows if prompt_key(row) not in keys)
    if not train:
        raise DataError(
            f"data.eval_rows={eval_rows} holds out all {len(keys)} prompts of data.path and leaves none to train on; "
            f"lower it below {len(keys)}, or name other rows with data.eval_path"
        )
    return train, held_out


def check_disjoint(train: Sequence[Row], held_out: Sequence[Row]) -> None:
    """Raise DataError if a prompt of `held_out` is also in `train`."""
    known = {prompt_key(row) for row in train}
    shared = [row for row in held_out if prompt_key(row) in known]
    if not shared:
        return
    text = " ".join(shared[0].prompt[-1].content.split())
    excerpt = text if len(text) <= EXCERPT_CHARS else text[:EXCERPT_CHARS] + "..."
    raise DataError(
        f"{len(shared)} of {len(held_out)} evaluation rows have a prompt that is also in the training data, first row "
        f"{shared[0].row_id}: {excerpt!r}. Remove them from data.path or data.eval_path, or leave data.eval_path unset "
        "so that data.eval_rows rows are split off data.path"
    )
