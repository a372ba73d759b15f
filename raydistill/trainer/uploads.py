"""The ranks bring checkpoints to `run.storage`: each disk's lowest rank what lies there, rank 0 the description, last.

A storage that is away costs a bounded time at each checkpoint and nothing else: training goes on from what lies on the
disks, and the version is brought with the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from raydistill.errors import StorageError
from raydistill.recovery.checkpoint import (
    CHECKPOINTS,
    PREFIX,
    checkpoint_folder,
    read_description,
    remove_checkpoint,
    version_of,
)
from raydistill.recovery.ledger import ledger_name, ledger_path
from raydistill.recovery.storage import Storage
from raydistill.recovery.stored import StoredCheckpoints
from raydistill.trainer.ranks import from_all, from_first
from raydistill.trainer.save import is_lowest_rank

Brought = tuple[tuple[int, ...], str | None]
"""The versions that the storage took, and why it did not take the others."""


class RankUploads:
    """One rank's part. limit_s: what the uploads of one checkpoint may take; training waits for them."""

    def __init__(self, run_folder: Path, rank: int, run: Storage, limit_s: float) -> None:
        self._run_folder, self._rank, self._run, self._limit_s = run_folder, rank, run, limit_s
        self._root = run_folder / CHECKPOINTS
        self._waiting: list[int] = []  # versions that are not there yet; the same on every rank
        self._seen: set[int] = set()  # versions that were there at some time

    @property
    def waits(self) -> bool:
        """Whether a version is still to be brought."""
        return bool(self._waiting)

    def bring(self, *versions: int) -> Brought:
        """Bring these versions, after those that still wait. Collective."""
        wanted = [v for v in (*self._waiting, *versions) if checkpoint_folder(self._root, v).exists()]
        wanted = from_first(wanted if self._rank == 0 else None)
        run, done = self._run.within(self._limit_s), []
        problem = self._together(lambda: run.put(ledger_path(self._run_folder, self._rank), ledger_name(self._rank)))
        for version in wanted:
            problem = problem or self._bring(version, run)
            if problem is not None:
                break
            done.append(version)
        self._waiting = [v for v in wanted if v not in done]
        if done:
            self._drop_what_is_gone(run)
        return tuple(done), problem

    def _bring(self, version: int, run: Storage) -> str | None:
        """What is wrong, on every rank alike; None if the version is there."""
        stored, folder = StoredCheckpoints(run), checkpoint_folder(self._root, version)
        first = self._rank == 0
        return (
            self._together(lambda: stored.withdraw(version) if first else None)
            or self._together(lambda: self._put_mine(stored, folder))
            or self._together(lambda: stored.commit(folder) if first else None)
        )

    def _put_mine(self, stored: StoredCheckpoints, folder: Path) -> None:
        if is_lowest_rank(folder, self._rank):
            stored.put_files(folder, [name for name in read_description(folder)["files"] if (folder / name).is_file()])

    def _together(self, work: Callable[[], None]) -> str | None:
        """Do something on every rank at the same time; the first problem that any of them met."""
        problem = None
        try:
            work()
        except (StorageError, OSError, ValueError) as error:  # a folder that another process removes meanwhile
            problem = str(error)
        return next((found for found in from_all(problem) if found is not None), None)

    def _drop_what_is_gone(self, run: Storage) -> None:
        """The keeper removes old versions from the driver's disk and from the storage; on other disks they follow here."""
        try:
            there = StoredCheckpoints(run).versions()
        except StorageError:
            return  # at the next checkpoint, then
        for folder in self._root.glob(f"{PREFIX}*"):
            if version_of(folder) in self._seen - there:
                remove_checkpoint(folder)
        self._seen |= there
