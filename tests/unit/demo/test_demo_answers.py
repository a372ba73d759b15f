"""Reading final numbers out of answers."""

import pytest

from raydistill.demo.answers import exact_match, final_number, flexible_match, last_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12+7=19\n#### 19", "19"),
        ("####19", "19"),
        ("#### -5", "-5"),
        ("#### +5", "5"),
        ("#### 1,234,567", "1234567"),
        ("#### $1,200.50", "1200.5"),
        ("#### -$3.00", "-3"),
        ("#### $-3", "-3"),
        ("#### 0.50", "0.5"),
        ("#### .5", "0.5"),
        ("#### 007", "7"),
        ("#### -0", "0"),
        ("#### 3.", "3"),
        ("#### 42 apples.", "42"),
        ("#### 1\n#### 2", "2"),
        ("the answer is 12", None),
        ("#### twelve", None),
        ("### 12", None),
        ("", None),
    ],
)
def test_final_number_trusts_only_the_marker(text: str, number: str | None) -> None:
    assert final_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("the answer is 12.", "12"),
        ("from 3 to 1,000 dollars", "1000"),
        ("#### 7 of the 9", "7"),
        ("it costs $4.50", "4.5"),
        ("12-7=5", "5"),
        ("no number", None),
    ],
)
def test_last_number_falls_back_to_the_last_number_of_the_text(text: str, number: str | None) -> None:
    assert last_number(text) == number


def test_exact_match_compares_values_and_an_unmarked_prediction_is_wrong() -> None:
    assert exact_match("so #### 1,000.0", "#### 1000")
    assert not exact_match("so 1000", "#### 1000")
    assert not exact_match("#### 19", "#### 9")
    assert not exact_match("no", "no")


@pytest.mark.parametrize(
    ("prediction", "is_right"),
    [
        ("so 1000", True),  # where exact_match says no
        ("first 7, then $1,000.00 in all.", True),
        ("1000, less 1", False),
        ("#### 999, or 1000", False),  # what is marked counts
        ("no number", False),
    ],
)
def test_flexible_match_takes_the_last_number_of_an_unmarked_prediction(prediction: str, is_right: bool) -> None:
    assert flexible_match(prediction, "600 + 400 = 1000\n#### 1000") == is_right
    assert not exact_match(prediction, "#### 1000")


def test_flexible_match_needs_a_marked_reference() -> None:
    assert not flexible_match("1000", "it is 1000")
