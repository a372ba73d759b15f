"""A sweep that is killed or stopped goes on by the same command, also where its disk is lost."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from run_helpers import sweep_file, trial_config, wait_for_step
from s3 import BUCKET, s3_server

from raydistill.cli import EXIT_INTERRUPTED
from raydistill.recovery.checkpoint import newest_checkpoint, version_of
from raydistill.results.record import read_record
from raydistill.study.arms import GOLD
from raydistill.sweep.state import read_state

pytestmark = [pytest.mark.ray, pytest.mark.timeout(2000)]

ROOT = Path(__file__).parents[2]
FIRST_STEPS, STEPS = 4, 22  # of the two trials; the second has so many that a signal is heard before they are over


@pytest.fixture
def storage(s3_port: int) -> Iterator[str]:
    """A bucket of an S3 server on loopback."""
    with s3_server(s3_port):
        yield f"s3://{BUCKET}/sweeps"


def test_a_killed_sweep_goes_on_in_the_running_trial_also_after_a_signal(
    ray_cluster: Any, make_config: Any, tmp_path: Path, storage: str
) -> None:
    """Three lives of one command. The first is killed in the second trial, and its disk is lost; the second goes on from
    `run.storage`, and is stopped by Ctrl-C in the same trial, after the folder that it was started in has gone (as that of a
    Ray job may); the third ends it."""
    config = trial_config(
        make_config,
        tmp_path / "out",
        rollout={"engine": "hf"},
        checkpoint={"save_every": 1},
        results={"deliver": True},
    )
    config = config.model_copy(
        update={
            "objective": config.objective.model_copy(
                update=GOLD["objective"]
            ),  # no teacher: a process less in each life
            "run": config.run.model_copy(update={"storage": storage}),
        }
    )
    file = sweep_file(
        tmp_path / "lr.toml",
        config,
        f'"trainer.num_steps" = [{FIRST_STEPS}, {STEPS}]',
        head='metric = "evaluate/perplexity"',
    )
    command = [sys.executable, str(ROOT / "tune" / "sweep.py"), str(file)]
    address = ray_cluster.get_runtime_context().gcs_address
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": address}
    runs, codes, stood = tmp_path / "out" / "runs", [], []
    for life, (step, number) in enumerate(((4, signal.SIGKILL), (10, signal.SIGINT), (STEPS - 1, None))):
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
            if number == signal.SIGINT:
                os.killpg(sweep.pid, number)  # as a terminal does: whatever the command started hears it too
            elif number:
                sweep.send_signal(number)
            codes.append(sweep.wait(300))
        if number == signal.SIGKILL:  # whatever still writes there writes to what is gone
            (tmp_path / "out").rename(tmp_path / "gone")
        else:
            state = read_state(tmp_path / "out" / "sweeps" / "lr")
            stood.append([trial["status"] for trial in state["trials"]])
        if number == signal.SIGINT:
            trained = [line["step"] for line in read_record(runs / "lr-001") if line["kind"] == "step"]
            newest, _ = newest_checkpoint(runs / "lr-001" / "checkpoints")
            assert trained == list(range(len(trained)))
            assert newest is not None
            assert version_of(newest) == len(trained), "it stopped behind its newest checkpoint"
    told = [(tmp_path / f"log-{life}").read_text() for life in (1, 2)]
    assert codes == [-signal.SIGKILL, EXIT_INTERRUPTED, 0], "\n".join(text[-3000:] for text in told)
    assert "stopped with 1 of 2 trials to go; the same command goes on from there" in told[0]
    assert not any("the results store is behind" in text for text in told)
    assert stood == [["finished", "pending"], ["finished", "finished"]]
    kinds = {name: [line["kind"] for line in read_record(runs / name)] for name in ("lr-000", "lr-001")}
    assert [kinds["lr-000"].count(kind) for kind in ("start", "step", "resume")] == [1, FIRST_STEPS, 0], (
        "it was run again"
    )
    assert [kinds["lr-001"].count(kind) for kind in ("start", "step", "resume")] == [1, STEPS, 2]
    resumed = [line["step"] for line in read_record(runs / "lr-001") if line["kind"] == "resume"]
    assert 0 < resumed[0] < resumed[1] == len(trained), "it began anew"
    assert [line["step"] for line in read_record(runs / "lr-001") if line["kind"] == "step"] == list(range(STEPS))
    assert len(read_state(tmp_path / "out" / "sweeps" / "lr")["shares"]) == 3, "what earlier lives shared is forgotten"
