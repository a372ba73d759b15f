"""The checkpoints of one run in `run.storage`, under the names that they have in the run's folder.

    checkpoints/step-000150/checkpoint.json     comes last and goes first: a version without it is not there

Several nodes bring the files that lie on each; the one that has the description brings it when the rest is there
(`trainer/uploads.py`). Whoever needs a version gets it whole, compared with the digests that the description has.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path

from filelock import FileLock

from raydistill.errors import RunError, StorageError
from raydistill.recovery.checkpoint import (
    CHECKPOINTS,
    DESCRIPTION,
    PREFIX,
    checkpoint_folder,
    damage,
    digest,
    read_description,
    remove_checkpoint,
    version_of,
)
from raydistill.recovery.storage import Storage

FETCHING = ".fetching-"
FETCH_LOCK = ".fetching.lock"


class StoredCheckpoints:
    """run: the run's folder there. All methods block; StorageError where the storage does not do as it is asked."""

    def __init__(self, run: Storage) -> None:
        self._run = run

    def versions(self) -> set[int]:
        """Of the checkpoints that were brought whole."""
        names = (Path(name) for name in self._run.list(CHECKPOINTS))
        return {
            version_of(name.parent)
            for name in names
            if name.name == DESCRIPTION and name.parent.name.startswith(PREFIX)
        }

    def description(self, version: int) -> bytes | None:
        """What checkpoint.json holds; None: the version is not there."""
        return self._run.read(f"{_name(version)}/{DESCRIPTION}")

    def withdraw(self, version: int) -> None:
        """From here on a version of this number is not there, whatever an earlier life of the run brought."""
        self._run.remove(f"{_name(version)}/{DESCRIPTION}")

    def put_files(self, folder: Path, names: Iterable[str]) -> None:
        """Bring some of a version's files, but for its description."""
        for name in names:
            self._run.put(folder / name, f"{_name(version_of(folder))}/{name}")

    def commit(self, folder: Path) -> None:
        """Bring the description: from here on the version is there."""
        self._run.put(folder / DESCRIPTION, f"{_name(version_of(folder))}/{DESCRIPTION}")

    def put(self, folder: Path) -> None:
        """Bring a version that lies whole on this disk."""
        self.withdraw(version_of(folder))
        self.put_files(folder, read_description(folder)["files"])
        self.commit(folder)

    def remove(self, version: int) -> None:
        """Without a moment in which half of it is there."""
        self.withdraw(version)
        self._run.remove_folder(_name(version))

    def bring(self, root: Path, version: int) -> str | None:
        """Make sure that the version lies whole on this disk, the same as there; what is wrong with it there, if it cannot.

        Processes that share the disk wait for one another, and all but the first find it.
        """
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / FETCH_LOCK):
            folder = checkpoint_folder(root, version)
            there = self.description(version)
            if there is None:
                return "it is not there"
            has_it = (folder / DESCRIPTION).is_file() and (folder / DESCRIPTION).read_bytes() == there
            if has_it and damage(folder) is None:
                return None
            return self._fetch(folder, there)

    def _fetch(self, folder: Path, description: bytes) -> str | None:
        for left_over in folder.parent.glob(f"{FETCHING}*"):
            if left_over.is_dir():
                shutil.rmtree(left_over, ignore_errors=True)
        partial = folder.with_name(f"{FETCHING}{folder.name}.{uuid.uuid4().hex[:8]}")
        try:
            facts = json.loads(description)
            files = facts["files"]
            if int(facts["version"]) != version_of(folder):
                return f"its {DESCRIPTION} is that of version {facts['version']}"
            for name, (size, _) in files.items():
                if not self._run.get(f"{_name(version_of(folder))}/{name}", partial / name, size):
                    return f"{name} is missing"
                if digest(partial / name) != files[name]:
                    return f"{name} is not what was written"
            (partial / DESCRIPTION).write_bytes(description)
            if folder.exists():
                remove_checkpoint(folder)
            os.rename(partial, folder)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return f"{DESCRIPTION} cannot be read ({error})"
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return None


def make_whole(folder: Path, run: Storage | None) -> None:
    """Before a checkpoint is read: where this disk does not have it whole, it comes from the storage. RunError if it cannot."""
    if run is None:
        return
    try:
        problem = StoredCheckpoints(run).bring(folder.parent, version_of(folder))
    except StorageError as error:
        problem = str(error)
    if problem is not None and damage(folder) is not None:
        raise RunError(f"checkpoint {folder} does not lie whole on this node, and comes from no other place: {problem}")


def _name(version: int) -> str:
    return f"{CHECKPOINTS}/{checkpoint_folder(Path(), version).name}"
