"""Which run a command is about: a new one, or one that stopped before its end and goes on from its last checkpoint.

    folder = run_folder(config, data_fingerprint)
    with locked(folder):
        point = find_checkpoint(folder)

With `run.name` the folder is known. Without, the same command means the newest unfinished run whose settings are the
same. Settings that change what is computed may not change on the way; those of `MAY_CHANGE` may.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from raydistill.config import Config
from raydistill.errors import UserError
from raydistill.recovery.bring import bring_record, newest_here, newest_of_both, set_aside, whole_lines
from raydistill.recovery.checkpoint import read_description, version_of
from raydistill.recovery.lease import living_driver
from raydistill.recovery.storage import Storage
from raydistill.results.provenance import scrub
from raydistill.results.record_lines import RECORD_FILE, decode_line, read_record, start_of
from raydistill.results.run_folders import LOCK, is_at_work

MAY_CHANGE = (
    "run.name",
    "run.output",
    "run.storage",
    "run.verbose",
    "run.resume",
    "trainer.num_steps",
    "trainer.learning_rate",
    "trainer.lr_schedule",
    "trainer.warmup_fraction",
    "trainer.max_skipped_fraction",
    "trainer.timeout_s",
    "trainer.num_cpus",
    "teacher.num_actors",
    "teacher.num_gpus",
    "teacher.num_cpus",
    "teacher.batch_tokens",
    "teacher.cache_gib",
    "rollout.num_actors",
    "rollout.num_gpus",
    "rollout.num_cpus",
    "rollout.gpu_memory_utilization",
    "rollout.kv_cache_gib",
    "rollout.timeout_s",
    "sync.max_policy_gap_nats",
    "sync.codes_check_every",
    "evaluation.eval_every",
    "evaluation.shown_rows",
    "evaluation.num_gpus",
    "evaluation.num_cpus",
    "checkpoint.",
    "results.",
    "cluster.",
    "study.",
    "world.",
)
"""Fields (or, with a dot at the end, sections) that a resumed run may set anew."""
OPERATIONAL = ("run.name", "run.output", "run.storage", "run.verbose", "run.resume", "cluster.", "world.")
"""Of these, what may differ between two starts of the same command that names no run."""


RUNS = "runs"  # in run.storage as in run.output
HEAD_BYTES = 2**20  # of a record, with its first line: the settings


def run_storage(config: Config, folder: Path) -> Storage | None:
    """The place of a run's folder in run.storage, if the config has one."""
    return None if config.run.storage is None else Storage(config.run.storage).below(RUNS, folder.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumePoint:
    """Where a run goes on; version 0 without a folder is its beginning."""

    folder: Path | None
    version: int
    skipped: int
    steps: Mapping[int, Mapping[str, float]]  # metrics of the last steps before it
    complaints: tuple[str, ...] = ()


def run_folder(config: Config, data_fingerprint: str) -> Path:
    """The folder of this command's run: an unfinished one that it resumes, or one that does not exist yet.

    With `run.storage` the run may be one that another machine began; its record is brought here.
    """
    runs = (config.run.output / "runs").absolute()
    if config.run.name is not None:
        folder = runs / config.run.name
        storage = run_storage(config, folder)
        if storage is not None and config.run.resume == "auto":
            bring_record(folder, storage)
        if folder.exists():
            _check_named(folder, config, data_fingerprint)
        if storage is not None and config.run.resume == "never":
            set_aside(storage)
        return folder
    if config.run.resume == "auto":
        for folder in _unfinished(runs, config, data_fingerprint):
            storage = run_storage(config, folder)
            if storage is None or not bring_record(folder, storage) or _is_unfinished(folder):
                return folder
        if config.run.storage is not None:
            found = _stored_run(runs, config, data_fingerprint)
            if found is not None:
                return found
    return runs / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"


def goes_on_with(config: Config, data_fingerprint: str) -> Path | None:
    """The run on this disk that this command would go on with, without bringing or moving anything; None: there is none."""
    runs = (config.run.output / "runs").absolute()
    if config.run.resume == "never":
        return None
    if config.run.name is not None:
        return runs / config.run.name if _is_unfinished(runs / config.run.name) else None
    return next(_unfinished(runs, config, data_fingerprint), None)


def _unfinished(runs: Path, config: Config, data_fingerprint: str) -> Iterator[Path]:
    """Idle runs of these settings that have not finished, newest first."""
    for folder in _newest_first(runs):
        is_same = not differences(folder, config, data_fingerprint, OPERATIONAL)  # first: it reads one line only
        if is_same and _is_unfinished(folder) and not is_at_work(folder):
            yield folder


def _check_named(folder: Path, config: Config, data_fingerprint: str) -> None:
    """Make sure that a run of this name can go on; with run.resume=never its folder is set aside."""
    if config.run.resume == "never":
        if is_at_work(folder):
            raise UserError(f"run.name={folder.name!r} is at work in another process; choose another run.name")
        folder.rename(folder.with_name(f"{folder.name}.before-{time.strftime('%Y%m%d-%H%M%S')}"))
        return
    status = last_status(folder)
    if status is None and (folder / LOCK).exists():
        return  # ended before its first line
    if status is None:
        raise UserError(f"run.name={folder.name!r}: {folder} exists and is no run; choose another run.name")
    if status == "finished":
        raise UserError(
            f"run.name={folder.name!r} has finished (see {folder}); choose another run.name, or start it anew with "
            "--resume never, which sets the old folder aside"
        )
    changed = differences(folder, config, data_fingerprint, MAY_CHANGE)
    if changed:
        raise UserError(
            f"run.name={folder.name!r} cannot go on with other settings: {'; '.join(changed)}. Take them back, choose "
            "another run.name, or start anew with --resume never"
        )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder; UserError if another process is at work there. The lock ends with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(
            f"run.name={folder.name!r} is at work in another process (it holds {folder / LOCK}); wait for it, stop it, or "
            "choose another run.name"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _stored_run(runs: Path, config: Config, data_fingerprint: str) -> Path | None:
    """The newest unfinished run with these settings that lies in run.storage, not on this disk, and that nobody drives; its
    record is brought."""
    assert config.run.storage is not None
    stored = Storage(config.run.storage).below(RUNS)
    names = sorted({Path(name).parts[0] for name in stored.list() if Path(name).name == RECORD_FILE}, reverse=True)
    for name in names:
        if (runs / name).exists() or ".before-" in name:
            continue
        first = (stored.read(f"{name}/{RECORD_FILE}", end=HEAD_BYTES) or b"").partition(b"\n")[0]
        with suppress(ValueError):  # torn, or of another kind
            if _differences(decode_line(first), config, data_fingerprint, OPERATIONAL):
                continue
            data = stored.read(f"{name}/{RECORD_FILE}") or b""
            if status_of(whole_lines(data)) != "finished" and living_driver(stored.below(name)) is None:
                bring_record(runs / name, stored.below(name))
                return runs / name
    return None


def find_checkpoint(folder: Path, storage: Storage | None = None) -> ResumePoint:
    """The newest whole checkpoint of a run. With its folder in run.storage: of those here and there, brought here."""
    checkpoint, complaints = newest_here(folder) if storage is None else newest_of_both(folder, storage)
    if checkpoint is None:
        return ResumePoint(folder=None, version=0, skipped=0, steps={}, complaints=tuple(complaints))
    description = read_description(checkpoint)
    return ResumePoint(
        folder=checkpoint,
        version=version_of(checkpoint),
        skipped=int(description.get("skipped_steps", 0)),
        steps={int(step): metrics for step, metrics in description.get("steps", {}).items()},
        complaints=tuple(complaints),
    )


def check_steps(folder: Path, point: ResumePoint, num_steps: int) -> None:
    """UserError where a run would have to go back: it has trained more steps than it is now asked for."""
    if point.version > num_steps:
        raise UserError(
            f"trainer.num_steps={num_steps}, but {folder} has trained {point.version} steps already; ask for at least "
            f"{point.version}, start it anew with --resume never (which sets the old folder aside), or take the student as it "
            f"is: `raydistill export {folder} --to FOLDER --checkpoint {point.version}`"
        )


def last_status(folder: Path) -> str | None:
    """How a run's last life ended: finished, failed, interrupted, or "unfinished"; None where there is no record."""
    return status_of(read_record(folder))


def status_of(lines: Iterable[Mapping[str, Any]]) -> str | None:
    """The same of a record's lines."""
    status = None
    for line in lines:
        if line["kind"] in ("start", "resume"):
            status = "unfinished"
        elif line["kind"] == "end":
            status = line["status"]
    return status


def differences(folder: Path, config: Config, data_fingerprint: str, allowed: tuple[str, ...]) -> list[str]:
    """`field was x, is y` for the data and every setting that differ from the run's record, but for those that may."""
    start = start_of(folder)
    return ["the run has no record"] if start is None else _differences(start, config, data_fingerprint, allowed)


def _differences(
    start: Mapping[str, Any], config: Config, data_fingerprint: str, allowed: tuple[str, ...]
) -> list[str]:
    # The record keeps no password: two addresses that differ in it only are one.
    before, now = flat_settings(start["config"]), flat_settings(scrub(json.loads(config.model_dump_json())))
    before["data fingerprint"], now["data fingerprint"] = start["data_fingerprint"], data_fingerprint
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in changed if not is_listed(name, allowed)
    ]


def is_listed(name: str, fields: tuple[str, ...]) -> bool:
    """Whether a field is one of these, or in one of these sections (with a dot at the end)."""
    return any(name == field or (field.endswith(".") and name.startswith(field)) for field in fields)


def flat_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """`section.field` -> value, of the plain form of a config."""
    return {f"{section}.{name}": value for section, fields in config.items() for name, value in fields.items()}


def _newest_first(runs: Path) -> list[Path]:
    folders = [folder for folder in runs.glob("*") if (folder / LOCK).exists()]
    return sorted(folders, key=lambda folder: (folder / LOCK).stat().st_mtime, reverse=True)


def _is_unfinished(folder: Path) -> bool:
    return last_status(folder) not in (None, "finished")
