"""The folders of runs: where they lie in an output folder, and whether a process is at work in one."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from raydistill.results.record_lines import RECORD_FILE

LOCK = "run.lock"


def run_folders(folder: Path) -> list[Path]:
    """Every run folder directly in `folder`, or in its `runs/` (so that an output folder will do), by name."""
    return sorted(path.parent for pattern in ("*", "runs/*") for path in folder.glob(f"{pattern}/{RECORD_FILE}"))


def is_at_work(folder: Path) -> bool:
    """Whether a process holds the run's folder."""
    if not (folder / LOCK).exists():
        return False
    try:
        with FileLock(folder / LOCK).acquire(blocking=False):
            return False
    except Timeout:
        return True
