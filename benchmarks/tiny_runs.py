"""Tiny runs of benchmarks, by raydistill's commands as a user gives them: start, kill, read and compare what is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

TRAINER_TITLE = "ray::RayTrainWorker"
RUN_S = 900.0
TINY: Mapping[str, object] = {
    "student.dtype": "float32",
    "teacher.dtype": "float32",
    "teacher.num_cpus": 0.1,
    "data.eval_rows": 16,
    "data.max_length": 160,
    "data.min_prompt_room": 4,
    "data.min_completion": 2,
    "objective.on_policy_fraction": 0.75,
    "objective.target": "dense",
    "adapter.rank": 8,
    "rollout.max_new_tokens": 40,
    "rollout.num_cpus": 0.1,
    "trainer.num_cpus": 0.1,
    "sync.max_staleness": 0,
    "evaluation.num_cpus": 0.1,
}
"""Settings of a run of the embedded world that is repeatable bit for bit: serial, in float32, mostly on-policy."""
RECIPE = {"num_layers": 2, "mlp_size": 192, "vocab_size": 448, "num_steps": 60, "batch_size": 16}
SEQUENCES = 8  # per step


def make_world(folder: Path) -> Path:
    """The embedded world with a half-trained teacher of 0.2 million parameters: teacher, train.jsonl, validation.jsonl."""
    from raydistill.cli import console
    from raydistill.demo.pretrain import TeacherRecipe
    from raydistill.demo.world import prepare_stories

    recipe = TeacherRecipe(**RECIPE)  # type: ignore[arg-type]
    prepare_stories(folder, recipe, num_train=400, num_validation=24, num_test=24, console=console)
    return folder


def tiny_train(world: Path, output: Path, name: str, num_steps: int, settings: Mapping[str, object]) -> list[str]:
    """`raydistill train` in that world, two bits, strictly on-policy."""
    fields = {
        **TINY,
        "run.name": name,
        "run.output": output,
        "student.model": world / "teacher",
        "data.path": world / "train.jsonl",
        "data.eval_path": world / "validation.jsonl",
        "quant.format": "int2",
        "trainer.num_steps": num_steps,
        "trainer.sequences_per_step": SEQUENCES,
        "trainer.sequences_per_micro_batch": 4,
        "trainer.learning_rate": 2e-3,
    }
    return command("train", settings=fields | dict(settings))


def command(verb: str, *arguments: object, settings: Mapping[str, object] | None = None) -> list[str]:
    """`raydistill VERB ARGUMENTS --field value ...` for this interpreter."""
    fields = [part for field, value in (settings or {}).items() for part in (f"--{field}", str(value))]
    return [sys.executable, "-m", "raydistill", verb, *map(str, arguments), *fields]


@contextmanager
def local_cluster(num_cpus: int) -> Iterator[str]:
    """A Ray cluster of its own on this machine; gives its address."""
    import ray

    from raydistill.config import Config
    from raydistill.launch import start_cluster

    start_cluster(Config.model_validate({"cluster": {"num_cpus": num_cpus}}))
    try:
        yield str(ray.get_runtime_context().gcs_address)
    finally:
        ray.shutdown()


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a command that was started until it ended by itself."""

    ended: bool
    starts: int
    hit: bool  # the victim was there and was killed
    seconds: float


def run_killed(command: Sequence[str], folder: Path, log: Path, victim: str, after_step: int, address: str) -> Outcome:
    """Run a training command and `kill -9` "trainer" (a rank) or "driver" (the command) once a step is recorded; "nobody"
    disturbs nothing. A command that was killed is started again."""
    start, starts, hit, code = time.monotonic(), 0, victim == "nobody", -1
    with log.open("ab") as stream:
        while code != 0 and starts < 2:
            starts += 1
            process = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True)
            if not hit:
                hit = kill_after_step(process, folder, after_step, victim, address)
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(RUN_S)
            if process.poll() is None:
                process.kill()
                process.wait()
                break
            if victim != "driver":
                break
    return Outcome(ended=code == 0, starts=starts, hit=hit, seconds=time.monotonic() - start)


def kill_after_step(process: subprocess.Popen[bytes], folder: Path, step: int, victim: str, address: str) -> bool:
    """Wait until the run's record holds a step, then kill; False if the run ended before or the victim is not there."""
    deadline = time.monotonic() + RUN_S
    while process.poll() is None and time.monotonic() < deadline:
        if any(line["step"] >= step for line in lines_of(folder, "step")):
            pids = [process.pid] if victim == "driver" else ray_processes(TRAINER_TITLE, address)
            for pid in pids[-1:]:
                os.kill(pid, signal.SIGKILL)
            return bool(pids)
        time.sleep(0.01)
    return False


def ray_processes(title: str, address: str) -> list[int]:
    """Processes of the Ray cluster at `address` whose title starts so, oldest first; other clusters are not ours."""
    found = [
        process
        for process in psutil.process_iter(["cmdline", "create_time"])
        if " ".join(process.info["cmdline"] or []).startswith(title) and _is_of(process, address)
    ]
    return [process.pid for process in sorted(found, key=lambda process: process.info["create_time"])]


def _is_of(process: psutil.Process, address: str) -> bool:
    """Ray's workers are children of a raylet, whose command line names the cluster."""
    with suppress(psutil.Error):
        return any(address in " ".join(parent.cmdline()) for parent in process.parents())
    return False


def lines_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind in a run's record."""
    from raydistill.results.record_lines import read_record

    return [dict(line) for line in read_record(folder) if line["kind"] == kind]


def losses(folder: Path) -> list[float]:
    """The loss of each step that the record holds."""
    return [line["metrics"]["trainer/loss"] for line in lines_of(folder, "step")]


def json_of(command: Sequence[str], log: Path) -> Any:
    """What a command prints as JSON on stdout, in a process of its own; RuntimeError if it fails."""
    with log.open("ab") as stream:
        done = subprocess.run([*command, "--json"], stdout=subprocess.PIPE, stderr=stream, timeout=RUN_S, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command[1:5])} ... failed with {done.returncode}; see {log}")
    return json.loads(done.stdout)


def compare(folder: Path, other: Path, num_steps: int, sequences_per_step: int) -> dict[str, str]:
    """`ledger`, `losses` and final `weights` of one run, beside those of another: complete, equal, equal if all is well."""
    import numpy as np
    from safetensors.numpy import load_file

    from raydistill.recovery.checkpoint import WEIGHTS, checkpoint_folder
    from raydistill.recovery.ledger import ledger_problems

    problems = ledger_problems(folder, range(num_steps), sequences_per_step)
    found = {"ledger": "; ".join(problems) or "complete"}
    here, there = losses(folder), losses(other)
    found["losses"] = "equal" if here == there else f"{len(here)} of {len(there)} steps, or other values"
    paths = [checkpoint_folder(run / "checkpoints", num_steps) / WEIGHTS for run in (folder, other)]
    if not paths[0].exists():
        return found | {"weights": "missing"}
    mine, theirs = (load_file(path) for path in paths)
    largest = max(float(np.abs(mine[tensor] - theirs[tensor]).max()) for tensor in theirs)
    return found | {"weights": "equal" if largest == 0 else f"differ by {largest:.1e}"}
