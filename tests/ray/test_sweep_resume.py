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
from raydistill.results.record import read_record
from raydistill.sweep.state import read_state

pytestmark = [pytest.mark.ray, pytest.mark.timeout(2000)]

ROOT = Path(__file__).parents[2]
STEPS = 40  # so many that a signal is heard before they are over


def test_a_killed_or_stopped_sweep_keeps_its_finished_trials_and_goes_on_in_the_running_one(
    make_config: Any, tmp_path: Path
) -> None:
    """Three lives of one command. The first is killed in the second trial, and its disk is lost: the second goes on from
    `run.storage`, and is stopped in the same trial."""
    config = trial_config(
        make_config,
        tmp_path / "out",
        rollout={"engine": "hf"},
        trainer={"num_steps": STEPS},
        checkpoint={"save_every": 1},
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
    runs = tmp_path / "out" / "runs"
    with (tmp_path / "log").open("w") as log:
        codes = []
        for step, number in ((4, signal.SIGKILL), (10, signal.SIGTERM)):
            sweep = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
            try:
                wait_for_step(runs / "lr-001", step)
            finally:
                sweep.send_signal(number)
                codes.append(sweep.wait(120))
            if number == signal.SIGKILL:  # whatever still writes there writes to what is gone
                (tmp_path / "out").rename(tmp_path / "gone")
        done = subprocess.run(command, env=environment, stdout=log, stderr=log, timeout=400, check=False)
    text = (tmp_path / "log").read_text()
    assert [*codes, done.returncode] == [-signal.SIGKILL, EXIT_INTERRUPTED, 0], text[-3000:]
    assert "stopped with 1 of 2 trials to go; the same command goes on from there" in text
    kinds = {name: [line["kind"] for line in read_record(runs / name)] for name in ("lr-000", "lr-001")}
    assert {name: [of.count("start"), of.count("step"), of.count("resume")] for name, of in kinds.items()} == {
        "lr-000": [1, STEPS, 0],
        "lr-001": [1, STEPS, 2],
    }
    resumed = [line["step"] for line in read_record(runs / "lr-001") if line["kind"] == "resume"]
    assert 0 < resumed[0] < resumed[1], "it began anew"
    state = read_state(tmp_path / "out" / "sweeps" / "lr")
    assert [trial["status"] for trial in state["trials"]] == ["finished"] * 2
    assert len(state["shares"]) == 3, "what earlier lives shared is not forgotten"
