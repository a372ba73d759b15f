from itertools import chain

import numpy as np
import pytest

from raydistill.data.collate import micro_batches, pad_rows, split_by_tokens

LENGTHS = np.random.default_rng(0).integers(1, 500, size=64)


@pytest.mark.parametrize("equal_counts", [False, True])
@pytest.mark.parametrize("num_parts", [1, 3, 4, 64, 70])
def test_split_covers_each_sequence_once(num_parts, equal_counts):
    parts = split_by_tokens(LENGTHS, num_parts, equal_counts)
    assert len(parts) == num_parts
    assert sorted(chain.from_iterable(parts)) == list(range(64)) and all(part == sorted(part) for part in parts)
    if num_parts <= 64:
        assert all(parts)
    if equal_counts:
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("equal_counts", [False, True])
def test_split_balances_tokens(equal_counts):
    parts = split_by_tokens(LENGTHS, 4, equal_counts)
    loads = [int(LENGTHS[part].sum()) for part in parts]
    assert max(loads) - min(loads) <= 0.02 * LENGTHS.sum()


def test_split_by_hand():
    assert split_by_tokens([9, 1, 1, 1], 2) == [[0], [1, 2, 3]]
    assert split_by_tokens([9, 1, 1, 1], 2, equal_counts=True) == [[0, 3], [1, 2]]
    assert split_by_tokens([], 2) == [[], []]


@pytest.mark.parametrize("budget", [1, 300, 500, 2000, 10**6])
def test_micro_batches_cover_all_and_keep_the_budget(budget):
    chunks = micro_batches(LENGTHS, budget)
    assert sorted(chain.from_iterable(chunks)) == list(range(64))
    for chunk in chunks:
        assert len(chunk) == 1 or len(chunk) * LENGTHS[chunk].max() <= budget


def test_micro_batches_by_hand():
    assert micro_batches([3, 1, 2, 8], 6) == [[1, 2], [0], [3]]
    assert micro_batches([], 6) == []


def test_pad_rows_on_both_sides():
    rows = [np.array([5, 6], np.int32), np.array([7], np.int32), np.array([], np.int32)]
    ids_BT, mask_BT = pad_rows(rows, pad_id=9)
    assert ids_BT.tolist() == [[5, 6], [7, 9], [9, 9]]
    assert mask_BT.tolist() == [[True, True], [True, False], [False, False]]
    assert ids_BT.dtype == np.int32 and mask_BT.dtype == np.bool_
    ids_BT, mask_BT = pad_rows(rows, pad_id=9, side="left")
    assert ids_BT.tolist() == [[5, 6], [9, 7], [9, 9]]
    assert mask_BT.tolist() == [[True, True], [False, True], [False, False]]


def test_pad_rows_of_nothing():
    assert pad_rows([], 0)[0].shape == (0, 0)
