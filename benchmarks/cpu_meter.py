"""CPU-seconds of a command and everything that it starts, Ray's daemons included, over time."""

from __future__ import annotations

import os
import threading
import time
import uuid
from bisect import bisect_right
from contextlib import suppress

import psutil

MARK = "RAYDISTILL_CPU_METER"
PERIOD_S = 0.2


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
        self._totals: list[float] = []
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
        return self._totals[-1] if self._totals else 0.0

    def between(self, start_s: float, end_s: float) -> float:
        """CPU-seconds within a span of time."""
        return self._at(end_s) - self._at(start_s)

    def _at(self, time_s: float) -> float:
        """The total at a time, in a straight line between the looks before and after it."""
        after = bisect_right(self._times, time_s)
        if after == 0 or after == len(self._times):
            return self._totals[min(after, len(self._totals) - 1)] if self._totals else 0.0
        t0, t1, c0, c1 = self._times[after - 1], self._times[after], self._totals[after - 1], self._totals[after]
        return c0 + (c1 - c0) * (time_s - t0) / (t1 - t0)

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
                    self._seconds[key] = times.user + times.system
        self._times.append(time.time())
        self._totals.append(sum(self._seconds.values()))

    def _has_mark(self, pid: int) -> bool:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return f"{MARK}={self.environment[MARK]}".encode() in file.read()


def environment(meter: CpuMeter) -> dict[str, str]:
    """This process's environment with the meter's mark."""
    return {**os.environ, **meter.environment}
