"""`raydistill results` and its sub-verbs on run folders, and on rows that stand for a store (read in tests/engine)."""

import csv
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from raydistill.config import Config
from raydistill.errors import UserError
from raydistill.messages import EvalReport, Span
from raydistill.report import choosing, listing, table_files
from raydistill.report.compare import compare, titles_of
from raydistill.report.listing import results_command
from raydistill.results.query import find_run, list_runs, sort_runs
from raydistill.results.record import RunRecord
from raydistill.results.runs import RunRow, row_of_record


def run(name: str, metrics: dict[str, float], started_s: float = 0.0, **settings: Any) -> RunRow:
    return RunRow(
        name=name,
        id=name * 8,
        record_id=name,
        status="finished",
        started_s=started_s,
        seconds=1.0,
        parent=None,
        settings=settings,
        metrics=metrics,
        tags={"owner": "me"},
        folder=None,
    )


RUNS = [
    run("a", {"evaluate/kl_nats": 0.2, "evaluate/exact_match": 0.9}, 1, beta=0.0),
    run("b", {"evaluate/kl_nats": 0.1, "evaluate/exact_match": 0.8}, 2, beta=1.0, rank=8, skip=["x", "y"]),
    run("c", {}, 3),
    run("d", {"evaluate/kl_nats": float("nan")}, 4, rank="auto"),
]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "list_runs", lambda *_: RUNS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's folder with two evaluations, a table, a warning and a failure."""
    folder = tmp_path / "runs" / "mine"
    config = Config.model_validate({"trainer": {"num_steps": 4, "learning_rate": 0.5}, "quant": {"format": "int2"}})
    with RunRecord(folder) as record:
        record.start(name="mine", config=json.loads(config.model_dump_json()), provenance={}, seed=0)
        for step in range(3):
            record.step(step, {"trainer/loss": 1.0 / (step + 1)})
        for version, kl in ((0, 0.5), (3, 0.25)):
            span = Span(stage="evaluate", actor="e", step=version, start_s=0, end_s=1)
            metrics = {"evaluate/kl_nats": kl, "evaluate/exact_match": 0.5 + kl, "evaluate/exact_match_se": 0.01}
            record.evaluation(EvalReport(version=version, metrics=metrics, span=span))
        record.table("engines", [{"role": "rollout-0", "class": "vllm.LLM"}])
        record.warning("an actor died")
        record.artifact("export", folder / "export")
        record.end("failed", "out of luck")
    return folder


def test_runs_are_sorted_best_first_and_those_without_the_metric_last() -> None:
    assert [r.name for r in sort_runs(RUNS, "evaluate/kl_nats")] == ["b", "a", "d", "c"]
    assert [r.name for r in sort_runs(RUNS, "exact_match")] == ["a", "b", "d", "c"]
    assert [r.name for r in sort_runs(RUNS, "started")] == ["d", "c", "b", "a"]
    assert [r.name for r in sort_runs(RUNS, "beta")] == ["a", "b", "d", "c"]
    assert [r.name for r in sort_runs(RUNS[2:3], "evaluate/kl_nats")] == ["c"], "the usual order needs no metric"


def test_a_run_is_found_by_name_or_the_beginning_of_its_id_and_two_of_one_name_are_refused_with_their_ids() -> None:
    assert find_run(RUNS, "a").name == "a"
    assert find_run(RUNS, "bbb").name == "b"
    with pytest.raises(UserError, match="there are: a, b, c, d"):
        find_run(RUNS, "e")
    twins = [run("t", {}, 1), run("t", {}, 2)]
    with pytest.raises(UserError, match="2 runs are called 't'; give an id: tttttttt"):
        find_run(twins, "t")


def test_comparing_shows_differing_settings_and_all_metrics_of_any_number_of_runs() -> None:
    found = compare({"A": RUNS[0], "B": RUNS[1], "D": RUNS[3]})
    assert found["settings"]["beta"] == {"A": 0.0, "B": 1.0, "D": None}
    assert found["settings"]["rank"] == {"A": None, "B": 8, "D": "auto"}
    assert found["metrics"]["evaluate/kl_nats"] == {"A": 0.2, "B": 0.1, "D": None}
    assert compare({"A": RUNS[0], "same": RUNS[0]})["settings"] == {}


def test_columns_of_runs_with_one_name_are_told_apart_and_one_run_twice_is_refused() -> None:
    assert titles_of([RUNS[0], RUNS[1]]) == ["a", "b"]
    first, second = run("t", {}), RunRow(**{**_fields(run("t", {})), "id": "other-id"})
    assert titles_of([first, second]) == ["t (tttttttt)", "t (other-id)"]
    with pytest.raises(UserError, match="named twice"):
        titles_of([first, first])


def _fields(row: RunRow) -> dict[str, Any]:
    return {name: getattr(row, name) for name in RunRow.__dataclass_fields__}


def test_a_missing_store_is_a_user_error_and_is_not_created(tmp_path: Path) -> None:
    for more in ([], ["--ui"], ["--where", "kl < 1"]):
        with pytest.raises(UserError, match="no results at"):
            results_command(["--output", str(tmp_path), *more])
    with pytest.raises(UserError, match="no results at"):
        results_command(["show", "x", "--output", str(tmp_path)])
    with pytest.raises(UserError, match="no results at"):
        list_runs(f"sqlite:///{tmp_path}/results.db")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("store")
def test_the_list_prints_tables_chosen_columns_and_strict_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert results_command([]) == 0
    assert "0.2" in capsys.readouterr().out
    assert results_command(["--where", "kl < 0.15", "--columns", "run, skip,kl,owner"]) == 0
    out = capsys.readouterr().out
    assert [label in out for label in ("run", "skip", "evaluate/kl_nats", "tags.owner")] == [True] * 4
    assert "x, y" in out
    assert "status" not in out
    assert results_command(["--json", "--sort", "kl", "--limit", "3"]) == 0
    out = capsys.readouterr().out
    assert "NaN" not in out
    assert [(one["run"], one["metrics"].get("evaluate/kl_nats")) for one in json.loads(out)] == [
        ("b", 0.1),
        ("a", 0.2),
        ("d", None),
    ]
    assert results_command(["--where", "kl < 0"]) == 0
    assert "no runs" in capsys.readouterr().err


def examples(text: str) -> list[str]:
    """The commands in a text that list or export runs by names that a user writes."""
    found = re.findall(r"raydistill (results (?:export )?--.*?)(?: {2,}#.*)?$", text, re.M)
    return [command for command in found if re.search("--(where|sort|columns)", command)]


def test_every_example_of_the_docs_works_beside_a_table_of_several_models(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"quant.format": "int2", "trainer.learning_rate": 1e-3}
    both = [
        run("table", {f"evaluate/{model}/{name}": 0.5 for model in "AB" for name in ("kl_nats", "exact_match")}, 5),
        run("low", {"evaluate/kl_nats": 0.2, "evaluate/exact_match": 0.1}, **own),
        run("high", {"evaluate/kl_nats": 0.1, "evaluate/exact_match": 0.9}, **own),
    ]
    monkeypatch.setattr(choosing, "list_runs", lambda *_: both)
    root = Path(__file__).parents[3]
    text = "\n".join([(root / "README.md").read_text(), (root / "docs" / "results.md").read_text()])
    commands = examples("\n".join([text, listing.EXAMPLES, table_files.EXAMPLES]))
    assert len(commands) >= 6
    for command in commands:
        assert results_command(shlex.split(command)[1:]) == 0, command
        out = capsys.readouterr().out
        assert out.index("high") < out.index("low"), command


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["shwo", "x"], "did you mean 'show'"),
        (["zzz"], "there are show, compare"),
        (["--columns", "kl_nat"], "did you mean evaluate/kl_nats?"),
        (["--sort", "exact_mach"], "evaluate/exact_match"),
        (["compare", "a"], "nothing to compare"),
        (["compare", "a", "a"], "named twice"),
        (["export"], "say which file"),
        (["export", "--csv", "/nowhere/x.csv"], "there is no folder /nowhere"),
        (["export", "--parquet", "/tmp"], "/tmp is a folder; name a file"),
        (["show", "outputs/runs/none"], "holds no run's record"),
    ],
)
@pytest.mark.usefixtures("store")
def test_a_mistake_is_one_line_with_a_way_out(arguments: list[str], said: str) -> None:
    with pytest.raises(UserError) as raised:
        results_command(arguments)
    assert said in str(raised.value)


@pytest.mark.usefixtures("store")
def test_exports_hold_every_run_with_its_types(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow.parquet as pq

    paths = {kind: tmp_path / f"runs.{kind}" for kind in ("csv", "parquet", "markdown")}
    assert (
        results_command(["export", *(part for kind, path in paths.items() for part in (f"--{kind}", str(path)))]) == 0
    )
    rows = list(csv.DictReader(paths["csv"].open()))
    assert [row["run"] for row in rows] == ["b", "a", "d", "c"]
    assert (rows[0]["evaluate/kl_nats"], rows[0]["skip"], rows[3]["beta"]) == ("0.1", '["x", "y"]', "")
    table = pq.read_table(paths["parquet"]).to_pylist()
    assert [row["beta"] for row in table] == [1.0, 0.0, None, None]
    assert [row["rank"] for row in table] == ["8", None, "auto", None], "values of several types become text"
    assert paths["markdown"].read_text().splitlines()[1].count("---:") >= 3
    assert results_command(["export", "--markdown", "-", "--where", "run = a", "--columns", "run,kl"]) == 0
    assert capsys.readouterr().out == "| run | evaluate/kl_nats |\n|---|---:|\n| a | 0.2 |\n"


def test_show_tells_a_run_from_its_folder_without_a_store(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert results_command(["show", str(folder)]) == 0
    out = capsys.readouterr().out
    for said in (
        "failed after 3 of 4 steps",
        "out of luck",
        "trainer.learning_rate",
        "0.25 (3)",
        "0.750 ± 0.010 (3)",
        "vllm.LLM",
        "warning: an actor died",
        f"export: {folder}/export (not there any more)",
    ):
        assert said in out, said
    assert "trainer.num_workers" not in out, "what is the default is not told"
    assert results_command(["show", str(folder), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["changed_settings"]["quant.format"] == {"value": "int2", "default": "int4"}
    assert shown["held_out"][0]["best"] == {"version": 3, "value": 0.25, "se": None}
    assert shown["warnings"] == ["an actor died"]


def test_a_run_whose_delivery_has_not_begun_is_found_by_its_name(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert results_command(["show", "mine", "--output", str(folder.parents[1])]) == 0
    assert "out of luck" in capsys.readouterr().out


def test_compare_draws_the_curves_of_folders(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "elsewhere" / "other"
    other.mkdir(parents=True)
    text = (
        (folder / "record.jsonl")
        .read_text()
        .replace('"name":"mine"', '"name":"other"')
        .replace('"learning_rate":0.5', '"learning_rate":0.1')
    )
    (other / "record.jsonl").write_text(text)
    picture = tmp_path / "both.png"
    assert results_command(["compare", str(folder), str(other), "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    assert f"curves: {picture}" in out
    assert "trainer.learning_rate" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_row_of_a_record_is_what_the_store_would_say(folder: Path) -> None:
    from raydistill.results.record import read_record

    row = row_of_record(read_record(folder), folder)
    assert (row.name, row.status, row.metrics["evaluate/kl_nats"]) == ("mine", "failed", 0.25)
    assert row.settings["trainer.learning_rate"] == 0.5
    assert row.tags["num_warnings"] == "1"
    assert row.seconds is not None
    with RunRecord(folder) as record:
        record.cut_back(2)
    assert row_of_record(read_record(folder), folder).status == "running"
    assert row_of_record(read_record(folder), folder).seconds is None


def test_a_taken_port_is_a_user_error(tmp_path: Path) -> None:
    import socket

    (tmp_path / "results.db").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match="choose another one with --port"):
            results_command(["--output", str(tmp_path), "--ui", "--port", str(port)])


def test_a_tracking_server_is_named_in_place_of_a_second_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert results_command(["--uri", "http://host:5000", "--ui"]) == 0
    assert "http://host:5000" in capsys.readouterr().out


def test_help_and_the_driver_side_load_no_heavy_library() -> None:
    code = (
        "import sys\n"
        "from raydistill.report import compare, listing, plots, report, show, sweep_page, table_files, verdict, watch\n"
        "from raydistill.results import deliver, record, tables\n"
        "for verb in ([], ['show'], ['compare'], ['export'], ['report']):\n"
        "    try:\n        listing.results_command([*verb, '--help'])\n"
        "    except SystemExit:\n        pass\n"
        "heavy = {'mlflow', 'matplotlib', 'torch', 'pandas', 'optuna', 'jinja2', 'pyarrow', 'tensorboardX', 'wandb', 'ray'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "results compare A B" in done.stdout
