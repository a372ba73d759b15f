"""One run of the tiny world as a process of its own, disturbed at chosen moments, and its comparison with another run."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos_cluster import TwoNodes, computes, send

from raydistill.recovery.checkpoint import WEIGHTS, checkpoint_folder
from raydistill.recovery.ledger import ledger_problems
from raydistill.results.record_lines import read_record

TITLES = {
    "rollout": "ray::RolloutActor",
    "teacher": "ray::TeacherActor",
    "evaluator": "ray::EvaluatorActor",
    "feed": "ray::Feed",
    "trainer": "ray::RayTrainWorker",
    "controller": "ray::TrainController",
}
VICTIMS = (*TITLES, "driver", "raylet", "head")
ENDS_THE_DRIVER = ("driver", "head")
BUSY = {
    "generate": "ray::RolloutActor.sample",
    "score": "ray::TeacherActor.score",
    "sync": "ray::RolloutActor.load",
    "evaluate": "ray::EvaluatorActor.evaluate",
}
MOMENTS = (*BUSY, "backward", "checkpoint")
SEQUENCES, SAVE_EVERY = 8, 3
STEPS_APART = SAVE_EVERY + 2  # of two kills of one run, at most: a new checkpoint stands between them
POLL_S = 0.002
MOMENT_S, RECOVER_S, END_S = 120.0, 400.0, 240.0  # how long to wait for a moment, for the next new step, for the end


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """Who is killed, when: inside `moment` of the first step from `step` on that has it."""

    victim: str
    moment: str
    step: int


@dataclass(slots=True, kw_only=True)
class Hit:
    """What came of one kill; `recovered_s` until the next step that the run had not made before."""

    at_step: int
    recovered_s: float | None = None


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What came of one run; `hits` has an entry for each kill, None where its moment never came."""

    hits: list[Hit | None]
    starts: int
    seconds: float
    ended: bool
    ledger: str
    losses: str
    weights: str


@dataclass(slots=True)
class Record:
    """A run's record, read again when it has changed."""

    folder: Path
    highest: int = -1  # the newest step that was ever seen; a record that is cut back does not lower it
    last: int = -1
    _seen: tuple[int, int] = field(default=(0, 0))

    def read(self) -> None:
        with suppress(OSError):
            stat = (self.folder / "record.jsonl").stat()
            if (stat.st_size, stat.st_mtime_ns) != self._seen:
                self._seen = (stat.st_size, stat.st_mtime_ns)
                self.last = max((line["step"] for line in steps_of(self.folder)), default=-1)
                self.highest = max(self.highest, self.last)

    @property
    def checkpoint(self) -> str:
        """The newest one's name; names sort by version."""
        return max((path.name for path in (self.folder / "checkpoints").glob("step-*")), default="")

    @property
    def is_writing_checkpoint(self) -> bool:
        return any((self.folder / "checkpoints").glob(".writing-*"))


class Job:
    """The command under test; `run` may be called for several names, one after another.

    world: a folder with `teacher`, `train.jsonl` and `validation.jsonl`. timeout_s: of remote calls; a hang costs so much.
    """

    def __init__(
        self, output: Path, world: Path, nodes: TwoNodes, engine: str, num_steps: int, timeout_s: float = 120.0
    ) -> None:
        self._output, self._world, self._nodes, self._engine = output, world, nodes, engine
        self._num_steps, self._timeout_s = num_steps, timeout_s

    def command(self, name: str) -> list[str]:
        """Strictly on-policy, serial, float32: repeatable bit for bit."""
        settings = {
            "run.name": name,
            "run.output": self._output,
            "student.model": self._world / "teacher",
            "student.dtype": "float32",
            "teacher.dtype": "float32",
            "teacher.num_cpus": 0.1,
            "data.path": self._world / "train.jsonl",
            "data.eval_path": self._world / "validation.jsonl",
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
            "evaluation.eval_every": SAVE_EVERY,
            "evaluation.num_cpus": 0.1,
            "checkpoint.save_every": SAVE_EVERY,
            "cluster.address": self._nodes.address,
            "cluster.by_role": "true",
        }
        arguments = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        return [sys.executable, "-m", "raydistill.train", *arguments]

    def folder(self, name: str) -> Path:
        return self._output / "runs" / name

    def run(self, name: str, kills: Sequence[Kill] = (), number: signal.Signals = signal.SIGKILL) -> Outcome:
        """One run with its kills; the command is given again where a kill ends the driver."""
        with (self._output / f"{name}.log").open("ab") as log:
            return _Run(self, name, log, number).through(kills)

    def start(self, name: str, log: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self.command(name), stdout=log, stderr=log, start_new_session=True)

    @property
    def nodes(self) -> TwoNodes:
        return self._nodes

    def compare(self, name: str, other: str) -> dict[str, str]:
        """Ledger, losses and final weights of one run, beside those of another of the same length."""
        import numpy as np
        from safetensors.numpy import load_file

        problems = ledger_problems(self.folder(name), range(self._num_steps), SEQUENCES)
        found = {"ledger": "; ".join(problems) or "complete"}
        here, there = (
            [line["metrics"]["trainer/loss"] for line in steps_of(self.folder(run))] for run in (name, other)
        )
        found["losses"] = "equal" if here == there else f"{len(here)} of {len(there)} steps, or other values"
        roots = [self.folder(run) / "checkpoints" for run in (name, other)]
        paths = [checkpoint_folder(root, self._num_steps) / WEIGHTS for root in roots]
        if not paths[0].exists():
            return found | {"weights": "missing"}
        mine, theirs = (load_file(path) for path in paths)
        largest = max(float(np.abs(mine[tensor] - theirs[tensor]).max()) for tensor in theirs)
        return found | {"weights": "equal" if largest == 0 else f"differ by {largest:.1e}"}


class _Run:
    """One run on its way."""

    def __init__(self, job: Job, name: str, log: Any, number: signal.Signals) -> None:
        self._job, self._name, self._log, self._signal = job, name, log, number
        self._nodes, self._record = job.nodes, Record(job.folder(name))
        self._starts = 0

    def through(self, kills: Sequence[Kill]) -> Outcome:
        start = time.monotonic()
        self._start()
        hits: list[Hit | None] = []
        last_checkpoint = ""
        try:
            for kill in kills:
                hits.append(self._strike(kill, last_checkpoint))
                last_checkpoint = self._record.checkpoint
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(END_S)
        finally:
            if self._process.poll() is None:
                self._process.kill()
        return Outcome(
            hits=hits,
            starts=self._starts,
            ended=self._process.wait() == 0,
            seconds=time.monotonic() - start,
            **self._job.compare(self._name, UNDISTURBED),
        )

    def _start(self) -> None:
        self._starts += 1
        self._process = self._job.start(self._name, self._log)

    def _until(self, happened: Callable[[], Any], patience_s: float) -> Any:
        """What `happened` answers as soon as that is true; None if the run ends first or patience does."""
        deadline = time.monotonic() + patience_s
        while self._process.poll() is None and time.monotonic() < deadline:
            found = happened()
            if found:
                return found
            time.sleep(POLL_S)
        return None

    def _strike(self, kill: Kill, last_checkpoint: str) -> Hit | None:
        """Wait for the moment, kill, wait for the next new step. None if the moment does not come."""

        def is_due() -> bool:
            self._record.read()
            return self._record.last >= kill.step - 1 and self._record.checkpoint > last_checkpoint

        if not self._until(is_due, RECOVER_S):
            return None
        pid = self._until(lambda: self._victim(kill), MOMENT_S)
        if pid is None:
            return None
        struck = time.monotonic()
        if kill.victim == "raylet":
            self._nodes.replace_worker()
        elif kill.victim == "head":
            self._nodes.kill_head()
        else:
            send(pid, self._signal)
        self._record.read()
        hit, before = Hit(at_step=self._record.last + 1), self._record.highest
        if kill.victim in ENDS_THE_DRIVER:
            self._again(kill)

        def goes_on() -> bool:
            self._record.read()
            return self._record.highest > before

        if self._until(goes_on, RECOVER_S):
            hit.recovered_s = time.monotonic() - struck
        return hit

    def _victim(self, kill: Kill) -> int | None:
        """The process to kill, if it is there and the run is inside the kill's moment."""
        if not self._is_now(kill.moment):
            return None
        return self._nodes.newest(TITLES[kill.victim]) if kill.victim in TITLES else self._process.pid

    def _is_now(self, moment: str) -> bool:
        if moment == "checkpoint":
            return self._record.is_writing_checkpoint
        if moment in BUSY:
            return self._nodes.newest(BUSY[moment]) is not None
        trainer = self._nodes.newest(TITLES["trainer"])
        others = any(self._nodes.newest(title) is not None for title in BUSY.values())
        return trainer is not None and not others and computes(trainer)

    def _again(self, kill: Kill) -> None:
        """Give the same command again once its driver is gone; a lost head gets a new cluster at the same address."""
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:  # a driver that outlives its cluster: the row will show it
            return
        if kill.victim == "head":
            self._nodes.restart()
        self._start()


UNDISTURBED = "undisturbed"


def steps_of(folder: Path) -> Iterator[dict[str, Any]]:
    return (line for line in read_record(folder) if line["kind"] == "step")
