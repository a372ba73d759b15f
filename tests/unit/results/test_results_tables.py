"""The comparison table and its verdict: honest about size and noise."""

import json
import math

import pytest
from rich.console import Console

from raydistill.report.verdict import Difference, difference, next_steps, verdict
from raydistill.results.tables import (
    Role,
    SummaryRow,
    comparison_json,
    comparison_markdown,
    comparison_table,
    format_bytes,
    format_kl,
    recovered_share,
)


def row(
    name: str, role: Role, match: float | None, kl: float | None, size: int, num_rows: int | None = 512
) -> SummaryRow:
    se = None if match is None or not num_rows else math.sqrt(match * (1 - match) / num_rows)
    return SummaryRow(
        name=name, role=role, exact_match=match, exact_match_se=se, kl_nats=kl, bytes=size, num_rows=num_rows
    )


TEACHER = row("teacher", "teacher", 0.961, 0.0, 1_612_000)
INT4 = row("int4", "ptq", 0.963, 0.0003, 202_000)
INT3 = row("int3", "ptq", 0.850, 0.0200, 157_000)
INT2 = row("int2", "ptq", 0.766, 0.0340, 112_000)
STUDENT = row("int2 student", "student", 0.943, 0.0039, 112_000)


def test_recovered_share_of_a_gap() -> None:
    assert recovered_share(0.96, 0.76, 0.86) == pytest.approx(0.5)
    assert recovered_share(0.0, 0.034, 0.0039) == pytest.approx(0.885, abs=1e-3)
    assert recovered_share(0.5, 0.5, 0.6) is None
    assert recovered_share(0.9, 0.8, 0.7) == pytest.approx(-1)


def test_a_student_that_beats_ptq_of_its_size_is_worth_shipping_and_the_larger_ptq_is_named() -> None:
    said = verdict([TEACHER, INT4, INT3, INT2, STUDENT])
    assert said.startswith("Worth shipping: int2 student beats the best PTQ of the same size (int2) by +17.7 ±")
    assert "plain int4 needs no training and would do" in said
    assert "1.8x the bytes" in said
    assert "int3" not in said, "int3 is really worse than the student"
    assert said.count(". ") == 0, "one sentence"
    assert said.endswith(".")


def test_a_paired_comparison_sees_what_two_error_bars_do_not() -> None:
    student = row("student", "student", 0.80, 0.0039, 112_000)
    assert "differs by no more than noise" in verdict([TEACHER, INT2, student])

    def paired(first: SummaryRow, second: SummaryRow) -> Difference | None:
        found = difference(first, second)
        return found and Difference(value=found.value, se=0.01, p_value=0.001)

    said = verdict([TEACHER, INT2, student], paired)
    assert said.startswith("Worth shipping: student beats the best PTQ of the same size (int2) by +3.4 ± 2.0 points")


def test_without_a_larger_ptq_that_would_do_none_is_offered() -> None:
    assert "would do" not in verdict([TEACHER, INT3, INT2, STUDENT])


def test_a_student_larger_than_an_equal_ptq_is_not_shipped() -> None:
    served = row("served", "student", 0.951, 0.0034, 296_000)
    said = verdict([TEACHER, INT4, INT2, served])
    assert said.startswith("Do not ship served")
    assert "smaller" in said
    assert "int4" in said
    assert "adapter.mode='merged'" in next_steps([TEACHER, INT4, INT2, served])


def test_equal_exact_match_is_comparable_and_kl_decides() -> None:
    student = row("int4 student", "student", 0.965, 0.00018, 202_000)
    said = verdict([TEACHER, INT4, student])
    assert said.startswith("Comparable in exact match")
    assert "0.00018 against 0.00030" in said
    assert "judge by KL" in next_steps([TEACHER, INT4, student])


def test_a_worse_student_is_not_shipped() -> None:
    assert verdict([INT2, row("bad", "student", 0.60, 0.05, 112_000)]).startswith("Do not ship bad")


def test_a_difference_within_noise_is_never_called_better() -> None:
    student = row("s", "student", 0.79, 0.033, 112_000)
    assert verdict([INT2, student]).startswith("Not shown to be worth shipping")
    assert "evaluate on about" in next_steps([TEACHER, INT2, student])


@pytest.mark.parametrize(
    ("kl_nats", "said"),
    [
        (0.030, "Not shown to be worth shipping: s is no closer to the teacher than the best PTQ of the same size (p)"),
        (0.013, "Hardly worth shipping: s is closer to the teacher than the best PTQ of the same size (p) by 13% only"),
        (0.009, "Worth shipping by KL alone: s beats the best PTQ of the same size (p)"),
    ],
)
def test_without_exact_match_the_share_of_the_kl_decides(kl_nats: float, said: str) -> None:
    ptq, student = row("p", "ptq", None, 0.015, 112_000), row("s", "student", None, kl_nats, 112_000)
    assert verdict([ptq, student]).startswith(said)


def test_perfect_scores_on_few_rows_are_not_certain() -> None:
    gap = difference(row("a", "student", 1.0, 0.1, 1, num_rows=4), row("b", "ptq", 0.75, 0.1, 1, num_rows=4))
    assert gap is not None
    assert gap.se is not None
    assert not gap.is_real
    unknown = difference(row("a", "student", 1.0, 0.1, 1, num_rows=None), row("b", "ptq", 0.5, 0.1, 1, num_rows=None))
    assert unknown is not None
    assert unknown.se is None
    assert not unknown.is_real
    assert "no error bar" in str(unknown)


def test_the_two_sample_error_of_a_difference() -> None:
    gap = difference(
        SummaryRow(name="a", role="student", kl_nats=0, bytes=1, exact_match=0.6, exact_match_se=0.03),
        SummaryRow(name="b", role="ptq", kl_nats=0, bytes=1, exact_match=0.5, exact_match_se=0.04),
    )
    assert gap is not None
    assert gap.se == pytest.approx(0.05)
    assert gap.is_real
    assert str(gap) == "+10.0 ± 9.8 points"


def test_tables_without_student_or_ptq_or_exact_match_say_so() -> None:
    assert "no student" in verdict([TEACHER, INT4])
    assert "no plain quantization" in verdict([TEACHER, STUDENT])
    assert "Add the missing rows" in next_steps([TEACHER, INT4])
    kl_only = [row("p", "ptq", None, 0.1, 10), row("s", "student", None, 0.01, 10)]
    assert verdict(kl_only).startswith("Worth shipping by KL alone")
    assert "not measured" in verdict(kl_only)
    assert next_steps(kl_only)
    assert "stands alone at its size" in verdict([INT4, STUDENT])


def test_broken_numbers_do_not_break_the_verdict() -> None:
    for kl in (math.nan, math.inf, None):
        rows = [TEACHER, INT2, row("s", "student", 0.9, kl, 112_000)]
        assert verdict(rows)
        assert next_steps(rows)
        assert comparison_markdown(rows)


def test_table_markdown_and_json_show_the_same_rows() -> None:
    rows = [TEACHER, INT2, STUDENT]
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(comparison_table(rows, title="demo"))
    text, markdown = console.export_text(), comparison_markdown(rows)
    for shown in (text, markdown):
        assert "94.3% ± 1.0%" in shown
        assert "0.0039" in shown
        assert "112 KB" in shown
    assert "**int2 student**" in markdown
    assert markdown.count("\n") == 5
    assert json.loads(json.dumps(comparison_json(rows)))[2]["bytes"] == 112_000


def test_extras_become_columns_and_a_bar_in_a_name_does_not_break_markdown() -> None:
    special = SummaryRow(name="a|b", role="ptq", kl_nats=0.1, bytes=1, extras={"seeds": 3.0, "note": "x"})
    lines = comparison_markdown([special, INT2]).splitlines()
    assert "seeds" in lines[0]
    assert "a\\|b" in lines[2]
    assert lines[3].endswith("| - | - |")


@pytest.mark.parametrize(
    ("size", "text"), [(5, "5 B"), (999, "999 B"), (1000, "1 KB"), (112_000, "112 KB"), (1_612_000, "1.61 MB")]
)
def test_sizes_read_well(size: int, text: str) -> None:
    assert format_bytes(size) == text


@pytest.mark.parametrize(("nats", "text"), [(0, "0"), (2.325, "2.3"), (0.034, "0.034"), (0.0003, "0.00030")])
def test_kl_reads_well(nats: float, text: str) -> None:
    assert format_kl(nats) == text
