"""One rank's sequences become the same micro-batches whatever the order in which their parts arrived."""

from itertools import permutations

import numpy as np
import pytest

from raydistill.merge import merge_scored, split_scored, take_scored
from raydistill.messages import Samples, Scored, TeacherDense, TeacherTopK, TokenRows

K = 2


def scored(sizes: dict[int, tuple[int, int]], kind: str = "top_k") -> Scored:
    """Sequences {index: (prompt tokens, completion tokens)}; every token and answer names its sequence and place."""
    completions = [[100 * i + t for t in range(new)] for i, (_, new) in sizes.items()]
    marks = np.concatenate([np.asarray(c, np.float32) for c in completions])
    target: TeacherTopK | TeacherDense | None = None
    if kind == "top_k":
        target = TeacherTopK(
            ids_NK=np.stack([marks] * K, 1).astype(np.int32),
            logprobs_NK=np.stack([-marks] * K, 1),
            tail_logprob_N=marks,
        )
    elif kind == "dense":
        target = TeacherDense(logprobs_NV=np.stack([-marks] * 5, 1))
    samples = Samples(
        step=3,
        indices=tuple(sizes),
        row_ids=tuple(f"row-{i}" for i in sizes),
        prompts=TokenRows.from_rows([[i] * prompt for i, (prompt, _) in sizes.items()]),
        completions=TokenRows.from_rows(completions),
        policy_versions=tuple(sizes),
        finish_reasons=("stop",) * len(sizes),
    )
    return Scored(samples=samples, target=target)


PARTS = [scored({0: (2, 3), 4: (1, 1)}), scored({2: (5, 2)}), scored({6: (2, 3), 8: (4, 0), 10: (1, 9)})]


def contents(batches: list[Scored]) -> list[tuple[tuple[int, ...], list[int], list[float]]]:
    return [
        (b.samples.indices, b.samples.completions.ids_T.tolist(), b.target.tail_logprob_N.tolist())  # type: ignore[union-attr]
        for b in batches
    ]


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_the_order_in_which_parts_arrive_does_not_matter(order: tuple[int, ...]) -> None:
    assert contents(split_scored([PARTS[i] for i in order], 2)) == contents(split_scored(PARTS, 2))


def test_micro_batches_have_equal_counts_longest_together() -> None:
    batches = split_scored(PARTS, 2)
    assert [len(b.samples) for b in batches] == [2, 2, 2]
    # Lengths 10, 7, 5, 5, 4, 2: a tie is broken by the index.
    assert [b.samples.indices for b in batches] == [(10, 2), (0, 6), (8, 4)]
    assert [len(b.samples) for b in split_scored(PARTS, 4)] == [4, 2]


def test_every_answer_stays_with_its_token() -> None:
    for batch in split_scored(PARTS, 2):
        ids = batch.samples.completions.ids_T
        assert isinstance(batch.target, TeacherTopK)
        assert (batch.target.ids_NK == ids[:, None]).all()
        assert (batch.target.logprobs_NK == -ids[:, None]).all()
        assert (batch.target.tail_logprob_N == ids).all()
        for index, row in zip(batch.samples.indices, batch.samples.completions.rows(), strict=True):
            assert (row // 100 == index).all()


def test_prompts_versions_and_ids_stay_with_their_sequence() -> None:
    for batch in split_scored(PARTS, 3):
        samples = batch.samples
        assert samples.policy_versions == samples.indices
        assert samples.row_ids == tuple(f"row-{i}" for i in samples.indices)
        for index, prompt in zip(samples.indices, samples.prompts.rows(), strict=True):
            assert (prompt == index).all()


def test_dense_answers_and_no_answers_are_split_alike() -> None:
    sizes = {0: (2, 3), 1: (1, 5)}
    (first, second) = split_scored([scored(sizes, "dense")], 1)
    assert isinstance(first.target, TeacherDense)
    assert first.target.logprobs_NV[:, 0].tolist() == [-100, -101, -102, -103, -104]
    assert second.samples.indices == (0,)
    assert [b.target for b in split_scored([scored(sizes, "none")], 1)] == [None, None]


def test_merging_what_was_taken_apart_gives_the_whole() -> None:
    whole = PARTS[2]
    again = merge_scored([take_scored(whole, [0]), take_scored(whole, [1, 2])])
    assert contents([again]) == contents([whole])
