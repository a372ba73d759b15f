"""Sweeps: ranking with seeds merged, importance, files that are whole, and what is refused."""

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from recorded_pages import HOSTILE, trial, write_sweep

from raydistill.errors import UserError
from raydistill.report import sweep_page
from raydistill.report.importance import importance
from raydistill.report.page import Picture
from raydistill.report.plot_style import paper
from raydistill.report.report import report_command, sweep_folder
from raydistill.report.sweep import Estimate, ranked, read_sweep
from raydistill.report.sweep_page import table_markdown, table_rows, write_sweep_page
from raydistill.report.sweep_plots import field_of_curve, plot_over_field, plot_parallel, short_names
from raydistill.results.run_folders import LOCK


def points_of(folder: Path) -> Any:
    return ranked(read_sweep(folder))


def test_an_estimate_is_the_mean_over_seeds_with_its_standard_error() -> None:
    assert Estimate.of([]) is None
    assert Estimate.of([3.0]) == Estimate(mean=3.0, se=None, n=1)
    one = Estimate.of([1.0, 2.0, 3.0])
    assert one is not None
    assert (one.mean, one.n) == (2.0, 3)
    assert one.se == pytest.approx(1.0 / math.sqrt(3))
    assert str(one) == "2.00 ± 0.58"


def test_trials_that_differ_in_their_seed_are_one_point_and_the_best_comes_first(tmp_path: Path) -> None:
    points = points_of(write_sweep(tmp_path))
    assert [dict(point.values) for point in points[:2]] == [
        {"trainer.learning_rate": 1e-4, "quant.format": "int4"},
        {"trainer.learning_rate": 1e-3, "quant.format": "int4"},
    ]
    assert points[0].estimate.mean == pytest.approx(1.05e-4)
    assert points[0].estimate.se == pytest.approx(5e-6)
    assert [point.status for point in points] == ["finished"] * 5 + ["failed"]
    assert points[-1].errors == [f"loss is NaN {HOSTILE}"]


def test_the_same_run_again_is_no_other_seed(tmp_path: Path) -> None:
    trials = [trial(k, 0.2, trainer__learning_rate=1.0) for k in range(3)]
    (point,) = points_of(write_sweep(tmp_path, trials, fields=["trainer.learning_rate"]))
    assert point.estimate == Estimate(mean=0.2, se=None, n=1)
    seeds = [trial(k, value, trainer__learning_rate=1.0, run__seed=seed) for k, (seed, value) in enumerate(
        ((0, 0.2), (0, 0.2), (1, 0.4), (2, None)))]  # fmt: skip
    (point,) = points_of(write_sweep(tmp_path, seeds, fields=["trainer.learning_rate", "run.seed"]))
    assert (point.estimate.n, point.estimate.mean, point.num_seeds) == (2, pytest.approx(0.3), 3)
    assert "2 of 3" in table_markdown(read_sweep(tmp_path), [point])


@pytest.mark.parametrize(
    ("second", "is_clear"),
    [
        ((0.20, 0.21), False),  # 2.5 standard errors: of two seeds each that is nothing rare
        ((0.30, 0.31), True),
    ],
)
def test_two_seeds_show_a_difference_only_where_it_is_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: tuple[float, float], is_clear: bool
) -> None:
    monkeypatch.setattr(sweep_page, "picture", lambda alt, draw: Picture(alt=alt, light="data:,l", dark="data:,d"))
    values = {1.0: (0.15, 0.18), 2.0: second}
    trials = [
        trial(k, values[rate][seed], trainer__learning_rate=rate, run__seed=seed)
        for k, (rate, seed) in enumerate((rate, seed) for rate in values for seed in (0, 1))
    ]
    page = sweep_page.sweep_page(write_sweep(tmp_path, trials, fields=["trainer.learning_rate", "run.seed"]))
    assert ("It is clearly better than the next one" in page) is is_clear
    assert ("It is not shown to be better than the next one" in page) is not is_clear


def test_the_margin_of_a_difference_is_welchs() -> None:
    first, other = Estimate.of([0.1, 0.14, 0.12]), Estimate.of([0.3, 0.38])
    assert first is not None
    assert other is not None
    # Half of what scipy.stats.ttest_ind(..., equal_var=False).confidence_interval() spans.
    assert sweep_page._margin(first, other) == pytest.approx(0.3781461)
    same = Estimate(mean=0.1, se=0.0, n=2)
    assert sweep_page._margin(same, same) == 0.0


def test_the_order_is_finished_stopped_running_pending_failed_whatever_their_metrics(tmp_path: Path) -> None:
    trials = [
        trial(1, None, "failed", "x", trainer__learning_rate=1.0),
        trial(2, 0.0, "running", trainer__learning_rate=2.0),
        trial(3, 0.1, "stopped", trainer__learning_rate=3.0),
        trial(4, 0.5, trainer__learning_rate=4.0),
        trial(5, None, "pending", trainer__learning_rate=5.0),
        trial(6, 0.4, trainer__learning_rate=6.0),
        trial(7, float("nan"), trainer__learning_rate=7.0),
    ]
    points = points_of(write_sweep(tmp_path, trials, fields=["trainer.learning_rate"]))
    assert [point.values["trainer.learning_rate"] for point in points] == [6.0, 4.0, 7.0, 3.0, 2.0, 5.0, 1.0]
    rows = table_rows(read_sweep(tmp_path), points)
    assert [row["rank"] for row in rows] == [1, 2, None, None, None, None, None]
    highest = points_of(write_sweep(tmp_path, trials, fields=["trainer.learning_rate"], mode="max"))
    assert [point.values["trainer.learning_rate"] for point in highest][:2] == [4.0, 6.0]


def test_a_point_of_which_one_seed_failed_counts_the_others(tmp_path: Path) -> None:
    values = {"trainer__learning_rate": 1.0}
    trials = [trial(1, 0.2, run__seed=0, **values), trial(2, None, "failed", "no memory", run__seed=1, **values)]
    (point,) = points_of(write_sweep(tmp_path, trials, fields=["trainer.learning_rate", "run.seed"]))
    assert (point.status, point.estimate.n, point.errors) == ("finished", 1, ["no memory"])
    table = table_markdown(read_sweep(tmp_path), [point])
    assert "1 of 2" in table
    assert "no memory" in table


def test_importance_finds_the_field_that_matters_and_is_the_same_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raydistill.report.importance._NUM_TREES", 16)
    trials = [
        trial(number, rate * 10 + 1e-6 * rank, trainer__learning_rate=rate, adapter__rank=rank, quant__format="int2")
        for number, (rate, rank) in enumerate((rate, rank) for rate in (1e-4, 1e-3, 1e-2, 1e-1) for rank in (8, 16, 32))
    ]
    fields = ["trainer.learning_rate", "adapter.rank", "quant.format"]
    sweep = read_sweep(write_sweep(tmp_path, trials, fields=fields))
    found = importance(sweep, ranked(sweep))
    assert list(found.shares) == ["trainer.learning_rate", "adapter.rank"], "a field with one value is left out"
    assert found.shares["trainer.learning_rate"] > 0.9
    assert math.fsum(found.shares.values()) == pytest.approx(1.0)
    assert "fANOVA" in found.text
    assert importance(sweep, ranked(sweep)) == found


def test_importance_is_refused_below_four_distinct_finished_points(tmp_path: Path) -> None:
    trials = [trial(k, 0.1 * k, trainer__learning_rate=float(k % 3), run__seed=k) for k in range(9)]
    trials.append(trial(99, 0.3, "stopped", trainer__learning_rate=9.0))
    sweep = read_sweep(write_sweep(tmp_path, trials, fields=["trainer.learning_rate", "run.seed"]))
    found = importance(sweep, ranked(sweep))
    assert found.shares == {}
    assert found.text.startswith("3 distinct points have finished; with fewer than 4")
    same = [trial(k, 0.5, trainer__learning_rate=float(k)) for k in range(5)]
    sweep = read_sweep(write_sweep(tmp_path, same, fields=["trainer.learning_rate"]))
    assert "the same at all" in importance(sweep, ranked(sweep)).text


@pytest.mark.parametrize("trials", ["all", "none", "failed"])
def test_every_file_is_written_again_and_again_whatever_has_finished(
    trials: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_page, "picture", lambda alt, draw: Picture(alt=alt, light="data:,l", dark="data:,d"))
    some = {"all": None, "none": [], "failed": [trial(1, None, "failed", HOSTILE, trainer__learning_rate=1.0)]}[trials]
    folder = write_sweep(tmp_path / "rates", some)
    if trials == "none":
        (folder / "record.jsonl").unlink()
    for _ in range(2):
        written = write_sweep_page(folder)
        for path in (written.page, written.markdown, written.csv, written.json, *written.plots.values()):
            assert path.stat().st_size > 0 or trials == "none", path
    assert not list(folder.rglob(".*.new")), "nothing half-written is left"
    page = written.page.read_text()
    assert page.count("<script>") == 1
    assert ('id="settings"' in page) == (trials != "none"), "they are in the sweep's record"
    assert json.loads(written.json.read_text())["mode"] == "min"
    if trials == "all":
        rows = list(csv.DictReader(written.csv.open()))
        assert float(rows[0]["evaluate/kl_nats mean"]) == pytest.approx(1.05e-4)
        assert (rows[0]["runs"], rows[0]["n"]) == ("rates-03 rates-04", "2")
        assert "It is clearly better than the next one" in page
        assert list(written.plots) == ["importance", "curve", "parallel"]
        assert re.search(r'alt="importance: \S+ \d+ %, \S+ \d+ %"', page)
        settings = page[page.index('id="settings"') :]
        assert "trainer.num_steps" in settings
        assert "trainer.learning_rate" not in settings, "it varies: the base's value is nobody's"


def test_a_sweep_has_finished_when_all_its_trials_are_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_page, "picture", lambda alt, draw: Picture(alt=alt, light="data:,l", dark="data:,d"))
    one, other = (trial(k, 0.1 * k, trainer__learning_rate=float(k)) for k in (1, 2))

    def status(trials: list[Any], **head: Any) -> str:
        page = sweep_page.sweep_page(write_sweep(tmp_path, trials, fields=["trainer.learning_rate"], **head))
        found = re.search(r'<span class="pill (\w+)">', page)
        assert found
        assert ("1 trials have not begun" in page) == (len(trials) < head.get("num_trials", 0))
        return found[1]

    lock = FileLock(tmp_path / LOCK)
    with lock:  # as whoever runs the sweep
        assert status([one], num_trials=2) == "running", "between two trials"
        assert status([one, other | {"status": "running"}], num_trials=2) == "running"
        assert status([one], num_trials=2, paused=True) == "interrupted"
        assert status([one, other], num_trials=2) == "finished"
    assert status([one], num_trials=2) == "interrupted", "killed"
    assert status([one, other | {"status": "running"}], num_trials=2) == "interrupted"
    assert status([one, other | {"status": "stopped"}], num_trials=2) == "finished"
    assert status([one]) == "finished", "written before the number was"


def test_a_page_elsewhere_needs_no_folder_there_and_writes_nothing_beside_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep_page, "picture", lambda alt, draw: Picture(alt=alt, light="data:,l", dark="data:,d"))
    folder = write_sweep(tmp_path / "rates")
    before = sorted(path.name for path in folder.rglob("*"))
    to = tmp_path / "not" / "there" / "x.html"
    assert report_command([str(folder), "-o", str(to)]) == 0
    assert "Ranked table" in to.read_text()
    assert capsys.readouterr().out.strip() == str(to)
    assert sorted(path.name for path in folder.rglob("*")) == before
    assert report_command([str(folder)]) == 0
    assert (folder / "page.html").exists()


def test_the_curve_is_over_the_learning_rate_else_over_another_number(tmp_path: Path) -> None:
    sweep = read_sweep(write_sweep(tmp_path))
    assert field_of_curve(sweep, ranked(sweep)) == "trainer.learning_rate"
    betas = [trial(k, 0.1, objective__beta=0.1 * k, quant__format="int2") for k in range(3)]
    sweep = read_sweep(write_sweep(tmp_path, betas, fields=["quant.format", "objective.beta"]))
    assert field_of_curve(sweep, ranked(sweep)) == "objective.beta"
    sweep = read_sweep(write_sweep(tmp_path, betas, fields=["quant.format"]))
    assert field_of_curve(sweep, ranked(sweep)) is None
    assert short_names(["a.rank", "b.rank", "c.beta"]) == ["a.rank", "b.rank", "beta"]


@pytest.mark.parametrize(
    ("mode", "heights", "ticks"),
    [
        ("min", [[1, 1, 0], [0.5, 1, 2 / 3], [0, 0, 1]], {"0.1": 1, "0.2": 2 / 3, "0.4": 0}),
        ("max", [[0, 0, 0], [0.5, 1, 1 / 3], [1, 1, 1]], {"0.1": 0, "0.2": 1 / 3, "0.4": 1}),
    ],
)
def test_on_parallel_coordinates_better_is_higher_and_the_best_point_is_thick_and_on_top(
    tmp_path: Path, drawn: list[Any], mode: str, heights: list[list[float]], ticks: dict[str, float]
) -> None:
    trials = [
        trial(1, 0.1, trainer__learning_rate=1e-4, quant__format="int2"),
        trial(2, 0.2, trainer__learning_rate=1e-3, quant__format="int4"),
        trial(3, 0.4, trainer__learning_rate=1e-2, quant__format="int4"),
        trial(4, None, "failed", "x", trainer__learning_rate=1e-5, quant__format="int4"),
    ]
    sweep = read_sweep(write_sweep(tmp_path, trials, mode=mode, fields=["trainer.learning_rate", "quant.format"]))
    plot_parallel(sweep, ranked(sweep), tmp_path / "x.png")
    (axes,) = drawn[0].axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["learning_rate", "format", "kl_nats"]
    lines = [line for line in axes.lines if list(line.get_xdata()) == [0, 1, 2]]
    assert [pytest.approx(line.get_ydata()) for line in lines] == heights, "worst first"
    assert [line.get_linewidth() for line in lines] == [1.3, 1.3, 3.2]
    assert lines[2].get_color() == paper().lines[1] and lines[2].get_zorder() > lines[1].get_zorder()
    labels = {text.get_text().strip(): text.get_position()[1] for text in axes.texts if text.get_position()[0] == 2}
    assert labels == pytest.approx(ticks)


def test_the_curve_has_a_line_for_each_combination_of_the_others_with_its_errors(
    tmp_path: Path, drawn: list[Any]
) -> None:
    sweep = read_sweep(write_sweep(tmp_path))
    plot_over_field(sweep, ranked(sweep), "trainer.learning_rate", tmp_path / "x.png")
    (axes,) = drawn[0].axes
    assert [bars.get_label() for bars in axes.containers] == ["format int4", "format int2"], "the best one first"
    for bars, shift, rates in zip(axes.containers, (0.0, 0.1), ((1e-4, 1e-3, 1e-2), (1e-4, 1e-3)), strict=True):
        line, _, (errors,) = bars.lines
        assert line.get_xdata() == pytest.approx(rates)
        means = [shift + rate + 5e-6 for rate in rates]
        assert line.get_ydata() == pytest.approx(means)
        spans = [(low[1], high[1]) for low, high in errors.get_segments()]
        assert spans == [pytest.approx((mean - 5e-6, mean + 5e-6)) for mean in means], "of two seeds, 1e-5 apart"
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert axes.get_title(loc="left") == "kl_nats over learning_rate, lower is better"


def test_a_damaged_sweep_file_is_one_line_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sweep\.json cannot be read"):
        read_sweep(tmp_path)
    (tmp_path / "sweep.json").write_text("{ torn")
    with pytest.raises(UserError, match="is no JSON"):
        read_sweep(tmp_path)
    write_sweep(tmp_path, [{"run": "x", "status": "exploded", "values": {}}])
    with pytest.raises(UserError, match=r"trials\.0\.status"):
        read_sweep(tmp_path)


def test_a_sweep_is_found_by_its_folder_and_by_its_name(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "sweeps" / "rates")
    assert sweep_folder(str(folder), tmp_path) == folder
    assert sweep_folder("rates", tmp_path) == folder
    assert sweep_folder("other", tmp_path) is None
