"""Listing and pruning run folders: what goes, and what never does."""

import json
from pathlib import Path

import numpy as np
import pytest

from raydistill.cli import main_with_errors
from raydistill.config import Config
from raydistill.errors import UserError
from raydistill.messages import EvalReport, Span, StudentWeights
from raydistill.recovery.checkpoint import commit_checkpoint, digests, load_checkpoint, partial_folder, write_weights
from raydistill.recovery.keeper import CheckpointKeeper
from raydistill.recovery.resume import goes_on_with, locked, run_folder
from raydistill.recovery.runs import runs_command
from raydistill.results.record import RunRecord

DATA = "data-1"


def make_run(output: Path, name: str, end: str | None) -> Path:
    folder = output / "runs" / name
    root = folder / "checkpoints"
    keeper = CheckpointKeeper(root, keep_last=5, keep_best=5)
    with locked(folder), RunRecord(folder) as record:
        settings = json.loads(Config.model_validate({"run": {"output": output}}).model_dump_json())
        record.start(name=name, config=settings, provenance={}, seed=0, data_fingerprint=DATA)
        for version, kl in [(0, 0.5), (2, 0.1), (4, 0.2)]:
            partial = partial_folder(root, version)
            write_weights(partial, StudentWeights(version=version, tensors={"a": np.ones(4, np.float32)}, probe=None))
            (partial / "optimizer").mkdir()
            (partial / "optimizer" / "state.pt").write_bytes(bytes(1000))
            commit_checkpoint(partial, version, {"files": digests(partial)})
            span = Span(stage="evaluate", actor="evaluator-0", step=version, start_s=0.0, end_s=1.0)
            record.evaluation(EvalReport(version=version, metrics={"evaluate/kl_nats": kl}, span=span))
            keeper.evaluated(version, {"evaluate/kl_nats": kl})
            record.step(version, {"trainer/loss": 1.0})
        (partial_folder(root, 6) / "half").write_bytes(bytes(500))
        if end:
            record.end(end)  # type: ignore[arg-type]
    return folder


def run(output: Path, *arguments: str) -> int:
    return main_with_errors(runs_command, [*arguments, "--output", str(output)])


def test_runs_are_listed_with_status_and_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path, "a", "finished")
    make_run(tmp_path, "b", None)
    assert run(tmp_path, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["run"], row["status"], row["steps"], row["checkpoints"]) for row in rows] == [
        ("a", "finished", 5, 3),
        ("b", "unfinished", 5, 3),
    ]
    assert rows[0]["bytes"] > 3500


def test_a_finished_run_keeps_the_weights_of_best_and_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path, "a", "finished")
    assert run(tmp_path, "prune", "--dry-run", "--json") == 0
    (promised,) = json.loads(capsys.readouterr().out)
    assert len(list((folder / "checkpoints").glob("step-*"))) == 3
    assert run(tmp_path, "prune", "--json") == 0
    (done,) = json.loads(capsys.readouterr().out)
    assert done["freed"] == promised["freed"] >= 3500
    kept = sorted(path.name for path in (folder / "checkpoints").glob("*step-*"))
    assert kept == ["step-000002", "step-000004"]
    for name in kept:
        assert load_checkpoint(folder / "checkpoints" / name).tensors["a"].sum() == 4
        assert not (folder / "checkpoints" / name / "optimizer").exists()


@pytest.mark.parametrize("content", [None, "", '{"version"'])
def test_without_the_name_of_the_best_the_record_says_which_it_is(tmp_path: Path, content: str | None) -> None:
    """A full disk or a crash may have left none, or half of it."""
    folder = make_run(tmp_path, "a", "finished")
    best = folder / "checkpoints" / "best.json"
    best.unlink() if content is None else best.write_text(content)
    assert run(tmp_path, "prune", "--json") == 0
    assert sorted(path.name for path in (folder / "checkpoints").glob("step-*")) == ["step-000002", "step-000004"]


def test_an_unfinished_run_can_still_go_on(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "b", None)
    assert run(tmp_path, "prune") == 0
    names = sorted(path.name for path in (folder / "checkpoints").glob("*step-*"))
    assert names == ["step-000000", "step-000002", "step-000004"]
    assert (folder / "checkpoints" / "step-000004" / "optimizer" / "state.pt").exists()


@pytest.mark.parametrize("end", ["failed", "interrupted", None])
def test_a_run_that_is_given_up_keeps_the_weights_of_best_and_last_and_does_not_go_on(
    tmp_path: Path, end: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, other = make_run(tmp_path, "b", end), make_run(tmp_path, "c", end)
    (folder / "sampled").mkdir()
    (folder / "sampled" / "step-000005-rank-0.npz").write_bytes(bytes(700))
    config = Config.model_validate({"run": {"output": tmp_path}})
    assert run(tmp_path, "prune", "b", "--unfinished", "--dry-run", "--json") == 0
    (promised,) = json.loads(capsys.readouterr().out)
    assert len(list((folder / "checkpoints").glob("step-*"))) == 3
    assert run(tmp_path, "prune", "b", "--unfinished", "--json") == 0
    (done,) = json.loads(capsys.readouterr().out)
    assert done["freed"] == promised["freed"] >= 4200
    kept = sorted(path.name for path in (folder / "checkpoints").glob("*step-*"))
    assert kept == ["step-000002", "step-000004"]
    assert load_checkpoint(folder / "checkpoints" / "step-000004").tensors["a"].sum() == 4
    assert not (folder / "sampled").exists()
    assert len(list((other / "checkpoints").glob("step-*"))) == 3, "it was not named"
    assert run_folder(config, DATA) == goes_on_with(config, DATA) == other
    assert run(tmp_path, "prune", "--unfinished") == 0
    assert goes_on_with(config, DATA) is None
    named = Config.model_validate({"run": {"output": tmp_path, "name": "b"}})
    with pytest.raises(UserError, match=r"was given up.*--resume never"):
        run_folder(named, DATA)


def test_an_unfinished_run_that_was_set_aside_is_pruned_like_one_that_has_finished(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "b", "failed")
    run_folder(Config.model_validate({"run": {"output": tmp_path, "name": "b", "resume": "never"}}), DATA)
    (aside,) = (tmp_path / "runs").glob("b.before-*")
    assert run(tmp_path, "prune") == 0
    assert sorted(path.name for path in (aside / "checkpoints").glob("*step-*")) == ["step-000002", "step-000004"]
    assert not folder.exists()


@pytest.mark.parametrize("end", ["finished", None])
def test_plain_copies_of_exports_go_and_nothing_else_of_that_name(tmp_path: Path, end: str | None) -> None:
    folder = make_run(tmp_path, "a", end)
    for name, manifest in [
        ("export", {"as": "packed"}),
        ("export.dequantized", {"as": "dequantized", "extra": {"source": "abc"}}),
        ("mine.dequantized", {"as": "dequantized", "extra": {}}),
        (".export.dequantized.0a1b.partial", None),
    ]:
        (folder / name).mkdir()
        if manifest:
            (folder / name / "raydistill.json").write_text(json.dumps(manifest))
    assert run(tmp_path, "prune") == 0
    assert sorted(path.name for path in folder.iterdir() if "export" in path.name or "mine" in path.name) == [
        "export",
        "mine.dequantized",
    ]


def test_giving_up_is_a_matter_of_pruning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--unfinished") == 2
    assert "raydistill runs prune" in capsys.readouterr().err


def test_a_run_at_work_is_not_touched(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "c", "finished")
    with locked(folder):
        assert run(tmp_path, "prune") == 0
        assert len(list((folder / "checkpoints").glob("*step-*"))) == 4


def test_an_unknown_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path, "a", "finished")
    assert run(tmp_path, "prune", "x") == 2
    assert "there is no run 'x'; there are: a" in capsys.readouterr().err


def test_an_empty_folder_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path) == 0
    assert "no runs in" in capsys.readouterr().err
