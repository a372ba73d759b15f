"""Whole runs between `run.storage` and a disk: what `raydistill runs pull`, `push` and `list --storage` do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raydistill.errors import RunError, StorageError, UserError
from raydistill.recovery.bring import bring_record, whole_lines
from raydistill.recovery.checkpoint import CHECKPOINTS, DESCRIPTION, PREFIX, damage
from raydistill.recovery.lease import refuse_driven
from raydistill.recovery.resume import RUNS, last_status, status_of
from raydistill.recovery.storage import Storage
from raydistill.recovery.stored import StoredCheckpoints
from raydistill.results.record_lines import RECORD_FILE
from raydistill.results.run_folders import is_at_work


def stored_runs(root: Storage) -> list[dict[str, Any]]:
    """A row for each run there: name, status, steps, checkpoints, bytes."""
    runs, sizes = root.below(RUNS), root.below(RUNS).list()
    rows = []
    for name in sorted({name.partition("/")[0] for name in sizes if name.endswith(f"/{RECORD_FILE}")}):
        lines = whole_lines(runs.read(f"{name}/{RECORD_FILE}") or b"")
        own = {path: size for path, size in sizes.items() if path.startswith(f"{name}/")}
        rows.append(
            {
                "run": name,
                "status": status_of(lines),
                "steps": max((line["step"] + 1 for line in lines if line["kind"] == "step"), default=0),
                "checkpoints": sum(path.endswith(f"/{DESCRIPTION}") for path in own),
                "bytes": sum(own.values()),
            }
        )
    return rows


def pull(root: Storage, output: Path, name: str) -> Path:
    """Bring a run here, all of it; returns its folder. Checkpoints are compared with their digests."""
    run, folder = root.below(RUNS, name), output / "runs" / name
    sizes = run.list()
    if RECORD_FILE not in sizes:
        known = sorted({there.partition("/")[0] for there in root.below(RUNS).list()})
        raise UserError(f"{root} has no run {name!r}; there are: {', '.join(known) or 'none'}")
    if is_at_work(folder):
        raise UserError(f"run {name!r} is at work in another process ({folder}); wait for it, or name another --output")
    bring_record(folder, run)
    stored = StoredCheckpoints(run)
    for version in sorted(stored.versions()):
        problem = stored.bring(folder / CHECKPOINTS, version)
        if problem is not None:
            raise RunError(f"checkpoint {version} in {run} is damaged: {problem}; the rest of the run was not brought")
    for path, size in sizes.items():
        if not path.startswith(f"{CHECKPOINTS}/{PREFIX}") and path != RECORD_FILE:
            run.get(path, folder / path, size)
    return folder


def push(root: Storage, output: Path, name: str) -> None:
    """Bring a run there, all of it but damaged checkpoints; its record last."""
    run, folder = root.below(RUNS, name), output / "runs" / name
    if last_status(folder) is None:
        raise UserError(f"there is no run {name!r} in {output / 'runs'}")
    if is_at_work(folder):
        raise UserError(f"run {name!r} is at work, and brings its own files to run.storage; wait for its end")
    refuse_driven(run)
    if bring_record(folder, run):
        raise UserError(f"{run} has gone further than {folder}, whose record was brought up to it; nothing was pushed")
    stored = StoredCheckpoints(run)
    for checkpoint in sorted((folder / CHECKPOINTS).glob(f"{PREFIX}*")):
        if damage(checkpoint) is None:
            stored.put(checkpoint)
    kept = (f"{CHECKPOINTS}/{PREFIX}", f"{CHECKPOINTS}/.", RECORD_FILE)
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"):
        inside = path.relative_to(folder).as_posix()
        if not inside.startswith(kept):
            run.put(path, inside)
    run.put(folder / RECORD_FILE, RECORD_FILE)


def opened(url: str | None, action: str) -> Storage:
    """The storage that `--storage` names; UserError where it does not answer."""
    if url is None:
        raise UserError(f"runs {action} needs --storage URL: the run.storage of the runs, such as s3://bucket/prefix")
    if "://" not in url:
        raise UserError(f"--storage {url!r} is no URL; write one such as s3://bucket/prefix")
    storage = Storage(url)
    try:
        storage.read(RECORD_FILE)
    except StorageError as error:
        raise UserError(str(error)) from error
    return storage
