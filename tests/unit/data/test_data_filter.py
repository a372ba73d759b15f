import numpy as np
import pytest

from raydistill.config import DataSection
from raydistill.data.encode import Example
from raydistill.data.rows import Message, Row
from raydistill.data.structural_filter import check_model_length, filter_rows, length_verdict
from raydistill.errors import DataError

SECTION = DataSection(max_length=100, min_prompt_room=20, min_completion=10)


def row(prompt: str, answer: str | None = "x") -> Row:
    messages = (Message("user", prompt),)
    return Row(prompt, messages if answer is None else (*messages, Message("assistant", answer)))


def fake_encode(rows):
    """Rows named by their lengths, "prompt/reference"."""
    sizes = [[int(n) for n in r.row_id.split("/")] for r in rows]
    return [
        Example(r.row_id, np.zeros(p, np.int32), np.zeros(c, np.int32)) for r, (p, c) in zip(rows, sizes, strict=True)
    ]


@pytest.mark.parametrize(
    ("num_prompt", "num_reference", "verdict"),
    [
        (79, 21, "kept"),
        (80, 20, "prompt_too_long"),
        (10, 10, "kept"),
        (10, 9, "completion_too_short"),
        (10, 99, "kept"),  # cut to 90
        (10, 100, "too_long"),
        (79, None, "kept"),
        (80, None, "prompt_too_long"),
    ],
)
def test_the_rules_at_their_edges(num_prompt, num_reference, verdict):
    assert length_verdict(num_prompt, num_reference, SECTION) == verdict


def test_a_small_room_counts_as_a_short_completion():
    section = DataSection(max_length=100, min_prompt_room=5, min_completion=10)
    assert length_verdict(94, 50, section) == "completion_too_short"


def test_counts_sum_to_the_total_and_long_references_are_cut():
    lengths = ["10/10", "80/10", "10/9", "10/100", "50/60", "20/0"]
    rows = [*(row(name) for name in lengths), row("10/10", " \n"), row(" ")]
    kept, counts = filter_rows(rows, fake_encode, SECTION, num_bad=2)
    assert [e.row_id for e in kept] == ["10/10", "50/60", "20/0"]
    assert [e.num_tokens for e in kept] == [20, 100, 20]
    reasons = (counts.bad_rows, counts.empty_messages, counts.prompt_too_long)
    assert (*reasons, counts.completion_too_short, counts.too_long) == (2, 2, 1, 1, 1)
    assert counts.total == 10 and counts.kept == 3 and counts.cut == 1
    assert counts.summary().startswith("3 of 10 rows kept (1 cut to data.max_length), 2 bad rows, 2 empty messages")


def test_rows_that_the_encoder_leaves_out_count_as_bad():
    _, counts = filter_rows([row("10/10"), row("11/10")], lambda rows: fake_encode(rows[:1]), SECTION)
    assert counts.bad_rows == 1 and counts.kept == 1


@pytest.mark.parametrize(
    ("name", "way_out"),
    [
        ("10/4", r"Lower data.min_completion=10: the longest completion has 4 tokens"),
        ("85/40", r"Raise data.max_length=100 above 105 or lower data.min_prompt_room=20"),
        ("10/300", r"Raise data.max_length=100: the shortest completion has 300"),
    ],
)
def test_nothing_left_names_the_counts_and_the_field(name, way_out):
    with pytest.raises(DataError, match=rf"no row of data.path is left: 0 of 2 rows kept, 2 .*\. {way_out}"):
        filter_rows([row(name), row(name)], fake_encode, SECTION)


def test_only_blank_rows_is_an_error_too():
    with pytest.raises(DataError, match="1 empty messages"):
        filter_rows([row("10/10", " ")], fake_encode, SECTION)


def test_rows_beyond_the_models_positions_name_both_limits():
    (fits,) = fake_encode([row("40/24")])
    (prompt_only,) = fake_encode([row("64/0")])
    check_model_length([fits], SECTION, 64)
    for example in (fits, prompt_only):
        with pytest.raises(DataError, match=r"data.max_length=100 .*only (63|64) positions"):
            check_model_length([example], SECTION, 63 if example is fits else 64)
