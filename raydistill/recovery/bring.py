"""What a run that goes on needs on the driver's disk, brought from `run.storage` where it is not there already."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from raydistill.errors import StorageError, UserError
from raydistill.recovery.checkpoint import (
    CHECKPOINTS,
    PREFIX,
    checkpoint_folder,
    damage,
    digest,
    newest_checkpoint,
    read_description,
    version_of,
)
from raydistill.recovery.lease import refuse_driven
from raydistill.recovery.ledger import FOLDER as LEDGER
from raydistill.recovery.ledger import ledger_problem, put_ledgers
from raydistill.recovery.storage import Storage
from raydistill.recovery.stored import StoredCheckpoints
from raydistill.results.record_lines import RECORD_FILE, decode_line, read_record
from raydistill.results.run_folders import ASIDE, LOCK, is_at_work


def bring_record(folder: Path, run: Storage) -> bool:
    """Bring a run's record here if the one there has gone further, by its last line; returns whether it did."""
    if is_at_work(folder):
        return False
    data = run.read(RECORD_FILE)
    there = whole_lines(data or b"")
    if data is None or not there:
        return False
    here = list(read_record(folder))
    if here and _id_of(here) != _id_of(there):
        raise UserError(
            f"run.name={folder.name!r}: {folder} and {run} in run.storage are two runs of one name; choose another "
            "run.name, or move one of them away"
        )
    if here and here[-1]["time_s"] >= there[-1]["time_s"]:
        return False
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOCK).touch()
    run.get(RECORD_FILE, folder / RECORD_FILE, len(data))
    return True


def set_aside(run: Storage) -> None:
    """Give a run (or a sweep) in the storage another name, if there is one; UserError if somebody drives it."""
    if run.list():
        refuse_driven(run)
        run.move_to(Storage(f"{run.url}{ASIDE}{time.strftime('%Y%m%d-%H%M%S')}"))


def newest_here(run_folder: Path, newest: int | None = None) -> tuple[Path | None, list[str]]:
    """The newest version that lies whole on this disk, with its ledgers; and a line for each newer one that does not.

    newest: versions after this one do not count.
    """
    return newest_checkpoint(
        run_folder / CHECKPOINTS, lambda folder: ledger_problem(run_folder, read_description(folder)), newest
    )


def newest_of_both(run_folder: Path, run: Storage) -> tuple[Path | None, list[str]]:
    """The newest version that is whole, here or there, whole on this disk; and a line for each newer one that is not.

    One that the storage does not have yet is brought there, so that ranks on other disks find it. While the storage does
    not answer, this disk alone counts; StorageError where what is there cannot be brought and this disk has nothing.
    """
    root, stored = run_folder / CHECKPOINTS, StoredCheckpoints(run)
    complaints: list[str] = []
    try:
        there = stored.versions()
    except StorageError as error:
        checkpoint, complaints = newest_here(run_folder)
        return checkpoint, [str(error), *complaints]
    here = {version_of(folder) for folder in root.glob(f"{PREFIX}*")}
    for version in sorted(here | there, reverse=True):
        folder = checkpoint_folder(root, version)
        try:
            problem = stored.bring(root, version) if version in there else damage(folder)
            if problem is not None and version in there and folder.exists() and damage(folder) is None:
                there.discard(version)  # the copy there is the damaged one
                problem = None
            problem = problem or ledger_problem(run_folder, read_description(folder), run)
        except StorageError as error:
            checkpoint, further = newest_here(run_folder, version)
            if checkpoint is None:
                raise
            return checkpoint, [*complaints, str(error), *further]
        if problem is None:
            if version not in there:
                try:
                    put_ledgers(run_folder, read_description(folder), run)
                    stored.put(folder)
                except StorageError as error:
                    complaints.append(f"checkpoint {folder} lies on this disk only: {error}")
            return folder, complaints
        where = str(run) if version in there else str(root)
        complaints.append(f"checkpoint {folder.name} in {where} is damaged: {problem}; the one before it is used")
    return None, complaints


def bring_ledgers(folder: Path, run: Storage) -> None:
    """Every rank's ledger that this disk does not have as long as it is there."""
    for name, size in run.list(LEDGER).items():
        path = folder / name
        if not path.is_file() or path.stat().st_size < size:
            run.get(name, path, size)


def bring_folder(here: Path, there: Storage, digests: dict[str, Any]) -> None:
    """Make a folder equal to one there, whose files are known by their digests. StorageError if it cannot."""
    for name, expected in digests.items():
        for is_brought in (False, True):
            if is_brought and not there.get(name, here / name, expected[0]):
                raise StorageError(f"{there} has no {name}")
            if (here / name).is_file() and digest(here / name) == expected:
                break
        else:
            raise StorageError(f"{there}/{name} is not what was written there")


def put_folder(folder: Path, there: Storage) -> None:
    """Make a folder there equal to one here."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    for name in sorted(names):
        there.put(folder / name, name)
    for name in there.list().keys() - names:
        there.remove(name)


def whole_lines(data: bytes) -> list[dict[str, Any]]:
    """Of a record's bytes."""
    return [decode_line(line) for line in data.splitlines(keepends=True) if line.endswith(b"\n")]


def _id_of(lines: list[dict[str, Any]]) -> object:
    return next((line.get("record_id") for line in lines if line["kind"] == "start"), None)
