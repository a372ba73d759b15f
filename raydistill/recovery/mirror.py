"""Brings what grows in a folder to `run.storage`, from a thread of its own: whoever writes it never waits.

    mirror.push("record.jsonl")       # the file as it is when its turn comes
    mirror.push_tree()                # every file of the folder that has changed since
    problem = mirror.new_problem()    # once for each time that the storage goes away
    left = mirror.finish(60)          # what did not get there

What fails is tried again with the next push and at the end: of a name only its newest content counts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from raydistill.errors import StorageError
from raydistill.recovery.storage import Storage

LAST_TRY_S = 10.0  # of the time that `finish` has, for what is left


class Mirror:
    """One folder and its place in the storage.

    keeps_trying: False where what fails, and what waits behind it, is given up. leaves_out: folders in it that stay here.
    """

    def __init__(
        self, folder: Path, storage: Storage, keeps_trying: bool = True, leaves_out: Sequence[str] = ()
    ) -> None:
        self._folder, self._storage, self._keeps_trying = folder, storage, keeps_trying
        self._leaves_out = frozenset(leaves_out)
        self._changed = threading.Condition()
        self._jobs: dict[str, Callable[[Storage], None]] = {}
        self._failed: dict[str, Callable[[Storage], None]] = {}
        self._at_work: dict[str, Callable[[Storage], None]] = {}
        self._problem: str | None = None
        self._told = False
        self._sent: dict[str, tuple[int, int]] = {}  # of a tree: name -> (bytes, time of change) when it went
        self._thread: threading.Thread | None = None

    def push(self, name: str) -> None:
        """Bring a file; one that is not there any more by then is left out."""
        self.do(name, lambda storage: self._put(storage, name))

    def push_tree(self, name: str = "") -> None:
        """Bring every file below that has changed since the last time."""
        self.do(f"{name}/", lambda storage: self._put_tree(storage, name))

    def do(self, key: str, job: Callable[[Storage], None]) -> None:
        """Any other work there; a later job of the same key takes the place of one that waits."""
        with self._changed:
            self._jobs = {**self._failed, **self._jobs, key: job}
            self._failed = {}
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="run-storage-mirror", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def new_problem(self) -> str | None:
        """Why something failed, the first time that this is asked since everything worked."""
        with self._changed:
            if self._problem is None or self._told:
                return None
            self._told = True
            return self._problem

    def finish(self, limit_s: float) -> list[str]:
        """Wait until all is done, at most so long; what is left is tried once more. Returns its keys, sorted."""
        deadline = time.monotonic() + limit_s
        with self._changed:
            working_s = limit_s - min(LAST_TRY_S, limit_s / 2)
            self._changed.wait_for(lambda: not self._jobs and not self._at_work, working_s)
            again, self._failed = {**self._failed, **self._at_work, **self._jobs}, {}
            self._jobs = {}
        left: list[str] = []
        for key, job in again.items():
            try:
                job(self._storage.within(deadline - time.monotonic()))
            except StorageError as error:
                self.note(str(error))
                left.append(key)
        return sorted(left)

    @property
    def problem(self) -> str | None:
        """Why the last thing that failed did, if nothing worked since."""
        return self._problem

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._jobs:
                    self._thread = None
                    return
                key = next(iter(self._jobs))
                job = self._jobs.pop(key)
                self._at_work = {key: job}
            try:
                job(self._storage)
                problem = None
            except StorageError as error:
                problem = str(error)
            with self._changed:
                self._at_work = {}
                self.note(problem)
                if problem is not None:
                    # All of it waits for the next push: a storage that is away would be asked in vain.
                    self._failed = {key: job, **self._failed, **self._jobs} if self._keeps_trying else {}
                    self._jobs = {}
                self._changed.notify_all()

    def note(self, problem: str | None) -> None:
        """What the storage did not do for somebody else, or None: it works again."""
        if problem is None:
            self._told = False
        self._problem = problem

    def _put(self, storage: Storage, name: str) -> None:
        if (self._folder / name).is_file():
            storage.put(self._folder / name, name)

    def _put_tree(self, storage: Storage, name: str) -> None:
        for path in sorted((self._folder / name).rglob("*")):
            with suppress(FileNotFoundError):  # it has gone in the meantime
                facts = path.stat()
                key, state = path.relative_to(self._folder).as_posix(), (facts.st_size, facts.st_mtime_ns)
                if key.partition("/")[0] in self._leaves_out:
                    continue
                if path.is_file() and not path.name.endswith((".lock", ".partial")) and self._sent.get(key) != state:
                    storage.put(path, key)
                    self._sent[key] = state
