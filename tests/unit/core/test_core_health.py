"""Numbers that show a policy running away, and the one line that says why."""

import numpy as np
import pytest

from raydistill.health import completion_metrics, health_warning, repetition
from raydistill.messages import Samples, TokenRows, reduce_metrics


def test_repetition_counts_4_grams_that_stood_before() -> None:
    assert repetition(np.arange(20)) == 0.0
    assert repetition(np.array([1, 2, 3, 4])) == 0.0
    assert repetition(np.array([7, 7, 7, 7, 7, 7])) == pytest.approx(2 / 3)  # three 4-grams, one kind
    assert repetition(np.array([], np.int32)) == 0.0


def test_completion_metrics_are_weighted_by_sequences() -> None:
    rows = [[5, 2], [2], [], [7] * 12]
    samples = Samples(
        step=0,
        indices=(0, 1, 2, 3),
        row_ids=("a", "b", "c", "d"),
        prompts=TokenRows.from_rows([[1]] * 4),
        completions=TokenRows.from_rows(rows),
        policy_versions=(0,) * 4,
        finish_reasons=("stop", "stop", "length", "length"),
    )
    metrics = reduce_metrics(completion_metrics(samples))
    assert metrics["rollout/completion_tokens"] == 15 / 4
    assert metrics["rollout/truncated_fraction"] == 0.5
    assert metrics["rollout/empty_fraction"] == 0.5  # a lone EOS, and nothing at all
    assert metrics["rollout/repetition_fraction"] == pytest.approx(8 / 9 / 4)


def step(truncated: float = 0.0, repeated: float = 0.0, empty: float = 0.0) -> dict[str, float]:
    return {
        "rollout/truncated_fraction": truncated,
        "rollout/repetition_fraction": repeated,
        "rollout/empty_fraction": empty,
    }


def test_healthy_and_reference_only_steps_give_no_warning() -> None:
    assert health_warning([], 64) is None
    assert health_warning([{"trainer/loss": 1.0}], 64) is None
    assert health_warning([step(), {"trainer/loss": 1.0}, step(0.2)], 64) is None
    assert health_warning([step(0.6), step(0.7)], 64) is None  # was so from the start


@pytest.mark.parametrize(
    ("newest", "part"),
    [
        (step(truncated=0.8), "80% of the completions are cut at rollout.max_new_tokens=64, 0% were at the start"),
        (step(repeated=0.6), "60% of the 4-grams in the completions are repeats"),
        (step(empty=0.3), "30% of the completions are empty"),
    ],
)
def test_a_policy_that_runs_away_is_named_with_its_usual_cause(newest: dict[str, float], part: str) -> None:
    warning = health_warning([step(), newest], 64)
    assert warning is not None
    assert part in warning


def test_completions_that_are_all_cut_from_the_start_are_a_warning_too() -> None:
    warning = health_warning([step(1.0)], 64)
    assert warning is not None
    assert "nearly all completions are cut at rollout.max_new_tokens=64" in warning
