import numpy as np

from raydistill.data.encode import Example
from raydistill.ptq.calibration import draw_calibration, draw_rows

EXAMPLES = [Example(str(n), np.array([n, n], np.int32), np.array([n] * (n % 2), np.int32)) for n in range(50)]


def test_the_same_seed_draws_the_same_rows_and_fewer_are_the_start_of_more():
    first = draw_calibration(EXAMPLES, 20, seed=3)
    assert first == draw_calibration(EXAMPLES, 20, seed=3)
    assert draw_calibration(EXAMPLES, 5, seed=3).rows == first.rows[:5]
    assert draw_calibration(EXAMPLES, 20, seed=4).rows != first.rows
    assert len(set(draw_rows(EXAMPLES, 50, 0))) == 50


def test_a_row_is_prompt_and_reference_or_the_prompt_alone():
    rows = draw_calibration(EXAMPLES[:2], 2, seed=0).rows
    assert sorted(rows) == [(0, 0), (1, 1, 1)]


def test_more_rows_than_there_are_means_all_of_them():
    every = draw_calibration(EXAMPLES, 1000, seed=0)
    assert len(every.rows) == 50
    assert every.summary() == "calibration: 50 rows (125 tokens), all of 50"
    assert draw_calibration(EXAMPLES, 2, 9, num_available=4000).summary().endswith("drawn with seed 9 from 4,000")
