"""CPU-seconds of a command and everything that it starts, Ray's daemons included, over time and by role."""

from __future__ import annotations

import os
import threading
import time
import uuid
from bisect import bisect_right
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil

MARK = "RAYDISTILL_CPU_METER"
PERIOD_S = 0.2
ROLES = {
    b"ray::RolloutActor": "rollout",
    b"ray::TeacherActor": "teacher",
    b"ray::RayTrainWorker": "ranks",
    b"ray::EvaluatorActor": "evaluation",
}
"""How the title of a process begins -> its role; everything else is "rest"."""


class CpuMeter:
    """Sums the CPU time of all processes whose environment has the meter's mark; Ray's daemons and workers inherit it.

    with CpuMeter() as meter:
        subprocess.run(command, env=os.environ | meter.environment)
    meter.between(start_s, end_s)   # seconds since the epoch

    A process that ends between two looks loses what it used since the last: at most PERIOD_S each.
    """

    def __init__(self) -> None:
        self.environment = {MARK: uuid.uuid4().hex}
        self._seconds: dict[tuple[int, float], float] = {}  # by process, the newest sight
        self._is_ours: dict[tuple[int, float], bool] = {}
        self._times: list[float] = []
        self._now: Counter[str] = Counter()  # seconds by role
        self._seen: list[Counter[str]] = []  # the same, at each of the times
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> CpuMeter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def total(self) -> float:
        """CPU-seconds so far."""
        return self._now.total()

    def between(self, start_s: float, end_s: float) -> Counter[str]:
        """CPU-seconds within a span of time, by role."""
        start, end = self._at(start_s), self._at(end_s)
        return Counter({role: end[role] - start[role] for role in end})

    def _at(self, time_s: float) -> Counter[str]:
        """What was used up to a time, in a straight line between the looks before and after it."""
        after = bisect_right(self._times, time_s)
        if after == 0 or after == len(self._times):
            return self._seen[min(after, len(self._seen) - 1)] if self._seen else Counter()
        t0, t1, c0, c1 = self._times[after - 1], self._times[after], self._seen[after - 1], self._seen[after]
        share = (time_s - t0) / (t1 - t0)
        return Counter({role: c0[role] + (c1[role] - c0[role]) * share for role in c1})

    def _watch(self) -> None:
        while not self._over.wait(PERIOD_S):
            self._look()
        self._look()

    def _look(self) -> None:
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                key = (process.pid, process.create_time())
                if key not in self._is_ours or not self._is_ours[key]:
                    # Asked again: a forked child has the mark only once it has become another program.
                    self._is_ours[key] = self._has_mark(process.pid)
                if self._is_ours[key]:
                    times = process.cpu_times()
                    used = times.user + times.system
                    self._now[role_of(process.pid)] += used - self._seconds.get(key, 0.0)
                    self._seconds[key] = used
        self._times.append(time.time())
        self._seen.append(self._now.copy())

    def _has_mark(self, pid: int) -> bool:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return f"{MARK}={self.environment[MARK]}".encode() in file.read()


def role_of(pid: int) -> str:
    """A worker process of Ray has its actor's class as its title once it has one."""
    title = Path(f"/proc/{pid}/cmdline").read_bytes()
    return next((role for start, role in ROLES.items() if title.startswith(start)), "rest")


def environment(meter: CpuMeter) -> dict[str, str]:
    """This process's environment with the meter's mark."""
    return {**os.environ, **meter.environment}
