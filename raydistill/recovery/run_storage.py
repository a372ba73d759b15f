"""The driver's side of a run's place in `run.storage`: what is there, what goes there, what is left at the end.

The ranks bring checkpoints and ledgers (`trainer/uploads.py`), the evaluation actor the export; record, plots and the name of
the best version go from here, in a thread.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

from rich.console import Console

from raydistill.background import aside
from raydistill.errors import RunError, StorageError
from raydistill.messages import Exported
from raydistill.progress import say
from raydistill.recovery.bring import bring_folder, bring_ledgers
from raydistill.recovery.checkpoint import CHECKPOINTS, PREFIX, checkpoint_folder, damage, version_of
from raydistill.recovery.mirror import Mirror
from raydistill.recovery.sampled import SampledTokens
from raydistill.recovery.storage import Storage
from raydistill.recovery.stored import StoredCheckpoints, make_whole
from raydistill.results.record_lines import RECORD_FILE

BEST = "best.json"
FINISH_S = 900.0  # for what is missing there when a run has finished
STOP_S = 10.0  # and when it was stopped: Kubernetes, for one, kills 30 s after SIGTERM


class RunStorage:
    """folder: the run's, on the driver's disk. run: the same in the storage."""

    def __init__(self, folder: Path, run: Storage) -> None:
        self.run, self.mirror = run, Mirror(folder, run)
        self.versions: set[int] = set()  # of the checkpoints there, as far as this process knows
        self._folder, self._forgotten = folder, 0

    def look(self) -> None:
        """Ask which checkpoints are there; one that does not answer changes nothing. Blocks."""
        try:
            self.versions = StoredCheckpoints(self.run).versions()
        except StorageError as error:
            self.mirror.note(str(error))

    def took(self, versions: Iterable[int]) -> None:
        """The ranks have brought these; the record of the steps behind them follows."""
        before = set(self.versions)
        self.versions |= set(versions)
        if self.versions != before:
            self.push_record()

    def bring(self, sampled: SampledTokens, from_step: int) -> None:
        """What a run that goes on needs on the driver's disk: kept tokens, the name of the best version. Blocks."""
        self.look()
        try:
            sampled.bring(self.run, from_step)
            if not (self._folder / CHECKPOINTS / BEST).exists():
                self.run.get(f"{CHECKPOINTS}/{BEST}", self._folder / CHECKPOINTS / BEST)
        except StorageError as error:  # steps are sampled anew, then
            self.mirror.note(str(error))

    def bring_finished(self, checkpoint: Path, export: Path, written: Exported) -> None:
        """The exported version and its export, whole on the driver's disk. Blocks; RunError where they lie elsewhere only."""
        make_whole(checkpoint, self.run)
        try:
            bring_folder(export, self.run.below(export.name), written.files)
        except StorageError as error:
            raise RunError(
                f"export {export} lies on the evaluation actor's node only: {written.storage_problem or error}. Start the same "
                "command again when the storage answers: it goes on from the last checkpoint"
            ) from error
        if written.storage_problem is not None:
            self.mirror.push_tree(export.name)

    def push_record(self) -> None:
        """Bring the record as it is now."""
        self.mirror.push(RECORD_FILE)

    def what_is_left(self, left: list[str]) -> str:
        """A line about what lies on this disk only."""
        reason = self.mirror.problem or "no reason is known"
        return f"{', '.join(left)} of {self._folder} did not get to {self.run}: {reason}"

    @property
    def push_command(self) -> str:
        root = str(self.run).rpartition("/runs/")[0]
        return f"raydistill runs push {self._folder.name} --output {self._folder.parent.parent} --storage {root}"

    def remove(self, version: int) -> None:
        """A checkpoint that nobody needs any more."""
        self.versions.discard(version)
        self.mirror.do(f"removal of {version}", lambda storage: StoredCheckpoints(storage).remove(version))

    def forget_sampled(self, before_step: int) -> None:
        """See `SampledTokens.forget`."""
        if before_step > self._forgotten:
            self._forgotten = before_step
            self.mirror.do("forgotten", lambda storage: SampledTokens.forget_stored(storage, before_step))

    def newest_here(self) -> list[int]:
        """The newest checkpoint on this disk, with which a run that was stopped goes on."""
        return sorted(version_of(folder) for folder in (self._folder / CHECKPOINTS).glob(f"{PREFIX}*"))[-1:]

    def settle(self, limit_s: float, expected: Iterable[int] = ()) -> list[str]:
        """Bring what is missing there and lies here, and the ledgers of ranks on other disks here. Blocks, at most so long.

        expected: versions that should be there. Returns what is not there, by name.
        """
        deadline = time.monotonic() + limit_s
        self.push_record()
        self.mirror.push_tree("plots")
        left = [name.rstrip("/") for name in self.mirror.finish(limit_s)]
        run = self.run.within(deadline - time.monotonic())
        missing: list[int] = []
        try:
            stored = StoredCheckpoints(run)
            missing = sorted(set(expected) - stored.versions())
            for folder in sorted((self._folder / CHECKPOINTS).glob(f"{PREFIX}*")):
                if version_of(folder) in missing and damage(folder) is None:
                    stored.put(folder)
                    missing.remove(version_of(folder))
            bring_ledgers(self._folder, run)
        except StorageError as error:
            self.mirror.note(str(error))
            missing = missing or sorted(set(expected) - self.versions)
        return left + [f"{CHECKPOINTS}/{checkpoint_folder(Path(), version).name}" for version in missing]


@asynccontextmanager
async def settled(
    storage: RunStorage | None, console: Console, limit: Callable[[float], float]
) -> AsyncIterator[set[int]]:
    """Around a run: brings what is missing there at its end. The body adds the versions that are to be there.

    RunError where a run that finished is not in the storage whole; after another end, a line on the console. `limit` of
    some seconds is how many of them are left, for a run that was stopped.
    """
    expected: set[int] = set()
    if storage is None:
        yield expected
        return
    try:
        yield expected
    except BaseException:
        left = await aside(storage.settle, limit(STOP_S), storage.newest_here())
        if left:
            say(console, f"warning: {storage.what_is_left(left)}", style="yellow")
        raise
    left = await aside(storage.settle, FINISH_S, expected)
    if left:
        raise RunError(
            f"{storage.what_is_left(left)}. The run has finished: bring it there with `{storage.push_command}`"
        )
