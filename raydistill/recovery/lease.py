"""One process at a time drives a run in `run.storage`, whatever machine it is on.

    with held(run):       # UserError if another process drives it
        ...

The driver leaves a small object in `drivers/` and renews it every few seconds; who finds one watches it for a while.
Not a lock (an object store has none): it keeps people from starting a run twice, and finds two that began at the same moment
as soon as either renews. On one disk `recovery.resume.locked` does the same at once.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from raydistill.background import aside
from raydistill.errors import StorageError, UserError
from raydistill.recovery.storage import Storage

FOLDER = "drivers"  # beside runs and sweeps, so that it is no part of either
RENEW_S = 10.0  # between two renewals
WATCH_S = 30.0  # a holder that has not renewed for so long, while somebody watches, is dead
END_S = (
    3.0  # when the run ends: for a renewal under way, and again to take the object away; who finds it watches it die
)
FORGET_S = 600.0  # one that has not renewed for so long by the clock: not watched any more
Say = Callable[[str], None]
Limit = Callable[[float], float]


def unheard(_: str) -> None:
    """A `Say` that nobody listens to."""


def all_of_it(wanted_s: float) -> float:
    """The `Limit` where nobody waits."""
    return wanted_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Driver:
    """Who drives a run."""

    host: str
    pid: int
    started_s: float  # of the process, by its machine's clock
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    @classmethod
    def here(cls) -> Driver:
        return cls(host=_machine(), pid=os.getpid(), started_s=psutil.Process().create_time())

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host.partition('/')[0]}"

    @property
    def is_this_process(self) -> bool:
        return self.host == _machine() and self.pid == os.getpid()

    @property
    def has_ended(self) -> bool:
        """Known of processes of this machine only."""
        if self.host != _machine():
            return False
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self.pid).create_time() != self.started_s
        return True


def living_driver(run: Storage, say: Say = unheard) -> Driver | None:
    """Another process that drives the run; None if there is none. Watches one that may have died for up to WATCH_S; blocks.

    say: told what is being waited for.
    """
    found = _read(run)
    if found is None or found[0].has_ended or found[0].is_this_process:
        return None
    driver, beat = found
    if time.time() - beat > FORGET_S:
        return None
    say(f"{run} was driven by {driver}; waiting up to {WATCH_S:.0f} s to see whether it still is")
    deadline = time.monotonic() + WATCH_S
    while time.monotonic() < deadline:
        time.sleep(min(1.0, RENEW_S / 4))
        found = _read(run)
        if found is None:
            return None  # it has ended in good order
        if found[1] != beat:
            return found[0]
    return None


def seems_driven(run: Storage) -> bool:
    """The same without watching: by the machines' clocks, where nothing depends on it."""
    found = _read(run)
    return found is not None and not found[0].has_ended and time.time() - found[1] <= WATCH_S


def refuse_driven(run: Storage, say: Say = unheard) -> None:
    """UserError if another process drives the run; see `living_driver`."""
    other = living_driver(run, say)
    if other is not None:
        raise UserError(
            f"{run} in run.storage is at work: {other} drives it; wait for it, stop it, or choose another name"
        )


@contextmanager
def held(run: Storage | None, say: Say = unheard, limit: Limit = all_of_it) -> Iterator[None]:
    """Drive the run (or the sweep) at this place; UserError if another process does. Without a storage: nothing.

    `limit` of some seconds is how many of them are left, for a run that was stopped.
    """
    if run is None:
        yield
        return
    refuse_driven(run, say)
    lease = _Lease(run, say)
    lease.begin()
    try:
        yield
    finally:
        lease.end(limit)


@asynccontextmanager
async def held_async(run: Storage | None, say: Say, limit: Limit = all_of_it) -> AsyncIterator[None]:
    """The same beside other work of an event loop."""
    with ExitStack() as stack:
        await aside(stack.enter_context, held(run, say, limit))
        yield


class _Lease:
    """The object that says who drives a run, renewed by a thread."""

    def __init__(self, run: Storage, say: Say) -> None:
        self._run, self._say, self._me = run, say, Driver.here()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="run-storage-driver", daemon=True)

    def begin(self) -> None:
        self._write()
        self._thread.start()

    def end(self, limit: Limit) -> None:
        self._is_over.set()
        self._thread.join(limit(END_S))
        with suppress(StorageError):
            found = _read(self._run, limit(END_S))
            if found is not None and found[0] == self._me:
                folder, name = _place(self._run, limit(END_S))
                folder.remove(name)

    def _renew(self) -> None:
        is_told = False
        while not self._is_over.wait(RENEW_S):
            with suppress(StorageError):  # the run goes on without it; the next time may do
                found = _read(self._run)
                if found is not None and found[0] != self._me:
                    if not is_told:
                        self._say(f"warning: {found[0]} drives {self._run} as well: stop one of the two")
                    is_told = True
                else:
                    self._write()

    def _write(self) -> None:
        folder, name = _place(self._run)
        folder.write(json.dumps({**asdict(self._me), "time_s": time.time()}).encode(), name)


def _read(run: Storage, limit_s: float = WATCH_S) -> tuple[Driver, float] | None:
    folder, name = _place(run, limit_s)
    data = folder.read(name)
    if data is None:
        return None
    with suppress(ValueError, TypeError, KeyError):
        facts = json.loads(data)
        beat = float(facts.pop("time_s"))
        return Driver(**facts), beat
    return None


def _place(run: Storage, limit_s: float = WATCH_S) -> tuple[Storage, str]:
    """Folder and name of a run's object, by the run's own place: <root>/runs/NAME."""
    root, kind, name = run.url.rsplit("/", 2)
    return Storage(root).below(FOLDER, kind).within(limit_s), f"{name}.json"


def _machine() -> str:
    """Where process ids mean the same: this machine since it was booted, or a container on it."""
    try:
        kernel = [os.readlink("/proc/self/ns/pid"), Path("/proc/sys/kernel/random/boot_id").read_text().strip()]
    except OSError:  # macOS has no /proc, and no containers that share a host name
        kernel = [f"{psutil.boot_time():.0f}"]
    return "/".join([socket.gethostname(), *kernel])
