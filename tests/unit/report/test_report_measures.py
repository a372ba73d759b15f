"""Measures beyond the common ones: columns with standard errors, JSON that is a row again, and the checkpoints' picture."""

import json
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from raydistill.report.plot_checkpoints import plot_checkpoints
from raydistill.results.tables import (
    Measure,
    SummaryRow,
    comparison_json,
    comparison_markdown,
    comparison_table,
    format_measure,
    transposed_table,
)

TASK = Measure(value=0.6123, se=0.0049, is_share=True)
TEXT = Measure(value=23.4167, se=0.213, is_share=False)
TEACHER = SummaryRow(name="teacher", role="teacher", kl_nats=0.0, bytes=10, measures={"arc acc": TASK})
STUDENT = SummaryRow(
    name="s", role="student", kl_nats=0.01, kl_se=0.002, bytes=5, measures={"arc acc": TASK, "t perplexity": TEXT}
)


def test_measures_are_columns_with_their_standard_errors() -> None:
    lines = comparison_markdown([TEACHER, STUDENT]).splitlines()
    assert lines[0].endswith("| size | arc acc | t perplexity |")
    assert lines[2].endswith("| 10 B | 61.2% ± 0.5% | - |")
    assert "| **0.010 ± 0.0020** |" in lines[3] and "| 0 |" in lines[2]
    assert lines[3].endswith("**61.2% ± 0.5%** | **23.42 ± 0.21** |")
    assert format_measure(Measure(value=1.5, se=None, is_share=False)) == "1.5"
    rows = [replace(TEACHER, perplexity=6.7864, perplexity_se=0.0531), replace(STUDENT, perplexity=6.7864)]
    lines = comparison_markdown(rows).splitlines()
    assert "| 6.786 ± 0.053 |" in lines[2] and "| **6.786** |" in lines[3]


def test_a_row_from_json_is_the_row_again() -> None:
    again = [SummaryRow(**row) for row in json.loads(json.dumps(comparison_json([TEACHER, STUDENT])))]
    assert again == [TEACHER, STUDENT]


def test_the_narrow_table_says_the_same_without_empty_lines() -> None:
    def said(table: object) -> str:
        console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(table)
        return console.export_text()

    wide, narrow = said(comparison_table([TEACHER, STUDENT])), said(transposed_table([TEACHER, STUDENT]))
    for text in ("61.2% ± 0.5%", "23.42 ± 0.21", "teacher", "0.010", "10 B"):
        assert text in wide and text in narrow
    assert "exact match" in wide and "exact match" not in narrow


def test_the_checkpoints_picture_is_written_for_one_step_and_for_many(tmp_path: Path) -> None:
    rows = {step: replace(STUDENT, kl_nats=0.1 / (1 + step), perplexity=1.1, exact_match=0.5) for step in (0, 10, 50)}
    for name, some in (("many", rows), ("one", {0: STUDENT})):
        path = plot_checkpoints(some, TEACHER, tmp_path / "plots" / f"{name}.png")
        assert path.read_bytes().startswith(b"\x89PNG")
