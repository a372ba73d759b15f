"""Carries the records of some runs to the results store and to their sinks, until each has all of it.

One record has one route for each destination. A route that fails is tried again with growing pauses and costs the others
nothing but the time of its calls. Only one process delivers a run at a time.
"""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from raydistill.results.delivery import Delivery, Store, log
from raydistill.results.record_lines import RECORD_FILE, start_of
from raydistill.results.run_folders import is_at_work
from raydistill.results.sinks import open_sink, sink_state_file

POLL_S = 1.0
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
LOCK_FILE = "delivered.lock"
_HURRIED_PAUSE_S = 5.0  # the longest between two attempts once the driver waits for us
_PATIENCE_S = 20.0  # how long a run that is delivered waits for the run that it belongs to, or for its process to end


def retry_command(folder: Path) -> str:
    """What a user types to deliver a record later."""
    return f"python -m raydistill.results.deliver {folder}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """Where a run's record goes beside its own folder."""

    uri: str
    experiment: str
    sinks: tuple[str, ...] = ()
    artifacts: Path | None = None  # where a plain database leaves the files


class OpenStores:
    """One open store for each address, shared by the runs that go there; opened anew after it failed."""

    def __init__(self, open_store: Callable[[Destination], Store]) -> None:
        self._open_store = open_store
        self._open: dict[tuple[str, str], Store] = {}

    def get(self, destination: Destination) -> Store:
        key = (destination.uri, destination.experiment)
        if key not in self._open:
            self._open[key] = self._open_store(destination)
        return self._open[key]

    def forget(self, destination: Destination) -> None:
        self._open.pop((destination.uri, destination.experiment), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """What a courier expects of the records it carries."""

    follow: bool  # more lines may come until a record's `end`
    no_more_lines: bool  # whoever wrote them is gone, or nobody is waited for
    many: bool  # more runs may come, also the one that a run belongs to
    give_up_s: float  # how long a store may stay down once no more lines come


@dataclass(slots=True, kw_only=True)
class Route:
    """One record on its way to one destination."""

    name: str
    delivery: Delivery
    on_failure: Callable[[], None] = lambda: None
    is_done: bool = False  # the destination has everything, and nothing more will come
    has_given_up: bool = False
    _stuck_why: str | None = None
    _stuck_since: float = 0.0
    _next_try: float = 0.0
    _pause_s: float = 0.0

    @property
    def is_over(self) -> bool:
        return self.is_done or self.has_given_up

    def advance(self, patience: Patience) -> None:
        """Deliver what there is, if the route is not pausing."""
        now = time.monotonic()
        if patience.no_more_lines:
            self._next_try = min(self._next_try, now + _HURRIED_PAUSE_S)
        if self.is_over or now < self._next_try:
            return
        try:
            why = self._deliver(patience)
        except Exception as error:  # any failure of store, driver or network: the record is safe, try again
            self.on_failure()
            why = f"{self.name} does not answer, trying again: {self.delivery.failed(error)}"
            self._stuck(why, patience.give_up_s if patience.no_more_lines else math.inf)
            self._pause_s = min(2 * self._pause_s or FIRST_PAUSE_S, LONGEST_PAUSE_S)
            self._next_try = time.monotonic() + self._pause_s
            return
        self._pause_s = 0.0
        if why:
            waits_on = patience.many and not patience.no_more_lines
            self._stuck(why, math.inf if waits_on else min(_PATIENCE_S, patience.give_up_s))
        else:
            self._stuck_why = None

    def _deliver(self, patience: Patience) -> str | None:
        """One attempt; says what is still waited for, where that is not just the record's next lines."""
        folder = self.delivery.folder
        has_ended = self.delivery.advance()
        if patience.follow and patience.no_more_lines and not has_ended:
            if is_at_work(folder):
                return "still at work in another process"  # which may be ending, as a sweep's trials do with it
            self.delivery.mark_killed()
            has_ended = True
        if has_ended and self.delivery.state.waits_for:
            return "the run that it belongs to is not in the results store yet"
        self.is_done = has_ended or not patience.follow
        return None

    def _stuck(self, why: str, limit_s: float) -> None:
        now = time.monotonic()
        if self._stuck_why is None:
            self._stuck_since = now
        if why != self._stuck_why:
            log(f"{self.delivery.folder.name}: {why}")
        self._stuck_why = why
        if now - self._stuck_since > limit_s:
            log(f"giving up; deliver it later with: {retry_command(self.delivery.folder)}")
            self.has_given_up = True


@dataclass(slots=True, kw_only=True)
class _Errand:
    """One run: its lock, its routes."""

    lock: FileLock
    routes: list[Route] = field(default_factory=list)


class Courier:
    """Delivers the runs that `find` finds, each where `destination_of` says (None: not ours).

    Without `follow` it delivers what there is now. With it, it goes on until the run has ended, or where there are `many`
    until `writer_gone` is set; a run that has not ended then was killed.
    """

    def __init__(
        self,
        find: Callable[[], Iterable[Path]],
        destination_of: Callable[[Path], Destination | None],
        open_store: Callable[[Destination], Store],
        *,
        follow: bool,
        many: bool,
        writer_gone: threading.Event,
        give_up_s: float,
    ) -> None:
        self._find, self._destination_of, self._stores = find, destination_of, OpenStores(open_store)
        self._follow, self._many, self._writer_gone, self._give_up_s = follow, many, writer_gone, give_up_s
        self._errands: dict[Path, _Errand] = {}
        self._finished: dict[Path, tuple[int, int]] = {}  # records that were delivered, with their size and inode
        self._locked: set[Path] = set()  # by other processes
        self._unlockable: set[Path] = set()  # their disk takes no lock; it may later
        self._gave_up = False

    def run(self) -> bool:
        """True if every destination has everything."""
        begin = time.monotonic()
        try:
            while True:
                no_more_lines = self._writer_gone.is_set() or not self._follow  # asked before reading
                self._look()
                patience = Patience(
                    follow=self._follow, no_more_lines=no_more_lines, many=self._many, give_up_s=self._give_up_s
                )
                for folder in list(self._errands):
                    self._advance(folder, patience)
                if no_more_lines and self._leaves_locked_ones(begin):
                    self._locked.clear()
                if not self._errands and not self._locked and (no_more_lines or not (self._many or self._unlockable)):
                    return not self._gave_up and not self._unlockable
                self._writer_gone.wait(POLL_S) if not no_more_lines else time.sleep(POLL_S)
        finally:
            for errand in self._errands.values():
                errand.lock.release()

    def _look(self) -> None:
        """Take up the runs that are new or have new lines, those that others belong to first."""
        self._locked.clear()
        unlockable, self._unlockable = self._unlockable, set()
        found = [folder for folder in self._find() if folder not in self._errands and self._has_news(folder)]
        for folder in sorted(found, key=lambda one: (start_of(one) or {}).get("parent") is not None):
            destination = self._destination_of(folder)
            if destination is None:
                continue
            lock = FileLock(folder / LOCK_FILE)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                lock.acquire(blocking=False)
            except Timeout:
                self._locked.add(folder)
            except OSError as error:
                if folder not in unlockable:
                    log(f"{folder.name}: cannot be delivered yet: {error}")
                self._unlockable.add(folder)
            else:
                self._errands[folder] = _Errand(lock=lock, routes=self._routes(folder, destination))

    def _has_news(self, folder: Path) -> bool:
        return folder not in self._finished or self._finished[folder] != _fingerprint(folder)

    def _leaves_locked_ones(self, begin: float) -> bool:
        """Among many, a run that another process delivers is that one's; a single one is waited for."""
        if self._many or time.monotonic() - begin > 2 * self._give_up_s:
            for folder in self._locked:
                log(f"another process is still delivering {folder}; leaving it to that one")
                self._gave_up = self._gave_up or not self._many
            return True
        return False

    def _routes(self, folder: Path, destination: Destination) -> list[Route]:
        digest = hashlib.sha256(f"{destination.uri}\n{destination.experiment}".encode()).hexdigest()[:16]
        store = Delivery(folder, digest, lambda: self._stores.get(destination))
        forget = lambda: self._stores.forget(destination)  # noqa: E731
        routes = [Route(name="the results store", delivery=store, on_failure=forget)]
        for name in destination.sinks:
            sink = Delivery(folder, name, open_sink(name, folder, destination.experiment), sink_state_file(name))
            routes.append(Route(name=name, delivery=sink))
        return routes

    def _advance(self, folder: Path, patience: Patience) -> None:
        before = _fingerprint(folder)
        errand = self._errands[folder]
        for route in errand.routes:
            route.advance(patience)
        if all(route.is_over for route in errand.routes):
            self._gave_up = self._gave_up or any(route.has_given_up for route in errand.routes)
            errand.lock.release()
            del self._errands[folder]
            self._finished[folder] = before


def _fingerprint(folder: Path) -> tuple[int, int]:
    try:
        stat = (folder / RECORD_FILE).stat()
    except OSError:
        return (0, 0)
    return (stat.st_size, stat.st_ino)
