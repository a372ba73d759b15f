"""The search space: which points a grid has, what is drawn, and what is refused."""

import json
import random

import pytest

from raydistill.errors import ConfigError
from raydistill.sweep.space import (
    Choice,
    Interval,
    gathered,
    grid_points,
    parse_values,
    random_points,
    spread,
    with_seeds,
)


def values(written: object, needs_grid: bool = True) -> Choice | Interval:
    return parse_values("s.toml: space: f", written, needs_grid)


def test_a_log_range_has_evenly_spaced_exponents_and_both_ends() -> None:
    assert values({"log_range": [1e-5, 1e-1], "num": 5}).grid() == (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


def test_a_range_of_whole_numbers_gives_whole_numbers_once_each() -> None:
    assert values({"range": [1, 3], "num": 5}).grid() == (1, 2, 3)
    assert values({"range": [1.0, 3.0], "num": 5}).grid() == (1.0, 1.5, 2.0, 2.5, 3.0)


def test_a_grid_is_every_combination() -> None:
    space = {"a": values([1, 2]), "b": values(["x", "y", "z"])}
    points = grid_points(space)
    assert len(points) == 6
    assert points[:2] == [{"a": 1, "b": "x"}, {"a": 1, "b": "y"}]
    assert len({tuple(point.values()) for point in points}) == 6


def test_random_points_are_a_function_of_the_seed_and_stay_inside() -> None:
    space = {"lr": values({"log_range": [1e-5, 1e-3]}, needs_grid=False), "beta": values([0.0, 1.0])}
    points = random_points(space, 200, seed=3)
    assert points == random_points(space, 200, seed=3) != random_points(space, 200, seed=4)
    assert all(1e-5 <= point["lr"] <= 1e-3 for point in points)
    # Evenly spread in the logarithm: half of the draws lie below the geometric mean.
    assert 70 < sum(point["lr"] < 1e-4 for point in points) < 130
    assert {point["beta"] for point in points} == {0.0, 1.0}


def test_no_point_is_drawn_twice_and_a_space_gives_no_more_than_it_has() -> None:
    space = {
        "rank": values({"range": [1, 4]}, needs_grid=False),
        "quant": values([{"format": "int2"}, {"format": "nf4"}]),
    }
    for number, expected in ((5, 5), (8, 8), (50, 8)):
        points = random_points(space, number, seed=0)
        assert len(points) == len({tuple(point.values()) for point in points}) == expected
    assert random_points(space, 3, seed=0) == random_points(space, 8, seed=0)[:3]
    narrow = {"lr": values({"range": [1.0, 1.00001]}, needs_grid=False)}  # values have six digits
    assert 2 <= len(random_points(narrow, 50, seed=0)) < 50
    assert len(random_points({}, 3, seed=0)) == 1


def test_an_interval_of_whole_numbers_draws_its_ends_too() -> None:
    interval = values({"range": [1, 3]}, needs_grid=False)
    assert {interval.draw(random.Random(seed)) for seed in range(100)} == {1, 2, 3}


def test_repetitions_are_every_point_with_every_seed() -> None:
    assert with_seeds([{"a": 1}, {"a": 2}], [0, 7]) == [
        {"a": 1, "run.seed": 0},
        {"a": 1, "run.seed": 7},
        {"a": 2, "run.seed": 0},
        {"a": 2, "run.seed": 7},
    ]
    assert with_seeds([{"a": 1}], []) == [{"a": 1}]


@pytest.mark.parametrize(
    ("written", "complaint"),
    [
        ([], "an empty list"),
        ([1, 2, 1], "1 stands there twice; to repeat trials vary run.seed"),
        (3, "give a list of values, or"),
        ({"range": [2, 1], "num": 3}, "the range from 2 to 1 is empty"),
        ({"range": [1, 1], "num": 3}, "is empty"),
        ({"range": [1], "num": 3}, "two numbers"),
        ({"range": ["a", "b"], "num": 3}, "two numbers"),
        ({"log_range": [0, 1], "num": 3}, "starts above 0, found 0"),
        ({"range": [0, 1], "num": 1}, "num is the number of points, 2 or more"),
        ({"range": [0, 1]}, "a grid needs the number of points"),
        ({"range": [0, 1], "log_range": [1, 2], "num": 3}, "give either range or log_range"),
        ({"rang": [0, 1], "num": 3}, "'rang' means nothing here"),
    ],
)
def test_what_cannot_be_a_space_is_refused_with_its_field(written: object, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        values(written)
    assert str(caught.value).startswith("s.toml: space: f: ")
    assert complaint in str(caught.value)


def test_what_varies_together_is_spread_and_gathered_again() -> None:
    space = {"quant": values([{"format": "int2", "scale": "absmax"}, {"format": "nf4"}]), "a": values([1, 2])}
    written = {"quant": {"format": "int2", "scale": "absmax"}, "a": 2}
    assert spread(written) == {"quant.format": "int2", "quant.scale": "absmax", "a": 2}
    assert gathered(space, spread(written)) == written


def test_what_was_listed_is_the_same_value_after_a_way_through_a_file() -> None:
    space = {
        "adapter.targets": values([["q_proj"], ["q_proj", "v_proj"]]),
        "quant": values([{"format": "int2", "skip": ("lm_head",)}]),
        "a": values({"range": [1, 3]}, needs_grid=False),
    }
    point = {"adapter.targets": ("q_proj", "v_proj"), "quant": {"format": "int2", "skip": ("lm_head",)}, "a": 2}
    assert gathered(space, json.loads(json.dumps(spread(point)))) == point


@pytest.mark.parametrize(
    ("written", "is_log"),
    [
        ([1e-4, 1e-3, 1e-2], True),
        ([5e-4, 8.2e-4, 1.3e-3, 2.2e-3, 3.6e-3, 5.9e-3], True),
        ([1, 8, 16, 24], False),
        ([0.0, 0.5, 1.0], False),
        ([1e-4, 1e-2], False),
        (["int2", "int4", "nf4"], False),
        ([True, False], False),
    ],
)
def test_a_list_of_numbers_shows_by_itself_whether_it_is_on_a_log_scale(written: list[object], is_log: bool) -> None:
    assert values(written).is_log is is_log
