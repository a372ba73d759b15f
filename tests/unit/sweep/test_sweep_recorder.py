"""What a sweep says of its trials."""

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from raydistill.errors import RunError
from raydistill.results.record_lines import RECORD_FILE
from raydistill.sweep import recorder as module
from raydistill.sweep.recorder import SweepRecorder, reason_of
from raydistill.sweep.spec import load_sweep


def test_the_reason_of_a_failure_is_this_tries_own(tmp_path: Path) -> None:
    end = {"kind": "end", "status": "failed", "message": "the disk is full", "time_s": 100.0}
    (tmp_path / RECORD_FILE).write_text(json.dumps(end) + "\n")
    error = SimpleNamespace(cause="Traceback\n  line 3\nResourceError: no teacher answers\n")
    trial = SimpleNamespace(get_pickled_error=lambda: error)
    assert reason_of(tmp_path, trial, since=90.0) == "the disk is full"
    assert (
        reason_of(tmp_path, trial, since=110.0) == "ResourceError: no teacher answers"
    )  # its record was not opened again
    assert reason_of(tmp_path / "none", trial, since=0.0) == "ResourceError: no teacher answers"


def test_what_tune_and_the_sweeps_file_keep_holds_no_password(tmp_path: Path) -> None:
    (tmp_path / "lr.toml").write_text('[space]\n"trainer.learning_rate" = [1e-3, 2e-3]')
    uri = "postgresql://me:hunter2@host/db"
    sweep = load_sweep(tmp_path / "lr.toml", ["--run.output", str(tmp_path), "--results.uri", uri])
    kept = pickle.dumps(SweepRecorder(sweep))
    assert b"hunter2" not in kept
    assert pickle.loads(kept).state.trials == {}
    trial = SimpleNamespace(get_pickled_error=lambda: SimpleNamespace(cause=f"UserError: {uri} does not answer"))
    assert reason_of(tmp_path, trial, since=0.0) == "UserError: postgresql://***@host/db does not answer"


def test_a_trial_that_finds_no_place_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "lr.toml"
    file.write_text('[space]\n"trainer.learning_rate" = [1e-3]')
    recorder = SweepRecorder(load_sweep(file, ["--run.output", str(tmp_path)]))
    recorder.on_step_begin(0, [])
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(module, "PLACE_S", 0.0)
    for step in (1, 2):
        recorder.on_step_begin(step, [])
    assert capsys.readouterr().err.count("no trial's process has found a place") == 1


def test_a_trials_second_start_is_told_where_its_process_was_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "lr.toml"
    file.write_text('[space]\n"trainer.learning_rate" = [1e-3]')
    recorder = SweepRecorder(load_sweep(file, ["--run.output", str(tmp_path)]))

    def trial(error: Exception) -> Any:
        point = {"point": {"run": "lr-000", "point": {"trainer.learning_rate": 1e-3}}}
        return SimpleNamespace(trial_id="x_00000", config=point, get_pickled_error=lambda: error)

    said = []
    for error in (RayActorError(), RunError("no teacher answers")):
        recorder.on_trial_start(0, [], trial(error))
        recorder.on_trial_recover(0, [], trial(error))
        said.append(capsys.readouterr().err)
    assert [text.count("starts: learning_rate=0.001") for text in said] == [1, 0]
    assert [text.count("warning: lr-000 lost the process") for text in said] == [1, 0]
