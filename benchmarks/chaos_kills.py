"""Kills: who, inside which moment, from which step on; waiting for the moment, striking, waiting for the run to go on."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos_cluster import Nodes, computes

from raydistill.recovery.checkpoint import PREFIX, version_of
from raydistill.results.record_lines import read_record

TITLES = {
    "rollout": "ray::RolloutActor",
    "teacher": "ray::TeacherActor",
    "evaluator": "ray::EvaluatorActor",
    "feed": "ray::Feed",
    "trainer": "ray::RayTrainWorker",
    "controller": "ray::TrainController",
}
ENDS_THE_DRIVER = ("driver", "head")
VICTIMS = (*TITLES, "raylet", *ENDS_THE_DRIVER)
BUSY = {
    "generate": "ray::RolloutActor.sample",
    "score": "ray::TeacherActor.score",
    "sync": "ray::RolloutActor.load",
    "evaluate": "ray::EvaluatorActor.evaluate",
}
MOMENTS = (*BUSY, "backward", "checkpoint")
SAVE_EVERY = 3
STEPS_APART = SAVE_EVERY + 2  # of two kills of one run, at most: a new checkpoint stands between them
POLL_S, MOMENT_POLL_S = 0.05, 0.002
MOMENT_S, RECOVER_S = 300.0, 900.0  # how long to wait for a moment, and for the next new step


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """Who gets which signal, when: inside `moment` of the first step from `step` on that has it."""

    victim: str
    moment: str
    step: int
    number: int = signal.SIGKILL


@dataclass(slots=True, kw_only=True)
class Hit:
    """A kill that struck; `recovered_s`: until the next step that the run had not made before, None if none came."""

    at_step: int
    pid: int | None  # of the actor that got the signal
    recovered_s: float | None = None


def draw_kills(victims: Sequence[str], source: random.Random, number: int = signal.SIGKILL) -> list[Kill]:
    """Kills of one run, a few steps apart."""
    kills, step = [], 0
    for victim in victims:
        step += source.randint(SAVE_EVERY, STEPS_APART)
        kills.append(Kill(victim=victim, moment=source.choice(MOMENTS), step=step, number=number))
    return kills


@dataclass(slots=True)
class Record:
    """A run's record, read again when it has changed."""

    folder: Path
    last: int = -1
    highest: int = -1  # the newest step that was ever seen; a record that is cut back does not lower it
    _seen: tuple[int, int] = field(default=(0, 0))

    def read(self) -> None:
        with suppress(OSError):
            stat = (self.folder / "record.jsonl").stat()
            if (stat.st_size, stat.st_mtime_ns) != self._seen:
                self._seen = (stat.st_size, stat.st_mtime_ns)
                self.last = max((line["step"] for line in steps_of(self.folder)), default=-1)
                self.highest = max(self.highest, self.last)

    @property
    def checkpoint(self) -> int:
        """The newest one's version: how many steps it knows; -1 without any."""
        return max((version_of(path) for path in (self.folder / "checkpoints").glob(f"{PREFIX}*")), default=-1)

    @property
    def is_writing_checkpoint(self) -> bool:
        return any((self.folder / "checkpoints").glob(".writing-*"))


class Striker:
    """Kills processes of one run while it is on its way, one after another.

    is_running: whether the run still goes. driver: kills the driver or the head node and gives the command again.
    """

    def __init__(
        self,
        folder: Path,
        nodes: Nodes,
        is_running: Callable[[], bool],
        driver: Callable[[str], None] | None = None,
    ) -> None:
        self._record, self._nodes, self._is_running, self._driver = Record(folder), nodes, is_running, driver
        self._checkpoint = -1  # the newest one at the last kill

    def strike(self, kill: Kill) -> Hit | None:
        """Wait for the moment, kill, wait for the next new step. None if the moment does not come, or the victim has gone."""
        record = self._record

        def is_due() -> bool:
            record.read()
            return record.last >= kill.step - 1 and record.checkpoint > self._checkpoint

        if not self._until(is_due, RECOVER_S) or not self._until(lambda: self._is_now(kill), MOMENT_S, MOMENT_POLL_S):
            return None
        pid = None
        if kill.victim in TITLES:
            pid = self._nodes.workers().newest(TITLES[kill.victim])
            if pid is None or not _has_signalled(pid, kill.number):
                return None
        struck = time.monotonic()
        record.read()
        hit, before = Hit(at_step=record.last + 1, pid=pid), record.highest
        self._checkpoint = record.checkpoint
        if kill.victim == "raylet":
            self._nodes.replace_worker()
        elif kill.victim in ENDS_THE_DRIVER:
            assert self._driver is not None
            self._driver(kill.victim)

        def goes_on() -> bool:
            record.read()
            # A driver that starts again writes down steps that its checkpoint knows: they were trained before.
            return record.highest > before and record.last >= record.checkpoint

        if self._until(goes_on, RECOVER_S):
            hit.recovered_s = time.monotonic() - struck
        return hit

    def _until(self, happened: Callable[[], bool], patience_s: float, poll_s: float = POLL_S) -> bool:
        """Whether it happened, before the run ended and patience did."""
        deadline = time.monotonic() + patience_s
        while self._is_running() and time.monotonic() < deadline:
            if happened():
                return True
            time.sleep(poll_s)
        return False

    def _is_now(self, kill: Kill) -> bool:
        """Whether the run is inside the kill's moment, and its victim is there."""
        newest = self._nodes.workers().newest
        if kill.victim in TITLES and newest(TITLES[kill.victim]) is None:
            return False
        if kill.moment == "checkpoint":
            return self._record.is_writing_checkpoint
        if kill.moment in BUSY:
            return newest(BUSY[kill.moment]) is not None
        trainer = newest(TITLES["trainer"])
        return trainer is not None and not any(newest(title) for title in BUSY.values()) and computes(trainer)


def _has_signalled(pid: int, number: int) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def steps_of(folder: Path) -> Iterator[dict[str, Any]]:
    return (line for line in read_record(folder) if line["kind"] == "step")
