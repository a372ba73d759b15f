"""What the tests of whole runs share: reading a run's record, comparing two runs, killing processes."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from rich.console import Console
from safetensors.numpy import load_file
from tiny_runs import ray_processes

from raydistill.config import Config
from raydistill.launch import RunSummary
from raydistill.recovery.checkpoint import WEIGHTS, checkpoint_folder
from raydistill.results.record import read_record

QUIET = Console(quiet=True)
NUM_STEPS = 8
WAIT_S = 600.0  # for a step of a run, from the start of its processes on a busy machine
HF: dict[str, Any] = {
    "rollout": {"engine": "hf"},
    "teacher": {"model": None},
}  # without a name: the student's own model
THE_SWEEPS_OWN = ("name", "resume", "cache_gib")


def merge(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(tree)
    for key, value in changes.items():
        merged[key] = merge(tree.get(key, {}), value) if isinstance(value, dict) else value
    return merged


def serial_config(make_config: Any, name: str, **changes: Any) -> Config:
    trainer = {"num_steps": 3} | changes.pop("trainer", {})
    config: Config = make_config(
        run={"name": name},
        sync={"max_staleness": 0},
        trainer=trainer,
        evaluation={"eval_every": 3},
        objective={"on_policy_fraction": 0.75},
        **changes,
    )
    return config


def trial_config(make_config: Any, output: Path, **changes: Any) -> Config:
    """What the trials of a sweep have in common: no name, outputs in a folder of their own."""
    config = serial_config(make_config, "any", **changes)
    return config.model_copy(update={"run": config.run.model_copy(update={"output": output, "name": None})})


def sweep_file(path: Path, config: Config, space: str, head: str = "") -> Path:
    """A sweep over `space` whose trials are otherwise `config`."""
    settings = [
        f'"{section}.{name}" = {json.dumps(value)}'
        for section, fields in config.model_dump(mode="json").items()
        for name, value in fields.items()
        if value is not None and not isinstance(value, dict) and name not in THE_SWEEPS_OWN
        if f"{section}.{name}" not in space
    ]
    path.write_text("\n".join([head, "[settings]", *settings, "[space]", space]) + "\n")
    return path


def lines(summary: RunSummary, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_record(summary.folder) if line["kind"] == kind]


def last_weights(summary: RunSummary, num_steps: int) -> dict[str, np.ndarray]:
    return load_file(checkpoint_folder(summary.folder / "checkpoints", num_steps) / WEIGHTS)


def losses(summary: RunSummary) -> list[float]:
    return [line["metrics"]["trainer/loss"] for line in lines(summary, "step")]


def check_bitwise_equal(one: RunSummary, other: RunSummary, num_steps: int) -> None:
    assert losses(one) == losses(other)
    first, second = last_weights(one, num_steps), last_weights(other, num_steps)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def wait_for_step(folder: Path, step: int, command: subprocess.Popen[Any] | None = None) -> None:
    """Return when the record holds a step of at least this number; a `command` that ends before is an error."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        if any(line["kind"] == "step" and line["step"] >= step for line in read_record(folder)):
            return
        if command is not None and command.poll() is not None:
            raise ChildProcessError(f"it ended with {command.returncode} before {folder} reached step {step}")
        time.sleep(0.1)  # reading takes time of a core that the run could use
    raise TimeoutError(f"{folder} did not reach step {step}")


def kill_after_step(folder: Path, step: int, pid: int | Callable[[], int], number: int = signal.SIGKILL) -> None:
    """Send a signal to a process once a step is recorded; the process may be looked up only then."""
    wait_for_step(folder, step)
    os.kill(pid if isinstance(pid, int) else pid(), number)


def ray_process(title: str) -> int:
    """The id of the newest process of this session's Ray cluster whose title starts so, for example `ray::Feed`."""
    found = ray_processes(title, ray.get_runtime_context().gcs_address)
    assert found, f"no process {title}"
    return found[-1]


def rank_of(run: Path) -> int:
    """The id of a trainer rank that works on a run: it holds the run's ledger open; ranks of idle crews do not."""
    ranks = ray_processes("ray::RayTrainWorker", ray.get_runtime_context().gcs_address)
    found = [pid for pid in ranks if any(Path(f.path).is_relative_to(run) for f in psutil.Process(pid).open_files())]
    assert found, f"no rank at work on {run}"
    return found[0]
