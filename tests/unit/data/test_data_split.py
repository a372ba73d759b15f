import random

import pytest

from raydistill.data.rows import Message, Row, read_rows
from raydistill.data.split import check_disjoint, pick_rows, prompt_key, split_rows
from raydistill.errors import DataError


def row(prompt: str, answer: str = "a") -> Row:
    return Row(f"{prompt}:{answer}", (Message("user", prompt), Message("assistant", answer)))


ROWS = [row(f"question {n}") for n in range(200)]


def test_split_covers_all_rows_once():
    train, held_out = split_rows(ROWS, 30)
    assert len(held_out) == 30 and len(train) == 170
    assert {r.row_id for r in train} | {r.row_id for r in held_out} == {r.row_id for r in ROWS}
    check_disjoint(train, held_out)


def test_held_out_rows_do_not_depend_on_order_or_white_space():
    shuffled = [row(f"  {r.prompt[0].content}\n") for r in ROWS]
    random.Random(3).shuffle(shuffled)
    first, second = split_rows(ROWS, 30)[1], split_rows(shuffled, 30)[1]
    assert [prompt_key(r) for r in first] == [prompt_key(r) for r in second]


def test_fewer_held_out_rows_are_a_part_of_more():
    assert pick_rows(ROWS, 30)[:10] == pick_rows(ROWS, 10)


def test_a_prompt_with_several_answers_is_on_one_side_only():
    rows = [row(f"question {n % 20}", f"answer {n}") for n in range(100)]
    train, held_out = split_rows(rows, 5)
    assert len({prompt_key(r) for r in held_out}) == len(held_out) == 5 and len(train) == 75
    check_disjoint(train, held_out)
    assert split_rows(rows[::-1], 5)[1] == held_out


def test_no_eval_rows_leaves_everything_to_training():
    assert split_rows(ROWS, 0) == (tuple(ROWS), ())


def test_holding_out_everything_is_an_error():
    with pytest.raises(DataError, match=r"data.eval_rows=256 holds out all 200 prompts"):
        split_rows(ROWS, 256)


def test_overlap_is_counted_and_shown():
    evaluation = [row("new"), row("question  7", "another answer"), row("question 9")]
    with pytest.raises(DataError, match=r"2 of 3 evaluation rows .*first row .*'question 7'.*data.eval_path unset"):
        check_disjoint(ROWS, evaluation)


def test_gsm8k_train_and_test_are_disjoint(gsm8k):
    train, test = read_rows(gsm8k / "train.jsonl").rows, read_rows(gsm8k / "test.jsonl").rows
    check_disjoint(train, test)
    with pytest.raises(DataError, match="1 of 1320 evaluation rows"):
        check_disjoint(train, [*test, train[5]])
