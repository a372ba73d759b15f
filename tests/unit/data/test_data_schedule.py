import pickle
import random
from collections import Counter

import numpy as np
import pytest

from raydistill.data import schedule as schedule_module
from raydistill.data.encode import Example
from raydistill.data.schedule import StepSchedule, sampling_seed
from raydistill.errors import DataError
from raydistill.messages import REFERENCE_VERSION


def make_examples(count: int) -> list[Example]:
    return [Example(f"row-{n}", np.arange(1 + n % 3, dtype=np.int32), np.array([n, 0], np.int32)) for n in range(count)]


def make_schedule(count=23, seed=5, per_step=4, fraction=0.5, mixing="sequence") -> StepSchedule:
    return StepSchedule(make_examples(count), seed, per_step, fraction, mixing)


def row_ids(plan) -> list[str]:
    """Row ids of a plan by index, whichever side they are on."""
    by_index = {}
    for side in (plan.prompts, plan.references):
        if side is not None:
            by_index |= dict(zip(side.indices, side.row_ids, strict=True))
    assert sorted(by_index) == list(range(len(by_index)))
    return [by_index[i] for i in sorted(by_index)]


def same(a, b) -> bool:
    return pickle.dumps(a) == pickle.dumps(b)


@pytest.mark.parametrize(("count", "per_step"), [(23, 4), (24, 4), (3, 8), (1, 2), (100, 1)])
def test_each_epoch_covers_each_example_once(count, per_step):
    schedule = make_schedule(count=count, per_step=per_step)
    steps = -(-5 * count // per_step)
    drawn = [row for step in range(steps) for row in row_ids(schedule.plan(step))]
    for epoch in range(5):
        assert Counter(drawn[epoch * count : (epoch + 1) * count]) == Counter({f"row-{n}": 1 for n in range(count)})


def test_epochs_and_seeds_have_orders_of_their_own():
    schedule = make_schedule(count=40, per_step=40)
    other = make_schedule(count=40, per_step=40, seed=6)
    orders = {tuple(s.example_numbers(step)) for s in (schedule, other) for step in range(3)}
    assert len(orders) == 6 and tuple(range(40)) not in orders


def test_a_plan_does_not_depend_on_what_was_asked_before():
    steps = list(range(40))
    forward = {step: make_schedule().plan(step) for step in steps}
    schedule = make_schedule()
    random.Random(1).shuffle(steps)
    for step in [*steps, *steps]:
        assert same(schedule.plan(step), forward[step])


def test_a_schedule_survives_pickling():
    schedule = make_schedule()
    schedule.plan(3)
    assert same(pickle.loads(pickle.dumps(schedule)).plan(7), make_schedule().plan(7))


@pytest.mark.parametrize("mixing", ["step", "sequence"])
def test_lambda_is_exact_at_its_ends(mixing):
    for step in range(200):
        assert make_schedule(fraction=0.0, mixing=mixing).plan(step).prompts is None
        plan = make_schedule(fraction=1.0, mixing=mixing).plan(step)
        assert plan.references is None and plan.prompts is not None and len(plan.prompts.indices) == 4


@pytest.mark.parametrize("bits", [0, 2**64 - 1])
def test_the_most_extreme_draws_do_not_cross_the_ends_of_lambda(monkeypatch, bits):
    monkeypatch.setattr(schedule_module, "_raw_bits", lambda *place: np.full(place[-1], bits, np.uint64))
    assert not make_schedule(fraction=0.0).is_on_policy(0).any()
    assert make_schedule(fraction=1.0).is_on_policy(0).all()


@pytest.mark.parametrize("mixing", ["step", "sequence"])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.75])
def test_lambda_is_met_on_average(fraction, mixing):
    schedule = make_schedule(fraction=fraction, mixing=mixing, per_step=8)
    draws = np.stack([schedule.is_on_policy(step) for step in range(3000)])
    independent = draws[:, :1] if mixing == "step" else draws
    standard_error = np.sqrt(fraction * (1 - fraction) / independent.size)
    assert abs(independent.mean() - fraction) < 3 * standard_error


def test_lambda_by_step_is_one_draw_and_by_sequence_is_many():
    by_step, by_sequence = make_schedule(mixing="step"), make_schedule(mixing="sequence")
    shares = [by_step.is_on_policy(step).mean() for step in range(100)]
    assert set(shares) == {0.0, 1.0}
    assert {by_sequence.is_on_policy(step).sum() for step in range(200)} == {0, 1, 2, 3, 4}


def test_lambda_changes_neither_the_prompts_nor_draws_already_on_policy():
    low, high = make_schedule(fraction=0.3), make_schedule(fraction=0.6)
    for step in range(100):
        assert row_ids(low.plan(step)) == row_ids(high.plan(step))
        assert not (low.is_on_policy(step) & ~high.is_on_policy(step)).any()


def test_references_carry_their_tokens_and_no_policy():
    plan = make_schedule(fraction=0.0).plan(2)
    assert plan.references is not None and plan.references.step == 2
    assert set(plan.references.policy_versions) == {REFERENCE_VERSION}
    assert set(plan.references.finish_reasons) == {"reference"}
    examples = {e.row_id: e for e in make_examples(23)}
    completions = plan.references.completions.rows()
    for row_id, prompt, completion in zip(
        plan.references.row_ids, plan.references.prompts.rows(), completions, strict=True
    ):
        np.testing.assert_array_equal(prompt, examples[row_id].prompt_ids)
        np.testing.assert_array_equal(completion, examples[row_id].reference_ids)


def test_the_schedule_of_a_seed_is_fixed_for_ever():
    schedule = make_schedule(count=10, seed=0)
    assert [schedule.example_numbers(step) for step in (0, 1)] == [[4, 6, 3, 5], [2, 9, 1, 0]]
    assert [schedule.is_on_policy(step).tolist() for step in (0, 1)] == [
        [False, False, True, False],
        [False, True, True, True],
    ]
    assert sampling_seed(0, 0, 0) == 668314


def test_sampling_seeds_are_distinct_positive_and_repeatable():
    places = [(seed, step, index) for seed in range(3) for step in range(40) for index in range(32)]
    seeds = [sampling_seed(*place) for place in places]
    assert seeds == [sampling_seed(*place) for place in places]
    assert len(set(seeds)) == len(seeds)
    assert min(seeds) > 0 and max(seeds) < 2**31


def test_examples_without_reference_need_lambda_one():
    ids = np.arange(3, dtype=np.int32)
    examples = [*make_examples(2), Example("bare", ids, ids[:0])]
    StepSchedule(examples, 0, 2, 1.0, "sequence").plan(0)
    with pytest.raises(DataError, match=r"objective.on_policy_fraction < 1 needs .* 1 of 3 rows have none"):
        StepSchedule(examples, 0, 2, 0.9, "sequence")


def test_no_examples_is_an_error():
    with pytest.raises(DataError, match="no training examples"):
        StepSchedule([], 0, 2, 1.0, "sequence")
