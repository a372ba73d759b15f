import io
import math

import numpy as np
import pytest
from rich.console import Console

from raydistill.evaluate.paired import RowValues
from raydistill.results.tables import SummaryRow
from raydistill.study.decision import (
    Line,
    compare_rows,
    decision_markdown,
    decision_table,
    merge_seeds,
    missing_lines,
    paired_compare,
)

IDS = ("a", "b", "c", "d")


def values(kl, hits=None, tokens=(1, 1, 2, 4)):
    def of(numbers, weights):
        return RowValues(row_ids=IDS, values_R=np.array(numbers, float), weights_R=np.array(weights, float))

    found = {"kl_nats": of(kl, tokens)}
    return found if hits is None else found | {"exact_match": of(hits, (1, 1, 1, 1))}


def row(name, role, scores, size=1000):
    match = scores.get("exact_match")
    return SummaryRow(
        name=name, role=role, kl_nats=scores["kl_nats"].mean, kl_se=scores["kl_nats"].standard_error, bytes=size,
        perplexity=1.5, exact_match=match and match.mean, num_rows=match and 4,
        exact_match_se=match and math.sqrt(match.mean * (1 - match.mean) / 4),
    )  # fmt: skip


VALUES = {
    "teacher": values([0, 0, 0, 0], [1, 1, 1, 1]),
    "rtn-int2": values([4, 4, 4, 4], [0, 0, 0, 1]),
    "s0": values([1, 2, 1, 2], [1, 1, 0, 1]),
    "s1": values([3, 2, 1, 0], [1, 1, 1, 1]),
}
ROWS = [
    row("teacher", "teacher", VALUES["teacher"], 9000),
    row("rtn-int2", "ptq", VALUES["rtn-int2"]),
    row("s0", "student", VALUES["s0"]),
    row("s1", "student", VALUES["s1"]),
]


def test_seeds_become_one_line_of_the_mean_over_seeds_row_by_row():
    rows, merged, spread = merge_seeds(ROWS, VALUES, {"on-policy": ["s0", "s1"]})
    assert [one.name for one in rows] == ["teacher", "rtn-int2", "on-policy"]
    np.testing.assert_array_equal(merged["on-policy"]["kl_nats"].values_R, [2, 2, 1, 1])
    assert rows[2].kl_nats == 6 / 8
    assert rows[2].exact_match == 7 / 8
    assert spread == {"on-policy": pytest.approx(0.0)}, "both seeds have 6 / 8"
    assert rows[1] == ROWS[1]


def test_a_single_seed_keeps_its_scores_under_the_arms_name():
    rows, _, spread = merge_seeds(ROWS[:3], VALUES, {"on-policy": ["s0"]})
    assert rows[2].name == "on-policy"
    assert (rows[2].kl_nats, rows[2].exact_match_se) == (ROWS[2].kl_nats, ROWS[2].exact_match_se)
    assert spread == {}


def test_everything_but_the_teacher_is_compared_with_the_reference_and_that_with_nothing():
    lines = compare_rows(ROWS, VALUES, "rtn-int2", {}, {"s0": 1}, {"s0": {"rollout": 3.0, "trainer": 4.0}})
    tests = {line.name: line.tests for line in lines}
    assert tests["teacher"] == tests["rtn-int2"] == {}
    assert tests["s0"]["kl_nats"].difference == (6 - 16) / 8
    assert tests["s0"]["kl_nats"].p_value == pytest.approx(2 / 16)  # four rows, all the same way
    assert tests["s0"]["exact_match"].difference == 0.5
    assert tests["s0"]["exact_match"].p_value == 0.5  # McNemar of two rows, both the same way
    assert lines[2].cost == 7.0
    assert lines[1].cost is None


def test_without_a_reference_nothing_is_compared():
    assert all(line.tests == {} for line in compare_rows(ROWS, VALUES, None, {}, {}, {}))


def test_the_table_says_what_each_line_is_worth_and_why_a_line_is_empty():
    lines = compare_rows(ROWS[:3], VALUES, "rtn-int2", {"s0": 0.25}, {"s0": 3}, {"s0": {"trainer": 12.4}})
    lines.insert(2, Line(name="gptq-int2", role="ptq", row=None, reason="ValueError: 2 | 3"))
    text = decision_markdown(lines, "rtn-int2").splitlines()
    assert text[0] == (
        "| model | size | KL (nats/token) | against rtn-int2 | p | exact match | against rtn-int2 | p | perplexity | device-s |"
    )
    assert text[2].startswith("| teacher | 9 KB | 0 | - | - | 100.0 ± 0.0 % |")
    assert text[4] == "| gptq-int2 | - | - | - | - | - | - | - | - | - |"
    assert text[5].startswith("| **s0 (3 seeds)** | **1 KB** | **0.75 ±")
    assert "**(sd 0.25)**" not in text[5]
    assert "(sd 0.25)** | **-1.2" in text[5]
    assert "**+50.0 ±" in text[5]
    assert text[5].endswith("| **1.500** | **12** |")
    assert missing_lines(lines) == ["gptq-int2: ValueError: 2 | 3"]


def test_without_exact_match_its_columns_are_left_out_and_json_holds_every_number():
    bare = {name: {"kl_nats": scores["kl_nats"]} for name, scores in VALUES.items()}
    rows = [row(one.name, one.role, bare[one.name]) for one in ROWS]
    lines = compare_rows(rows, bare, "rtn-int2", {}, {}, {})
    assert "exact match" not in decision_markdown(lines, "rtn-int2")
    told = lines[2].to_json()
    test = lines[2].tests["kl_nats"]
    assert told["tests"] == {"kl_nats": {"difference": -1.25, "se": test.se, "p_value": test.p_value}}
    assert told["kl_se"] == rows[2].kl_se


def test_the_verdict_compares_answers_pair_by_pair_where_they_are_known():
    compare = paired_compare(VALUES)
    found = compare(ROWS[2], ROWS[1])
    assert (found.value, found.p_value) == (0.5, 0.5)
    assert not found.is_real
    stranger = row("other", "ptq", VALUES["rtn-int2"])
    assert compare(ROWS[2], stranger).p_value is None


def test_a_narrow_terminal_gets_a_table_that_fits_with_every_name_whole():
    rows = [*ROWS[:2], row("off-policy", "student", VALUES["s0"])]
    values = VALUES | {"off-policy": VALUES["s0"]}
    lines = compare_rows(rows, values, "rtn-int2", {"off-policy": 0.25}, {"off-policy": 3}, {})

    def printed(width, is_narrow):
        console = Console(width=width, file=io.StringIO())
        console.print(decision_table(lines, "rtn-int2", is_narrow))
        return console.file.getvalue()

    narrow = printed(80, True)
    assert "(p: of no difference to rtn-int2)" in narrow
    for text in ("off-policy", "75.0 ± 21.7 %", "0.12", "device-s"):
        assert text in narrow
    assert "…" not in narrow
    wide = printed(150, False)
    assert "off-policy (3 seeds)" in wide
    assert "…" not in wide
