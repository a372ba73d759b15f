"""The folders of runs: where they lie in an output folder, and whether a process is at work in one."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from raydistill.errors import UserError
from raydistill.results.record_lines import RECORD_FILE

LOCK = "run.lock"
ASIDE = ".before-"
"""In the name of a folder that --resume never set aside: no run goes on there."""


def run_folders(folder: Path) -> list[Path]:
    """Every run folder directly in `folder`, or in its `runs/` (so that an output folder will do), by name."""
    return sorted(path.parent for pattern in ("*", "runs/*") for path in folder.glob(f"{pattern}/{RECORD_FILE}"))


def record_folders(folder: Path) -> list[Path]:
    """The same with the records of sweeps, in the `sweeps/` of an output folder."""
    return [*run_folders(folder), *sorted(path.parent for path in folder.glob(f"sweeps/*/{RECORD_FILE}"))]


def refuse_url(path: Path | str) -> None:
    """UserError where a folder of this disk is wanted and a run in run.storage is named."""
    scheme, separator, place = str(path).partition(":/")  # a Path has lost the second slash
    if not separator or not scheme.isalnum() or Path(path).exists():
        return
    root, _, name = place.strip("/").rpartition("/runs/")
    url, name = f"{scheme}://{root or place.strip('/')}", name.partition("/")[0] or "NAME"
    raise UserError(
        f"{scheme}://{place.strip('/')} is not on this disk; bring the run here with `raydistill runs pull {name} --storage "
        f"{url}` and name outputs/runs/{name}"
    )


def is_at_work(folder: Path) -> bool:
    """Whether a process holds the run's folder."""
    if not (folder / LOCK).exists():
        return False
    try:
        with FileLock(folder / LOCK).acquire(blocking=False):
            return False
    except Timeout:
        return True
