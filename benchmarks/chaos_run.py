"""One run of the tiny world as a process of its own, disturbed by kills, and its comparison with another run."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chaos_cluster import Nodes
from chaos_kills import SAVE_EVERY, Hit, Kill, Striker
from tiny_runs import SEQUENCES, compare, tiny_train

UNDISTURBED = "undisturbed"
END_S = 900.0  # from the last kill to the end


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What came of one run; `hits` has an entry for each kill, None where its moment never came."""

    hits: list[Hit | None]
    starts: int  # of the command
    seconds: float
    ended: bool
    ledger: str
    losses: str
    weights: str


class Job:
    """The command under test; `run` may be called for several names, one after another.

    world: a folder with `teacher`, `train.jsonl` and `validation.jsonl`. timeout_s: of remote calls; a hang costs so much.
    """

    def __init__(
        self, output: Path, world: Path, nodes: Nodes, engine: str, num_steps: int, timeout_s: float = 120.0
    ) -> None:
        self._output, self._world, self._nodes, self._engine = output, world, nodes, engine
        self._num_steps, self._timeout_s = num_steps, timeout_s

    def command(self, name: str) -> list[str]:
        """Serial, float32: repeatable bit for bit."""
        settings = {
            "rollout.engine": self._engine,
            "rollout.timeout_s": self._timeout_s,
            "trainer.timeout_s": self._timeout_s,
            "evaluation.eval_every": SAVE_EVERY,
            "checkpoint.save_every": SAVE_EVERY,
            "cluster.address": self._nodes.address,
            "cluster.by_role": "true",
        }
        return tiny_train(self._world, self._output, name, self._num_steps, settings)

    def run(self, name: str, kills: Sequence[Kill] = ()) -> Outcome:
        """One run with its kills; the command is given again where a kill ends the driver."""
        start, hits = time.monotonic(), []
        folder = self._output / "runs" / name
        with (self._output / f"{name}.log").open("ab") as log:
            process = _Command(self.command(name), log, self._nodes)
            striker = Striker(folder, self._nodes, process.is_running, process.lose)
            try:
                hits = [striker.strike(kill) for kill in kills]
                ended = process.ended_well()
            finally:
                process.kill()
        before = self._output / "runs" / UNDISTURBED
        return Outcome(
            hits=hits,
            starts=process.starts,
            ended=ended,
            seconds=time.monotonic() - start,
            **compare(folder, before, self._num_steps, SEQUENCES),
        )


class _Command:
    """The driver's process, from start to end and start again."""

    def __init__(self, command: list[str], log: Any, nodes: Nodes) -> None:
        self._command, self._log, self._nodes = command, log, nodes
        self.starts = 0
        self._start()

    def _start(self) -> None:
        self.starts += 1
        self._process = subprocess.Popen(self._command, stdout=self._log, stderr=self._log, start_new_session=True)

    def is_running(self) -> bool:
        return self._process.poll() is None

    def lose(self, victim: str) -> None:
        """Kill the driver or the head node; once the driver is gone, give the same command again."""
        if victim == "head":
            self._nodes.kill_head()
            with suppress(
                subprocess.TimeoutExpired
            ):  # a driver that outlives its cluster by so much is not started again
                self._process.wait(END_S)
                self._nodes.restart()
                self._start()
        else:
            self.kill()
            self._start()

    def ended_well(self) -> bool:
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(END_S) == 0
        return False

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
