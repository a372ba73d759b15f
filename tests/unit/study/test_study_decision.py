import io
import math
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from raydistill.evaluate.paired import RowValues
from raydistill.results.tables import Measure, SummaryRow
from raydistill.study.decision import Line, compare_rows, merge_seeds, paired_compare
from raydistill.study.decision_table import decision_markdown, decision_tables, missing_lines, num_tests

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


@pytest.mark.parametrize("width", [80, 100, 120, 160])
def test_a_narrow_terminal_gets_every_number_but_the_differences_and_every_name_whole(width):
    """The error of KL and perplexity among them; what several seeds add stays as long as it costs no further table."""
    said = {"teacher": (1, 1, 2, 4), "rtn-int2": (3, 3, 6, 12), "s0": (2, 1, 4, 9)}
    found = [with_text(name, nats) for name, nats in said.items()]
    rows = [replace(one, name=one.name.replace("s0", "off-policy")) for one, _ in found]
    values = {one.name: scores for one, (_, scores) in zip(rows, found, strict=True)}
    lines = compare_rows(
        rows, values, "rtn-int2", {"off-policy": 0.25}, {"off-policy": 3}, {"off-policy": {"trainer": 9.0}}
    )

    text = printed(lines, width)
    assert ("against rtn-int2" in text) == (width == 160)
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    assert text.count("off-policy") == (2 if width == 80 else 1), "as few tables as hold it all"
    for cell in ("0.75 ± 0.24", "75.0 ± 21.7 %", "7.4 ± 1.5", "0.12", "device-s", " 9 "):
        assert cell in text, cell
    assert ("(3 seeds)" in text) == ("(sd 0.25)" in text) == (width != 100)
    assert "off-policy (3 seeds)" in printed(lines, 400) and "against rtn-int2" in printed(lines, 400)


def printed(lines, width):
    console = Console(width=width, file=io.StringIO())
    for table in decision_tables(lines, "rtn-int2", console):
        console.print(table)
    return console.file.getvalue()


def with_text(name, nats):
    """The row and the values of a model that says so many nats of each reference."""
    text = RowValues(row_ids=IDS, values_R=np.array(nats, float), weights_R=np.array((1, 1, 2, 4), float))
    perplexity, error = text.perplexity
    found = next(one for one in ROWS if one.name == name)
    return replace(found, perplexity=perplexity, perplexity_se=error), VALUES[name] | {"cross_entropy_nats": text}


def test_perplexity_has_an_error_and_is_tested_row_by_row():
    pairs = [with_text("rtn-int2", (3, 3, 6, 12)), with_text("s0", (2, 1, 4, 9)), with_text("s1", (1, 2, 2, 7))]
    values = {row.name: found for row, found in pairs}
    rows, merged, _ = merge_seeds([row for row, _ in pairs], values, {"on-policy": ["s0", "s1"]})
    lines = compare_rows(rows, merged, "rtn-int2", {}, {}, {})
    test = lines[1].tests["cross_entropy_nats"]
    assert rows[1].perplexity == pytest.approx(math.exp(14 / 8)), "of the mean of 16 / 8 and 12 / 8 nats per token"
    rest = np.array([1.5, 1.5, 3, 8]) - 14 / 8 * np.array([1, 1, 2, 4])
    assert rows[1].perplexity_se == pytest.approx(math.exp(14 / 8) * math.sqrt(4 / 3 * (rest**2).sum()) / 8)
    assert (test.difference, test.p_value) == (pytest.approx(14 / 8 - 3), pytest.approx(2 / 16))
    text = decision_markdown(lines, "rtn-int2").splitlines()
    assert text[0].endswith("| perplexity | p | device-s |")
    assert text[3].endswith("| **5.75 ± 0.97** | **0.12** | **-** |")


def hits(numbers):
    ids = tuple(map(str, range(len(numbers))))
    return RowValues(row_ids=ids, values_R=np.array(numbers, float), weights_R=np.ones(len(numbers)))


def with_tasks(name, numbers, bits):
    share = Measure(value=float(np.mean(numbers)), se=0.1, is_share=True)
    measures = {
        "last number": Measure(value=0.5, se=0.1, is_share=True),
        "arc_easy acc": Measure(value=0.9, se=0.1, is_share=True),
        "arc_easy acc_norm": share,
        "wikitext word_perplexity": Measure(value=bits, se=0.25, is_share=False),
        "wikitext bits_per_byte": Measure(value=1.0, se=None, is_share=False),
        "mmlu acc": Measure(value=0.25, se=None, is_share=True),  # summed up over its tasks: no documents
    }
    found = next(one for one in ROWS if one.name == name)
    return replace(found, measures=measures), VALUES[name] | {"arc_easy acc_norm": hits(numbers)}


def task_lines():
    pairs = [
        *(with_tasks("teacher", [1] * 8, 10.0), with_tasks("rtn-int2", [0] * 7 + [1], 40.0)),
        *(with_tasks("s0", [1] * 7 + [0], 20.0), with_tasks("s1", [1] * 8, 22.0)),
    ]
    values = {row.name: found for row, found in pairs}
    rows, merged, spread = merge_seeds([row for row, _ in pairs], values, {"mixed": ["s0"], "on-policy": ["s1"]})
    return compare_rows(rows, merged, "rtn-int2", spread, {}, {})


def test_each_task_has_a_column_of_its_main_measure_and_a_paired_test():
    lines = task_lines()
    text = decision_markdown(lines, "rtn-int2").splitlines()
    tasks = "| arc_easy acc_norm | p | wikitext word_perplexity | mmlu acc |"
    assert text[0].endswith(f"| perplexity {tasks} device-s |")
    assert text[2].endswith("| 100.0 ± 10.0 % | - | 10.00 ± 0.25 | 25.0 % | - |")
    # McNemar of eight documents, seven better and one worse
    assert text[4].endswith("| **87.5 ± 10.0 %** | **0.07** | **20.00 ± 0.25** | **25.0 %** | **-** |")
    told = lines[2].to_json()
    assert told["tests"]["arc_easy acc_norm"]["difference"] == 6 / 8
    assert told["measures"]["arc_easy acc"]["value"] == 0.9, "the JSON has them all"
    assert num_tests(lines) == 2 * 3, "KL, exact match and arc_easy of two students"


def test_tasks_that_do_not_fit_beside_the_rest_get_tables_of_their_own():
    lines = task_lines()
    assert printed(lines, 400).count("on-policy") == 1
    narrow = printed(lines, 80)
    assert " Tasks " in narrow and "…" not in narrow
    assert max(map(len, narrow.splitlines())) <= 80
    tight = printed(lines, 52)
    assert tight.count("Tasks") == 2, "two tasks fit beside each other"
    for text in ("arc_easy acc_norm", "wikitext word_perplexity", "mmlu acc"):
        assert text in narrow and text in tight


def test_seeds_of_a_task_are_averaged_document_by_document():
    pairs = [with_tasks("rtn-int2", [0] * 8, 40.0), with_tasks("s0", [1, 0] * 4, 20.0), with_tasks("s1", [1] * 8, 22.0)]
    values = {row.name: found for row, found in pairs}
    rows, merged, _ = merge_seeds([row for row, _ in pairs], values, {"on-policy": ["s0", "s1"]})
    measures = rows[1].measures
    assert measures["arc_easy acc_norm"]["value"] == 0.75
    assert measures["arc_easy acc_norm"]["se"] == pytest.approx(0.25 / math.sqrt(7)), "of 1 and 0.5, by turns"
    assert measures["wikitext word_perplexity"] == Measure(value=21.0, se=0.25, is_share=False)
    assert measures["mmlu acc"]["se"] is None
    assert compare_rows(rows, merged, "rtn-int2", {}, {}, {})[1].tests["arc_easy acc_norm"].difference == 0.75
