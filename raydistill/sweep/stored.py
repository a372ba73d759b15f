"""A sweep's place in `run.storage`: its folder (trials, identity, page, record) beside the runs of its trials.

With it a killed sweep goes on by the same command on a machine whose disk is empty.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from raydistill.errors import RunError
from raydistill.progress import say
from raydistill.recovery.bring import bring_record, set_aside
from raydistill.recovery.mirror import Mirror
from raydistill.recovery.resume import run_storage
from raydistill.recovery.run_storage import FINISH_S, STOP_S
from raydistill.recovery.storage import Storage
from raydistill.sweep.spec import Sweep
from raydistill.sweep.state import STATE_FILE, TUNE_FOLDER, named_runs, trials_of

SWEEPS = "sweeps"  # in run.storage as in run.output


def sweep_storage(sweep: Sweep) -> Storage | None:
    """The place of the sweep's folder, if its runs have one."""
    url = sweep.base.run.storage
    return None if url is None else Storage(url).below(SWEEPS, sweep.name)


def mirror_of(sweep: Sweep) -> Mirror | None:
    """What brings the folder there."""
    storage = sweep_storage(sweep)
    return None if storage is None else Mirror(sweep.folder, storage, leaves_out=(TUNE_FOLDER,))


def bring_sweep(sweep: Sweep) -> None:
    """Bring here what another machine knows of the sweep, if that is more, and the records of its trials."""
    storage = sweep_storage(sweep)
    if storage is None:
        return
    if bring_record(sweep.folder, storage):
        for name, size in storage.list().items():
            storage.get(name, sweep.folder / name, size)
    for folder in trial_folders(sweep):
        bring_record(folder, _run_storage(sweep, folder))


def set_sweep_aside(sweep: Sweep) -> None:
    """Give the sweep and its trials' runs other names there."""
    storage = sweep_storage(sweep)
    if storage is None:
        return
    if not trials_of(sweep.folder):
        storage.get(STATE_FILE, sweep.folder / STATE_FILE)
    for folder in named_runs(sweep):
        set_aside(_run_storage(sweep, folder))
    (sweep.folder / STATE_FILE).unlink(missing_ok=True)
    set_aside(storage)


def trial_folders(sweep: Sweep) -> list[Path]:
    """The runs of the trials that have begun, on this disk."""
    return [sweep.folder.parent.parent / "runs" / str(trial["run"]) for trial in trials_of(sweep.folder)]


@contextmanager
def mirrored(sweep: Sweep, console: Console) -> Iterator[None]:
    """Around a sweep: at its end what is missing there is brought. RunError where a sweep that finished is not there whole."""
    mirror = mirror_of(sweep)
    is_over = False
    try:
        yield
        is_over = True
    finally:
        if mirror is not None:
            mirror.push_tree()
            left = mirror.finish(FINISH_S if is_over else STOP_S)
            text = f"{sweep.folder} did not get to {sweep_storage(sweep)} whole: {mirror.problem}"
            if left and is_over:
                raise RunError(text)
            if left:
                say(console, f"warning: {text}", style="yellow")


def _run_storage(sweep: Sweep, folder: Path) -> Storage:
    found = run_storage(sweep.base, folder)
    assert found is not None, "the caller has seen that there is one"
    return found
