import json
import math

import numpy as np
import pytest

from raydistill.errors import DataError
from raydistill.evaluate.paired import RowValues, paired_test, read_row_values, write_row_values


def rows(values, weights=None):
    values = np.array(values, np.float64)
    ids = tuple(f"rows.jsonl:{number}" for number in range(values.size))
    return RowValues(
        row_ids=ids,
        values_R=values,
        weights_R=np.ones_like(values) if weights is None else np.array(weights, np.float64),
    )


def test_the_measure_is_the_sum_of_values_over_the_sum_of_weights():
    score = rows([1.0, 6.0], weights=[2, 8])
    assert score.mean == 0.7
    # residuals 1 - .7 * 2 and 6 - .7 * 8: both .4 in size; sqrt(2 / 1 * .32) / 10
    assert score.standard_error == pytest.approx(math.sqrt(0.64) / 10)
    # As exp turns: twice the perplexity, twice the error.
    assert score.perplexity == (pytest.approx(math.exp(0.7)), pytest.approx(math.exp(0.7) * math.sqrt(0.64) / 10))
    assert rows([3.0]).perplexity == (pytest.approx(math.exp(3)), None)


def test_with_equal_weights_the_standard_error_is_that_of_a_mean():
    values = np.random.default_rng(0).normal(size=50)
    assert rows(values).standard_error == pytest.approx(values.std(ddof=1) / math.sqrt(50))
    assert rows([3.0]).standard_error is None


def test_right_and_wrong_answers_are_compared_by_the_exact_mcnemar_test():
    first = rows([1, 1, 1, 1, 1, 1, 0, 0])
    second = rows([1, 0, 0, 0, 0, 0, 0, 0])
    found = paired_test(first, second)
    assert found.difference == 5 / 8
    assert found.p_value == pytest.approx(2 / 2**5)  # five rows differ, all the same way


def test_rows_that_both_answer_alike_say_nothing_about_a_difference():
    few, many = [1, 1, 0], [1] * 500
    lonely = paired_test(rows([*few, 1]), rows([*few, 0])).p_value
    assert paired_test(rows([*many, 1]), rows([*many, 0])).p_value == lonely == 1.0


def test_few_rows_are_permuted_exactly():
    # Of 2^4 ways to swap the rows, two give a sum of differences as large: p = 2 / 16.
    found = paired_test(rows([1.5, 2.5, 3.5, 4.5]), rows([1.0, 1.9, 2.8, 3.7]))
    assert found.p_value == pytest.approx(2 / 16)
    assert found.difference == pytest.approx(0.65)


def test_a_small_difference_on_every_row_is_seen_where_two_error_bars_would_overlap():
    hard = np.random.default_rng(1).gamma(0.3, size=300)
    one, other = rows(hard + 0.01), rows(hard + 0.02 + 0.001 * np.random.default_rng(2).normal(size=300))
    found = paired_test(one, other)
    assert found.p_value <= 1e-3
    assert abs(found.difference) > 10 * found.se
    assert abs(one.mean - other.mean) < one.standard_error


def test_two_equal_models_are_not_told_apart():
    generator = np.random.default_rng(3)
    values = [
        paired_test(rows(generator.normal(size=40)), rows(generator.normal(size=40)), 0).p_value for _ in range(40)
    ]
    assert sum(p < 0.05 for p in values) <= 6  # 2 expected
    same = rows(generator.normal(size=40))
    assert paired_test(same, same).p_value == 1.0


def test_swapping_the_models_changes_the_sign_and_nothing_else():
    generator = np.random.default_rng(4)
    one, other = (rows(generator.gamma(1.0, size=30), weights=range(1, 31)) for _ in range(2))
    there, back = paired_test(one, other), paired_test(other, one)
    assert there.difference == -back.difference
    assert there.se == pytest.approx(back.se)
    assert there.p_value == pytest.approx(back.p_value, abs=0.01)


def test_other_rows_are_refused():
    with pytest.raises(DataError, match="needs the same rows on both sides: 2 and 3 rows"):
        paired_test(rows([1, 2]), rows([1, 2, 3]))


def test_row_values_come_back_as_they_were_written(tmp_path):
    values = {
        "student": {"kl_nats": rows([0.1, 0.25], [3, 5]), "exact_match": rows([1, 0])},
        "ptq": {"kl_nats": rows([1.0])},
    }
    path = tmp_path / "new" / "rows.jsonl"
    write_row_values(path, values)
    first = json.loads(path.read_text().splitlines()[0])
    assert first == {"model": "student", "measure": "kl_nats", "row_id": "rows.jsonl:0", "value": 0.1, "tokens": 3}
    back = read_row_values(path)
    assert back.keys() == values.keys()
    for model, measures in values.items():
        for measure, expected in measures.items():
            got = back[model][measure]
            assert got.row_ids == expected.row_ids
            np.testing.assert_array_equal(got.values_R, expected.values_R)
            np.testing.assert_array_equal(got.weights_R, expected.weights_R)
