"""What was trained: one line for each sequence of each optimizer step, written by the rank that trained on it.

    ledger/rank-0.jsonl   {"step": 3, "index": 0, "row": "...", "text": "9f2c...", "version": 2}

`version` is the policy that wrote the completion (-1: the data set). A checkpoint notes how long each rank's file was; a
resumed run cuts the files back to that. So the surviving history holds each (step, index) exactly once, and a step that
was skipped not at all. With `run.storage` it also notes a digest: a rank that starts on another disk brings its file there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from raydistill.errors import RunError, disk_errors
from raydistill.messages import Samples
from raydistill.recovery.storage import Storage

FOLDER = "ledger"


class Ledger:
    """One rank's file, opened at the length that the checkpoint knows."""

    def __init__(self, run_folder: Path, rank: int, size_bytes: int = 0) -> None:
        path = ledger_path(run_folder, rank)
        self._name = f"what was trained to {path}"
        with disk_errors(self._name):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")
            self._file.truncate(size_bytes)
            self._file.seek(0, os.SEEK_END)
            self._digest = hashlib.sha256(path.read_bytes())

    def add(self, samples: Samples) -> None:
        """The sequences of one micro-batch that was trained on. RunError where the disk is full."""
        rows = zip(samples.indices, samples.row_ids, samples.completions.rows(), samples.policy_versions, strict=True)
        for index, row, ids, version in rows:
            text = hashlib.sha256(ids.tobytes()).hexdigest()[:16]
            line = {"step": samples.step, "index": index, "row": row, "text": text, "version": version}
            data = json.dumps(line).encode() + b"\n"
            with disk_errors(self._name):
                self._file.write(data)
            self._digest.update(data)

    @property
    def sha256(self) -> str:
        """Of every line so far."""
        return self._digest.hexdigest()

    def commit(self) -> int:
        """Bring every line to the disk; returns the file's length in bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()


def ledger_name(rank: int) -> str:
    return f"{FOLDER}/rank-{rank}.jsonl"


def ledger_path(run_folder: Path, rank: int) -> Path:
    return run_folder / ledger_name(rank)


def bring_ledger(run_folder: Path, rank: int, size_bytes: int, digest: str, run: Storage) -> None:
    """Make sure that a rank's file begins with what the checkpoint knows; RunError where neither disk nor storage has it."""
    path = ledger_path(run_folder, rank)
    for is_brought in (False, True):
        if is_brought:
            run.get(ledger_name(rank), path, size_bytes)
        if _file_begins(path, size_bytes, digest):
            return
    raise RunError(f"{path} is not the ledger that the checkpoint knows, neither here nor in {run}")


def ledger_problem(run_folder: Path, description: Mapping[str, Any], run: Storage | None = None) -> str | None:
    """Which rank's file is on this disk (or in the storage) not as a checkpoint knows it; None if all are.

    Ranks on other disks have brought theirs before the checkpoint was there. Without a storage all see one disk.
    """
    for rank, (size, digest) in enumerate(_known(description)):
        is_known = _file_begins(ledger_path(run_folder, rank), size, digest)
        if not is_known and run is not None and size:
            is_known = _matches(run.read(ledger_name(rank), end=size) or b"", size, digest)
        if not is_known:
            return f"{ledger_name(rank)} is not the ledger that it knows"
    return None


def put_ledgers(run_folder: Path, description: Mapping[str, Any], run: Storage) -> None:
    """Bring the files that a checkpoint on this disk knows."""
    for rank, (size, digest) in enumerate(_known(description)):
        if _file_begins(ledger_path(run_folder, rank), size, digest):
            run.put(ledger_path(run_folder, rank), ledger_name(rank))


def _known(description: Mapping[str, Any]) -> list[tuple[int, str | None]]:
    """Of each rank's file, as a checkpoint describes it: bytes, sha256."""
    sizes = description.get("ledger_bytes", ())
    return list(zip(sizes, description.get("ledger_sha256", [None] * len(sizes)), strict=True))


def _file_begins(path: Path, size_bytes: int, digest: str | None) -> bool:
    """Whether a file begins with so many bytes of this digest; what comes after them was trained later."""
    if not path.is_file():
        return size_bytes == 0
    with path.open("rb") as file:
        return _matches(file.read(size_bytes), size_bytes, digest)


def _matches(data: bytes, size_bytes: int, digest: str | None) -> bool:
    return len(data) == size_bytes and digest in (None, hashlib.sha256(data).hexdigest())


def read_ledger(run_folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of all ranks, rank by rank; a torn last line is left out."""
    for path in sorted((run_folder / FOLDER).glob("rank-*.jsonl")):
        for raw in path.read_bytes().splitlines(keepends=True):
            if raw.endswith(b"\n"):
                yield json.loads(raw)


def ledger_problems(run_folder: Path, steps: Sequence[int], sequences_per_step: int) -> list[str]:
    """What is wrong with a run's ledger: sequences of `steps` that are missing, or trained on more than once."""
    counts = Counter((line["step"], line["index"]) for line in read_ledger(run_folder))
    expected = {(step, index) for step in steps for index in range(sequences_per_step)}
    twice = sorted(key for key, count in counts.items() if count > 1)
    missing, foreign = sorted(expected - counts.keys()), sorted(counts.keys() - expected)
    found = (("trained more than once", twice), ("missing", missing), ("of no known step", foreign))
    return [f"{len(keys)} sequences {what}, first (step, index) {keys[0]}" for what, keys in found if keys]
