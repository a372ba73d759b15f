"""Messages are checked when they are made, and metrics know their own reduction."""

import math
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest

from raydistill.messages import (
    Metric,
    PromptBatch,
    Samples,
    Scored,
    ShapeError,
    StudentWeights,
    TeacherDense,
    TeacherTopK,
    TokenRows,
    reduce_metrics,
)


def top_k(num_tokens: int = 3, **changes: Any) -> TeacherTopK:
    arrays = {
        "ids_NK": np.zeros((num_tokens, 2), np.int32),
        "logprobs_NK": np.full((num_tokens, 2), -1.0, np.float32),
        "tail_logprob_N": np.full(num_tokens, -2.0, np.float32),
    }
    return TeacherTopK(**(arrays | changes))


def samples(completions: list[list[int]], **changes: Any) -> Samples:
    count = len(completions)
    parts: dict[str, Any] = {
        "step": 0,
        "indices": tuple(range(count)),
        "row_ids": tuple(f"row-{i}" for i in range(count)),
        "prompts": TokenRows.from_rows([[1]] * count),
        "completions": TokenRows.from_rows(completions),
        "policy_versions": (0,) * count,
        "finish_reasons": ("stop",) * count,
    }
    return Samples(**(parts | changes))


def test_a_size_that_disagrees_is_named_by_its_letter_and_both_fields() -> None:
    with pytest.raises(ShapeError, match="logprobs_NK has N=5 but ids_NK has N=3"):
        top_k(logprobs_NK=np.zeros((5, 2), np.float32))
    with pytest.raises(ShapeError, match="logprobs_NK has K=4 but ids_NK has K=2"):
        top_k(logprobs_NK=np.zeros((3, 4), np.float32))
    with pytest.raises(ShapeError, match="tail_logprob_N has N=2 but ids_NK has N=3"):
        top_k(tail_logprob_N=np.zeros(2, np.float32))


def test_a_wrong_number_of_dimensions_and_a_wrong_dtype_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"ids_NK should have 2 dimensions, it has shape \(3,\)"):
        top_k(ids_NK=np.zeros(3, np.int32))
    with pytest.raises(ShapeError, match="ids_NK should be int32, it is int64"):
        top_k(ids_NK=np.zeros((3, 2), np.int64))
    with pytest.raises(ShapeError, match="logprobs_NV should be float32, it is float16"):
        TeacherDense(logprobs_NV=np.zeros((3, 9), np.float16))


def test_messages_are_frozen() -> None:
    message = top_k()
    with pytest.raises(FrozenInstanceError):
        message.ids_NK = np.zeros((3, 2), np.int32)  # type: ignore[misc]
    with pytest.raises(TypeError):
        TokenRows(np.zeros(0, np.int32), np.zeros(0, np.int32))  # type: ignore[misc]


@pytest.mark.parametrize(
    "rows",
    [[], [[]], [[1, 2, 3]], [[1], [], [2, 3]], [[], [], [7]], [[7], [], []]],
    ids=["none", "one-empty", "one", "empty-inside", "empty-first", "empty-last"],
)
def test_ragged_rows_come_back_as_they_went_in(rows: list[list[int]]) -> None:
    message = TokenRows.from_rows(rows)
    assert [row.tolist() for row in message.rows()] == rows
    assert len(message) == len(rows)
    assert message.num_tokens == sum(map(len, rows))
    assert message.ids_T.dtype == message.lengths_B.dtype == np.int32


def test_token_rows_whose_lengths_do_not_add_up_are_refused() -> None:
    with pytest.raises(ShapeError, match="lengths_B sums to 2 but ids_T has 3 tokens"):
        TokenRows(ids_T=np.zeros(3, np.int32), lengths_B=np.array([1, 1], np.int32))
    with pytest.raises(ShapeError, match="negative length -1"):
        TokenRows(ids_T=np.zeros(2, np.int32), lengths_B=np.array([3, -1], np.int32))


def test_samples_and_prompts_of_different_counts_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"disagree on B: \[2, 3\]"):
        samples([[1], [2]], policy_versions=(0, 0, 0))
    with pytest.raises(ShapeError, match="1 indices, 1 ids, 2 prompts"):
        PromptBatch(step=0, indices=(0,), row_ids=("a",), prompts=TokenRows.from_rows([[1], [2]]))


def test_taking_rows_keeps_what_belongs_together() -> None:
    whole = samples([[1], [], [2, 3]], policy_versions=(4, 5, 6), finish_reasons=("stop", "length", "reference"))
    part = whole.take([2, 0])
    assert [row.tolist() for row in part.completions.rows()] == [[2, 3], [1]]
    assert (part.indices, part.policy_versions, part.row_ids) == ((2, 0), (6, 4), ("row-2", "row-0"))
    assert part.finish_reasons == ("reference", "stop")


def test_a_teacher_must_answer_every_completion_token() -> None:
    Scored(samples=samples([[1, 2], [3]]), target=top_k(3))
    Scored(samples=samples([[1, 2], [3]]), target=None)
    with pytest.raises(ShapeError, match="answered 3 positions for 4 completion tokens"):
        Scored(samples=samples([[1, 2], [3, 4]]), target=top_k(3))


def test_minus_infinity_is_a_legal_logprob_and_nan_and_plus_infinity_are_not() -> None:
    def tail(value: float) -> TeacherTopK:
        return top_k(tail_logprob_N=np.array([-1.0, value, -1.0], np.float32))

    assert top_k().is_finite
    assert tail(-np.inf).is_finite
    assert not tail(np.nan).is_finite
    assert not tail(np.inf).is_finite
    dense = np.full((2, 3), -1.0, np.float32)
    assert TeacherDense(logprobs_NV=dense).is_finite
    assert not TeacherDense(logprobs_NV=np.where(dense < 0, np.nan, dense).astype(np.float32)).is_finite


def test_metrics_of_one_name_are_averaged_by_their_weights() -> None:
    reduced = reduce_metrics(
        [
            Metric(name="a/kl_nats", total=1.0, weight=1.0),
            Metric(name="b/x", total=5.0),
            Metric(name="a/kl_nats", total=2.0, weight=9.0),
        ]
    )
    assert reduced == {"a/kl_nats": pytest.approx(0.3), "b/x": 5.0}  # not the mean of 1 and 2/9


def test_a_metric_without_weight_is_not_a_number() -> None:
    assert math.isnan(Metric(name="a/x", total=0.0, weight=0.0).value)
    assert math.isnan(reduce_metrics([Metric(name="a/x", total=0.0, weight=0.0)])["a/x"])


def test_the_size_of_weights_is_the_bytes_that_travel() -> None:
    tensors = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(5, np.float32)}
    assert StudentWeights(version=0, tensors=tensors, probe=None).size_bytes == 4 * 11
