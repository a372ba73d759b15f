"""A sweep whose trials are in run.storage goes on with an empty disk."""

from pathlib import Path
from typing import Any

import pytest

from raydistill.recovery.storage import Storage
from raydistill.results.record import RunRecord
from raydistill.sweep.spec import Sweep, load_sweep
from raydistill.sweep.state import SweepState, trials_of
from raydistill.sweep.stored import bring_sweep, mirror_of, set_sweep_aside

FILE = """
name = "lr"
[space]
"trainer.learning_rate" = [1e-3, 2e-3]
"""


def sweep_of(tmp_path: Path, machine: str, url: str | None) -> Sweep:
    path = tmp_path / "lr.toml"
    path.write_text(FILE)
    storage = [] if url is None else ["--run.storage", url]
    return load_sweep(path, ["--run.output", str(tmp_path / machine), *storage])


@pytest.fixture
def begun(tmp_path: Path) -> tuple[Sweep, str]:
    """One trial over, one begun, when the machine was lost."""
    url = f"file://{tmp_path}/remote"
    sweep = sweep_of(tmp_path, "one", url)
    with RunRecord(sweep.folder) as record:
        record.start(name="lr", config={}, provenance={}, seed=0)
    state = SweepState.of(sweep)
    state.change("lr-000", values={"trainer.learning_rate": 1e-3}, status="finished")
    state.change("lr-001", values={"trainer.learning_rate": 2e-3}, status="running")
    (sweep.folder / "tune").mkdir()
    (sweep.folder / "tune" / "experiment_state-1.json").write_text("{}")
    (sweep.folder / "run.lock").touch()
    with RunRecord(tmp_path / "one" / "runs" / "lr-000") as record:
        record.start(name="lr-000", config={}, provenance={}, seed=0)
        record.end("finished")
    Storage(url).put(tmp_path / "one" / "runs" / "lr-000" / "record.jsonl", "runs/lr-000/record.jsonl")
    mirror = mirror_of(sweep)
    assert mirror is not None
    mirror.push_tree()
    assert mirror.finish(20) == []
    return sweep, url


def test_an_empty_disk_gets_trials_and_records(tmp_path: Path, begun: Any) -> None:
    _, url = begun
    sweep = sweep_of(tmp_path, "two", url)
    bring_sweep(sweep)
    assert [trial["status"] for trial in trials_of(sweep.folder)] == ["finished", "running"]
    assert not (sweep.folder / "tune").exists(), "its state is of no use there"
    assert (tmp_path / "two" / "runs" / "lr-000" / "record.jsonl").exists()
    assert sweep.identity()["settings"]["run"].get("storage") is None  # it may change on the way


def test_a_disk_that_knows_as_much_keeps_what_it_has(begun: Any) -> None:
    sweep, url = begun
    Storage(url).write(b"{}", "sweeps/lr/sweep.json")
    bring_sweep(sweep)
    assert len(trials_of(sweep.folder)) == 2


def test_starting_anew_sets_sweep_and_trials_there_aside(tmp_path: Path, begun: Any) -> None:
    _, url = begun
    sweep = sweep_of(tmp_path, "two", url)
    set_sweep_aside(sweep)
    names = {name.split("/")[1].partition(".before-")[::2] for name in Storage(url).list()}
    assert {name for name, stamp in names if stamp} == {"lr", "lr-000"}
    assert all(stamp for _, stamp in names)
    assert trials_of(sweep.folder) == []


def test_starting_anew_sets_runs_there_aside_whose_sweep_was_removed(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/remote"
    Storage(url).write(b"{}", "runs/lr-001/record.jsonl")
    set_sweep_aside(sweep_of(tmp_path, "two", url))
    (name,) = Storage(url).list()
    assert name.startswith("runs/lr-001.before-")


def test_without_storage_nothing_is_brought(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, "one", None)
    bring_sweep(sweep)
    set_sweep_aside(sweep)
    assert mirror_of(sweep) is None
    assert not sweep.folder.exists()
