"""A sweep that is killed or stopped goes on by the same command, also where its disk is lost."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from run_helpers import sweep_file, trial_config, wait_for_step

from raydistill.cli import EXIT_INTERRUPTED
from raydistill.recovery.checkpoint import newest_checkpoint, version_of
from raydistill.results.record import read_record
from raydistill.sweep.state import read_state

pytestmark = [pytest.mark.ray, pytest.mark.timeout(2000)]

ROOT = Path(__file__).parents[2]
STEPS = 40  # so many that a signal is heard before they are over


def test_a_killed_sweep_goes_on_in_the_running_trial_and_stops_when_told(make_config: Any, tmp_path: Path) -> None:
    """Two lives of one command. The first is killed in the second trial, and its disk is lost; the second goes on from
    `run.storage`, and is stopped in the same trial, after the folder that it was started in has gone (as that of a Ray job
    may)."""
    config = trial_config(
        make_config,
        tmp_path / "out",
        rollout={"engine": "hf"},
        trainer={"num_steps": STEPS},
        checkpoint={"save_every": 1},
        results={"deliver": True},
    )
    config = config.model_copy(
        update={
            "objective": config.objective.model_copy(update={"on_policy_fraction": 0.0}),
            "run": config.run.model_copy(update={"storage": f"file://{tmp_path}/remote"}),
        }
    )
    file = sweep_file(tmp_path / "lr.toml", config, '"trainer.learning_rate" = [1e-3, 2e-3]')
    command = [sys.executable, str(ROOT / "tune" / "sweep.py"), str(file)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"}
    runs, codes = tmp_path / "out" / "runs", []
    for life, (step, number) in enumerate(((4, signal.SIGKILL), (10, signal.SIGTERM))):
        started_in, path = tmp_path / f"job-{life}", tmp_path / f"log-{life}"
        started_in.mkdir()
        with path.open("w") as log:
            sweep = subprocess.Popen(
                command, env=environment, cwd=started_in, stdout=log, stderr=log, start_new_session=True
            )
        try:
            wait_for_step(runs / "lr-001", step, sweep)
        except OSError as error:
            pytest.fail(f"{error}\n{path.read_text()[-5000:]}")
        finally:
            started_in.rmdir()
            sweep.send_signal(number)
            codes.append(sweep.wait(120))
        if number == signal.SIGKILL:  # whatever still writes there writes to what is gone
            (tmp_path / "out").rename(tmp_path / "gone")
    text = (tmp_path / "log-1").read_text()
    assert codes == [-signal.SIGKILL, EXIT_INTERRUPTED], text[-3000:]
    assert "stopped with 1 of 2 trials to go; the same command goes on from there" in text
    assert "the results store is behind" not in text
    kinds = {name: [line["kind"] for line in read_record(runs / name)] for name in ("lr-000", "lr-001")}
    assert [kinds["lr-000"].count(kind) for kind in ("start", "step", "resume")] == [1, STEPS, 0], "it was run again"
    assert [kinds["lr-001"].count(kind) for kind in ("start", "resume")] == [1, 1]
    resumed = next(line["step"] for line in read_record(runs / "lr-001") if line["kind"] == "resume")
    steps = [line["step"] for line in read_record(runs / "lr-001") if line["kind"] == "step"]
    assert resumed > 0, "it began anew"
    assert steps == list(range(len(steps)))
    newest, _ = newest_checkpoint(runs / "lr-001" / "checkpoints")
    assert newest is not None
    assert version_of(newest) == len(steps), "it stopped behind its newest checkpoint"
    state = read_state(tmp_path / "out" / "sweeps" / "lr")
    assert [trial["status"] for trial in state["trials"]] == ["finished", "pending"]
    assert len(state["shares"]) == 2, "what the first life shared is not forgotten"
