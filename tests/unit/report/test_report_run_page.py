"""The page of a run: what it says, what it leaves out, and that nothing of a run becomes part of the page's code.

The page is rendered without pictures here, which take seconds; a real browser looks at whole pages in tests/engine.
"""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from recorded_pages import HOSTILE, summary_rows, write_run

from raydistill.errors import UserError
from raydistill.evaluate.paired import PairedDifference
from raydistill.report import run_page
from raydistill.report.listing import results_command
from raydistill.report.page import Picture, cell, plain, table_of
from raydistill.report.run_view import RunView, comparison_of, view_of
from raydistill.report.summary import ending, format_seconds, sentences, what_was_done
from raydistill.results.record import RunRecord, read_record
from raydistill.results.tables import with_error
from raydistill.study.decision import Line


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_page, "picture", lambda alt, draw: Picture(alt=alt, light="data:,l", dark="data:,d"))


class Tags(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def view(folder: Path) -> RunView:
    return view_of(read_record(folder), folder)


def test_the_page_tells_the_run_and_its_hostile_text_stays_text(tmp_path: Path) -> None:
    page = run_page.run_page(view(write_run(tmp_path / "mine")))
    tags = Tags(page)
    for said in (
        "tiny as int2 (groups of 32, zero points, searched scales) learned from its own full-precision model",
        "Held-out KL to the teacher improved from 0.5 to 0.07143 nats per token.",
        "Worth shipping: student beats the best PTQ of the same size (ptq-int2)",
        "It finished after 6 of 6 steps",
        "Trainer waited 50% of the wall time, mostly for rollout-0",
        "furthest apart at version 6 (rollout-0): 6.0e-06 nats",
        "It is 4.",
        "I say 0.",
        "I say 6.",
        "trainer.learning_rate",
        "peak learning rate",
    ):
        assert said in tags.text, said
    assert tags.text.count(HOSTILE) == 3, "warning, table, prompt"
    assert [name for name, _ in tags.elements].count("script") == 1
    assert not [name for name, attributes in tags.elements if any(key.startswith("on") for key in attributes)]


def test_the_page_loads_nothing_and_its_policy_allows_its_own_script_alone(tmp_path: Path) -> None:
    import base64
    import hashlib

    page = run_page.run_page(view(write_run(tmp_path / "mine")))
    addresses = [
        value
        for _, attributes in Tags(page).elements
        for key, value in attributes.items()
        if key in ("src", "href", "srcset", "action")
    ]
    assert all(str(value).startswith(("data:", "#")) for value in addresses)
    script = re.search(r"<script>(.*)</script>", page, re.S)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert script is not None
    assert policy is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert policy[1].startswith("default-src 'none'")
    assert f"script-src 'sha256-{digest}'" in policy[1].replace("&#39;", "'")
    assert "url(" not in page


def test_sections_are_there_only_where_the_record_has_something_for_them(tmp_path: Path) -> None:
    with RunRecord(tmp_path / "bare") as record:
        record.start(name="bare", config={}, provenance={}, seed=0)
    page = run_page.run_page(view(tmp_path / "bare"))
    ids = {attributes["id"] for _, attributes in Tags(page).elements if "id" in attributes}
    assert ids == {"summary", "settings", "record"}
    assert "has not ended (or was killed)" in page
    whole = run_page.run_page(view(write_run(tmp_path / "whole")))
    ids = {str(attributes["id"]) for _, attributes in Tags(whole).elements if "id" in attributes}
    assert ids == {"summary", "comparison", "curves", "timeline", "gap", "samples", "settings", "record"}
    anchors = {str(attributes["href"])[1:] for name, attributes in Tags(whole).elements if name == "a"}
    assert anchors == ids


def test_an_arm_of_a_study_is_measured_by_the_table_recorded_beside_it(tmp_path: Path) -> None:
    student = view(write_run(tmp_path / "20260101-000000-student", comparison=False))
    assert comparison_of(student) is None
    with RunRecord(tmp_path / "20260101-000000-comparison") as record:
        record.start(name="x", config={}, provenance={}, seed=0)
        record.table("comparison", [line.to_json() for line in study_lines()])
    found = comparison_of(student)
    assert found is not None
    assert found.rows == summary_rows(), "what is not there has no row"
    assert found.is_about_this_run
    control = comparison_of(view(write_run(tmp_path / "20260101-000000-gold-ce", comparison=False)))
    assert control is not None
    assert not control.is_about_this_run
    page = run_page.run_page(student)
    assert "Worth shipping: student beats the best PTQ of the same size (ptq-int2)" in page
    assert 'id="comparison"' in page
    assert 'id="comparison"' in run_page.run_page(view(tmp_path / "20260101-000000-comparison"))


def study_lines() -> list[Line]:
    """As a study records them."""
    test = PairedDifference(difference=-0.1, se=0.01, p_value=0.001)
    lines = [
        Line(name=row.name, role=row.role, row=row, tests={"kl_nats": test}, device_seconds={"trainer": 3.0})
        for row in summary_rows()
    ]
    return [*lines, Line(name="awq-int2", role="ptq", row=None, reason="2 bits are not supported")]


def test_a_run_that_failed_says_why_and_a_resumed_one_goes_on(tmp_path: Path) -> None:
    with RunRecord(tmp_path) as record:
        record.start(name="n", config={"trainer": {"num_steps": 3}}, provenance={}, seed=0)
        record.step(0, {})
        record.end("failed", "out of luck")
        assert ending(view(tmp_path)).endswith("out of luck")
        assert ending(view(tmp_path)).startswith("failed after 1 of 3 steps")
        record.cut_back(1)
        assert view(tmp_path).status == "running"


def test_the_summary_names_the_objective_in_words() -> None:
    base = {
        "student": {"model": "/models/teacher"},
        "teacher": {"model": None},
        "quant": {"format": "int4", "group_size": "channel", "symmetric": True, "scale": "absmax"},
        "objective": {"on_policy_fraction": 1, "beta": 1, "distill_weight": 1},
        "trainer": {"num_steps": 1000, "sequences_per_step": 8},
        "adapter": {"mode": "served", "rank": 4},
    }
    said = what_was_done(base)
    assert "models/teacher as int4 (one scale per channel, symmetric, absmax scales)" in said
    assert "the student's own completions (lambda 1), by reverse KL (beta 1): 1,000 steps" in said
    assert "an adapter of rank 4, served beside the codes" in said
    assert "cross-entropy, without a teacher" in what_was_done(
        base | {"objective": base["objective"] | {"distill_weight": 0}}
    )  # type: ignore[operator]
    assert what_was_done({}) == ""


def test_a_metric_that_got_worse_says_so_and_names_its_best_version(tmp_path: Path) -> None:
    lines = [{"kind": "start", "time_s": 0.0, "config": {}}, {"kind": "step", "time_s": 1.0, "step": 0, "metrics": {}}]
    for version, kl in ((0, 0.2), (5, 0.1), (10, 0.4)):
        lines.append({"kind": "evaluation", "time_s": 1.0, "version": version, "metrics": {"evaluate/kl_nats": kl}})
    said = " ".join(sentences(view_of(lines, tmp_path), ()))
    assert "got worse, from 0.2 to 0.4 nats per token (best: 0.1 at version 5)" in said


def test_numbers_are_shown_to_the_digits_that_their_errors_leave() -> None:
    assert with_error(0.98828, 0.00673) == "0.9883 ± 0.0067"
    assert with_error(12.345, 1.5) == "12.3 ± 1.5"
    assert with_error(0.123456, None) == "0.1235"
    assert with_error(0.5, 0.0) == "0.5"
    assert with_error(1e-9, 2e-10) == "1e-09 ± 2e-10"
    assert [format_seconds(s) for s in (0.4, 59.7, 3661, 36000)] == ["0 s", "1 min 0 s", "1 h 01 min", "10 h 00 min"]
    assert (plain(None), plain(True), plain([1, 0.5]), plain({"a": 1})) == ("-", "yes", "1, 0.5", "a=1")


def test_a_column_sorts_as_numbers_only_if_it_holds_nothing_else() -> None:
    table = table_of([{"a": 1, "b": "x", "c": None}, {"a": float("nan"), "b": 2, "c": None}, {"a": None, "b": 3}])
    assert table.columns == ("a", "b", "c")
    assert table.is_number == (False, False, False), "nan is text"
    assert table_of([{"a": 1}, {"a": None}]).is_number == (True,)
    assert cell(True).value is None


def test_the_command_writes_the_page_into_the_run_folder_or_where_it_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "runs" / "mine")
    assert results_command(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert results_command(["report", "mine", "--output", str(tmp_path), "-o", str(tmp_path / "deep" / "r.html")]) == 0
    assert (tmp_path / "deep" / "r.html").read_text().startswith("<!doctype html>")
    with pytest.raises(UserError, match="is a folder"):
        results_command(["report", str(folder), "-o", str(tmp_path)])
    with pytest.raises(UserError, match="no results at"):
        results_command(["report", "other", "--output", str(tmp_path)])
