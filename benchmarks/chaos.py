"""Kill processes of running jobs at random moments and look whether anything but time was lost.

    python benchmarks/chaos.py [--kills 20] [--seed 0] [--victims rollout,teacher,...] [--engine vllm] [--output outputs/chaos]

A two-node Ray cluster on this machine (one node with the resource `trainer`, one with `rollout` and `teacher`), a tiny
model, S = 0 in float32. One undisturbed run comes first; then for each kill one run, as a job of its own process: the seed
draws a victim, a step and a moment (inside generate, score, backward, checkpoint commit or weight sync), and the victim
gets `kill -9` there. A killed driver is started again by the same command, a killed node is replaced by an empty one.

Prints one row for each kill: did the run end, is the ledger complete, are losses and final weights those of the undisturbed
run; exit code 1 if not. The rows are also in <output>/chaos.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from raydistill.cli import console, main_with_errors, print_table

TITLES = {
    "rollout": "ray::RolloutActor",
    "teacher": "ray::TeacherActor",
    "evaluator": "ray::EvaluatorActor",
    "feed": "ray::Feed",
    "trainer": "ray::RayTrainWorker",
    "controller": "ray::TrainController",
}
VICTIMS = (*TITLES, "driver", "raylet")
BUSY = {"generate": "ray::RolloutActor.sample", "score": "ray::TeacherActor.score", "sync": "ray::RolloutActor.load"}
MOMENTS = (*BUSY, "backward", "checkpoint")
RECIPE = {"num_layers": 2, "mlp_size": 192, "vocab_size": 448, "num_steps": 60, "batch_size": 16}
SEQUENCES, SAVE_EVERY = 8, 3
WAIT_S, RUN_S = 240.0, 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """Who is killed, when."""

    number: int
    victim: str
    moment: str
    step: int


@dataclass(slots=True, kw_only=True)
class Row:
    """What came of one kill."""

    number: int
    victim: str
    moment: str
    step: int
    hit: bool  # the process was there and was killed
    starts: int  # of the command
    seconds: float
    ended: bool
    ledger: str
    losses: str
    weights: str

    @property
    def is_good(self) -> bool:
        return self.hit and self.ended and self.ledger == "complete" and {self.losses, self.weights} == {"equal"}


def main(argv: Sequence[str]) -> int:
    """Run the matrix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how many runs are disturbed (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws victims, steps and moments (default: %(default)s)")
    parser.add_argument("--victims", default=",".join(VICTIMS), help="who may be killed (default: %(default)s)")
    parser.add_argument(
        "--engine", choices=("vllm", "hf"), default="vllm", help="rollout.engine (default: %(default)s)"
    )
    parser.add_argument(
        "--signal", choices=("KILL", "STOP"), default="KILL", help="STOP: the victim hangs in place of dying"
    )
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of each run (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs/chaos"), help="folder for runs and the table")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    options = parser.parse_args(list(argv))
    victims = options.victims.split(",")
    if options.signal == "STOP":  # a driver that hangs has nobody to notice it, and Ray itself watches its nodes
        victims = [victim for victim in victims if victim not in ("driver", "raylet")]
    unknown = sorted(set(victims) - set(VICTIMS))
    if unknown:
        parser.error(f"--victims {unknown[0]}: choose from {', '.join(VICTIMS)}")
    output = options.output.absolute()
    shutil.rmtree(output / "runs", ignore_errors=True)
    with two_nodes() as nodes:
        job = Job(output, options.engine, options.steps, nodes, getattr(signal, f"SIG{options.signal}"))
        job.make_world()
        console.print("undisturbed run")
        assert job.run("undisturbed", None).ended, f"the undisturbed run failed; see {output / 'undisturbed.log'}"
        rows = []
        for kill in draw_kills(options.kills, options.seed, victims, options.steps):
            console.print(f"kill {kill.number}: {kill.victim} inside {kill.moment} at step {kill.step}")
            rows.append(job.run(f"kill-{kill.number}", kill))
            (output / "chaos.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    print_table([asdict(row) for row in rows], list(asdict(rows[0])), json=options.json)
    return 0 if all(row.is_good for row in rows) else 1


def draw_kills(number: int, seed: int, victims: Sequence[str], num_steps: int) -> list[Kill]:
    """Every victim in turn, at moments and steps that the seed draws."""
    source = random.Random(seed)
    order = [victims[i % len(victims)] for i in range(number)]
    return [
        Kill(number=i, victim=victim, moment=source.choice(MOMENTS), step=source.randrange(1, num_steps - 1))
        for i, victim in enumerate(order)
    ]


class Nodes:
    """A head with the resource `trainer`, and one node with `rollout` and `teacher` that can be killed and replaced."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster: Any = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 4, "resources": {"trainer": 1}, "include_dashboard": False},
        )
        self.add_worker()

    def add_worker(self) -> None:
        self.worker = self.cluster.add_node(num_cpus=4, resources={"rollout": 1, "teacher": 1})

    def replace_worker(self) -> None:
        """`kill -9` the worker node's raylet (its actors die with it) and start an empty node."""
        self.cluster.remove_node(self.worker, allow_graceful=False)
        self.add_worker()

    @property
    def address(self) -> str:
        address: str = self.cluster.address
        return address


class two_nodes:  # noqa: N801 - used as a context manager
    """`with two_nodes() as nodes:`"""

    def __enter__(self) -> Nodes:
        self._nodes = Nodes()
        return self._nodes

    def __exit__(self, *_: object) -> None:
        self._nodes.cluster.shutdown()


class Job:
    """The command under test, and its comparison with the undisturbed run."""

    def __init__(self, output: Path, engine: str, num_steps: int, nodes: Nodes, number: signal.Signals) -> None:
        self._output, self._engine, self._num_steps, self._nodes = output, engine, num_steps, nodes
        self._signal = number
        self._timeout_s = 120 if number == signal.SIGKILL else 30  # a hang is noticed by its time limit only

    def make_world(self) -> None:
        from raydistill.demo.pretrain import TeacherRecipe
        from raydistill.demo.world import prepare_stories

        recipe = TeacherRecipe(**RECIPE)
        prepare_stories(self._output / "world", recipe, num_train=400, num_validation=24, num_test=24, console=console)

    def command(self, name: str) -> list[str]:
        """One run of the tiny world, strictly on-policy and serial."""
        world = self._output / "world"
        settings = {
            "run.name": name,
            "run.output": self._output,
            "student.model": world / "teacher",
            "student.dtype": "float32",
            "teacher.dtype": "float32",
            "teacher.num_cpus": 0.1,
            "data.path": world / "train.jsonl",
            "data.eval_path": world / "validation.jsonl",
            "data.eval_rows": 16,
            "data.max_length": 160,
            "data.min_prompt_room": 4,
            "data.min_completion": 2,
            "objective.on_policy_fraction": 0.75,
            "objective.target": "dense",
            "quant.format": "int2",
            "adapter.rank": 8,
            "rollout.engine": self._engine,
            "rollout.max_new_tokens": 40,
            "rollout.num_cpus": 0.1,
            "rollout.timeout_s": self._timeout_s,
            "trainer.num_steps": self._num_steps,
            "trainer.sequences_per_step": SEQUENCES,
            "trainer.sequences_per_micro_batch": 4,
            "trainer.learning_rate": 2e-3,
            "trainer.num_cpus": 0.1,
            "trainer.timeout_s": self._timeout_s,
            "sync.max_staleness": 0,
            "evaluation.eval_every": 5,
            "evaluation.num_cpus": 0.1,
            "checkpoint.save_every": SAVE_EVERY,
            "cluster.address": self._nodes.address,
            "cluster.by_role": "true",
        }
        arguments = [part for field, value in settings.items() for part in (f"--{field}", str(value))]
        return [sys.executable, "-m", "raydistill.train", *arguments]

    def run(self, name: str, kill: Kill | None) -> Row:
        """Start the command, kill once, start it again while it has not ended by itself."""
        start, folder = time.time(), self._output / "runs" / name
        hit, starts, code = False, 0, -1
        with (self._output / f"{name}.log").open("ab") as log:
            while code != 0 and starts < 3:
                starts += 1
                process = subprocess.Popen(self.command(name), stdout=log, stderr=log, start_new_session=True)
                if kill is not None and not hit:
                    hit = self._strike(kill, folder, process)
                with suppress(subprocess.TimeoutExpired):
                    code = process.wait(RUN_S)
                if process.poll() is None:
                    process.kill()
                    code = process.wait()
                if kill is None or kill.victim != "driver":
                    break
        facts = asdict(kill) if kill else {"number": -1, "victim": "nobody", "moment": "-", "step": -1}
        return Row(
            **facts, hit=hit, starts=starts, seconds=time.time() - start, ended=code == 0, **self._compare(folder)
        )

    def _strike(self, kill: Kill, folder: Path, process: subprocess.Popen[bytes]) -> bool:
        """Wait for the moment, then kill; False if the run ended before."""
        for _ in polls(process):
            if last_step(folder) >= kill.step - 1:
                break
        for _ in polls(process):
            if self._is_now(kill.moment, folder):
                break
        if process.poll() is not None:
            return False
        if kill.victim == "raylet":
            self._nodes.replace_worker()
            return True
        victim = process.pid if kill.victim == "driver" else newest(TITLES[kill.victim], self._nodes.address)
        if victim is None:
            return False
        os.kill(victim, self._signal)
        return True

    def _is_now(self, moment: str, folder: Path) -> bool:
        """Whether the run is inside this moment; the backward pass is when nobody else works."""
        if moment == "checkpoint":
            return any((folder / "checkpoints").glob(".writing-*"))
        busy = {name: newest(title, self._nodes.address) is not None for name, title in BUSY.items()}
        return not any(busy.values()) if moment == "backward" else busy[moment]

    def _compare(self, folder: Path) -> dict[str, str]:
        import numpy as np
        from safetensors.numpy import load_file

        from raydistill.recovery.checkpoint import WEIGHTS, checkpoint_folder
        from raydistill.recovery.ledger import ledger_problems

        problems = ledger_problems(folder, range(self._num_steps), SEQUENCES)
        found = {"ledger": "; ".join(problems) or "complete"}
        before = self._output / "runs" / "undisturbed"
        here, there = losses(folder), losses(before)
        found["losses"] = "equal" if here == there else f"{len(here)} of {len(there)} steps, or other values"
        paths = [checkpoint_folder(run / "checkpoints", self._num_steps) / WEIGHTS for run in (folder, before)]
        if not paths[0].exists():
            return found | {"weights": "missing"}
        mine, theirs = (load_file(path) for path in paths)
        largest = max(float(np.abs(mine[name] - theirs[name]).max()) for name in theirs)
        return found | {"weights": "equal" if largest == 0 else f"differ by {largest:.1e}"}


def polls(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """One turn every few milliseconds, for as long as the process runs and we are patient."""
    deadline = time.monotonic() + WAIT_S
    while process.poll() is None and time.monotonic() < deadline:
        yield
        time.sleep(0.003)


def newest(title: str, address: str) -> int | None:
    """The youngest process of the Ray cluster at `address` whose title starts so; other clusters are not ours to touch."""
    found = [
        p
        for p in psutil.process_iter(["cmdline", "create_time"])
        if " ".join(p.info["cmdline"] or []).startswith(title)
    ]
    ours = [p for p in found if _is_of(p, address)]
    return max(ours, key=lambda p: p.info["create_time"]).pid if ours else None


def _is_of(process: psutil.Process, address: str) -> bool:
    """Ray's workers are children of a raylet, whose command line names the cluster."""
    with suppress(psutil.Error):
        return any(address in " ".join(parent.cmdline()) for parent in process.parents())
    return False


def last_step(folder: Path) -> int:
    return max(_of_steps(folder, lambda line: line["step"]), default=-1)


def losses(folder: Path) -> list[float]:
    return _of_steps(folder, lambda line: line["metrics"]["trainer/loss"])


def _of_steps(folder: Path, read: Callable[[dict[str, Any]], Any]) -> list[Any]:
    from raydistill.results.record_lines import read_record

    return [read(line) for line in read_record(folder) if line["kind"] == "step"]


if __name__ == "__main__":
    sys.exit(main_with_errors(main))
