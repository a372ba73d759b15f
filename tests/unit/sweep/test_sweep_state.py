"""What a sweep knows of its trials, through a restart."""

import json
from pathlib import Path
from typing import Any

import pytest

from raydistill.errors import RunError
from raydistill.report.sweep import read_sweep
from raydistill.sweep.spec import load_sweep
from raydistill.sweep.state import SweepState, read_state, run_name

HEAD = {
    "name": "lr",
    "metric": "evaluate/kl_nats",
    "mode": "min",
    "fields": ["trainer.learning_rate"],
    "log_fields": [],
}


def test_the_state_goes_on_where_it_was(tmp_path: Path) -> None:
    state = SweepState(tmp_path, HEAD)
    state.change("lr-000", values={"trainer.learning_rate": 1e-3}, status="running")
    state.change("lr-000", status="finished", metrics={"evaluate/kl_nats": 0.1})
    state.change("lr-001", values={"trainer.learning_rate": 1e-2}, status="failed", error="NaN")
    again = SweepState(tmp_path, HEAD)
    again.change("lr-001", values={"trainer.learning_rate": 1e-2}, status="running", error=None)
    found = read_state(tmp_path)
    assert {key: found[key] for key in HEAD} == HEAD
    assert [(trial["run"], trial["status"], trial["error"]) for trial in found["trials"]] == [
        ("lr-000", "finished", None),
        ("lr-001", "running", None),
    ]
    assert found["trials"][0]["metrics"] == {"evaluate/kl_nats": 0.1}
    assert again.counts() == {"finished": 1, "running": 1}


def test_the_file_knows_how_many_trials_the_whole_sweep_has(tmp_path: Path) -> None:
    path = tmp_path / "lr.toml"
    path.write_text('seeds = [0, 1]\n[space]\n"trainer.learning_rate" = [1e-3, 2e-3]')
    sweep = load_sweep(path, ["--run.output", str(tmp_path)])
    SweepState.of(sweep).change("lr-000", values={}, status="running")
    assert read_sweep(sweep.folder).num_trials == 4
    assert read_sweep(sweep.folder).num_left == 3


def test_a_sweep_that_is_left_says_so_until_it_goes_on(tmp_path: Path) -> None:
    state = SweepState(tmp_path, HEAD | {"num_trials": 8})
    state.change("lr-000", values={}, status="finished")
    state.change("lr-001", values={}, status="running")
    assert (read_state(tmp_path)["num_trials"], read_state(tmp_path)["paused"]) == (8, False)
    state.pause()
    assert read_state(tmp_path)["paused"] is True
    assert SweepState(tmp_path, HEAD).counts() == {"finished": 1, "pending": 1}
    SweepState(tmp_path, HEAD).change("lr-001", status="running")
    assert read_state(tmp_path)["paused"] is False


def test_rows_of_the_teachers_add_up_over_the_lives_of_a_host_and_each_life_counts_once(tmp_path: Path) -> None:
    def life(name: str, computed: int, kept: int) -> dict[str, Any]:
        return {
            "life": name,
            "teacher_rows": {"computed_rows": computed, "kept_rows": kept},
            "pools": {"teachers": 1},
            "cpu_s": 1.5 * computed,
        }

    state = SweepState(tmp_path, HEAD)
    assert state.shared == {}
    state.share(life("a", 100, 0))
    state.share(life("a", 120, 80))
    again = SweepState(tmp_path, HEAD)
    again.share(life("b", 30, 200))
    assert again.shared["teacher_rows"] == {"computed_rows": 150, "kept_rows": 280}
    assert read_state(tmp_path)["shared"] == again.shared
    assert again.shared["cpu_s"] == 45.0  # of the newest life


def test_a_file_is_whole_or_the_one_before(tmp_path: Path) -> None:
    state = SweepState(tmp_path, HEAD)
    state.change("lr-000", values={}, status="running")
    (tmp_path / "sweep.partial").mkdir()  # nothing can be written there
    with pytest.raises(RunError, match=r"cannot write .*sweep\.json"):
        state.change("lr-000", status="finished")
    assert json.loads((tmp_path / "sweep.json").read_text())["trials"][0]["status"] == "running"


def test_a_trials_run_has_the_number_of_its_point_or_the_name_that_a_searcher_gave_it() -> None:
    from raydistill.sweep.tuner import point_of, run_of

    assert run_name("lr", 7) == "lr-007"
    parameters = {"point": {"run": "lr-007", "point": {"trainer.learning_rate": 1e-3}}}
    assert run_of("lr", "10f32_00001", parameters) == "lr-007", "whatever number it has among those that are left"
    assert point_of(parameters) == {"trainer.learning_rate": 1e-3}
    assert run_of("lr", "12345678", {"trainer.learning_rate": 1e-3}) == "lr-12345678"
