"""Listing and pruning run folders: what goes, and what never does."""

import json
from pathlib import Path

import numpy as np
import pytest

from raydistill.cli import main_with_errors
from raydistill.messages import EvalReport, Span, StudentWeights
from raydistill.recovery.checkpoint import load_checkpoint, partial_folder, save_checkpoint
from raydistill.recovery.keeper import CheckpointKeeper
from raydistill.recovery.resume import locked
from raydistill.recovery.runs import runs_command
from raydistill.results.record import RunRecord


def make_run(output: Path, name: str, end: str | None) -> Path:
    folder = output / "runs" / name
    root = folder / "checkpoints"
    keeper = CheckpointKeeper(root, keep_last=5, keep_best=5)
    with locked(folder), RunRecord(folder) as record:
        record.start(name=name, config={}, provenance={}, seed=0)
        for version, kl in [(0, 0.5), (2, 0.1), (4, 0.2)]:
            checkpoint = save_checkpoint(
                root, StudentWeights(version=version, tensors={"a": np.ones(4, np.float32)}, probe=None), {}
            )
            (checkpoint / "optimizer").mkdir()
            (checkpoint / "optimizer" / "state.pt").write_bytes(bytes(1000))
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
