"""Which run a command is about: a new one, or one that stopped before its end and goes on from its last checkpoint.

    folder = run_folder(config, data_fingerprint)
    with locked(folder):
        point = find_checkpoint(folder)

With `run.name` the folder is known. Without, the same command means the newest unfinished run whose settings are the
same, but for those that change no result (`OPERATIONAL`). Settings that change what is computed may not change on the way;
a run that is named may set those of `MAY_CHANGE` anew.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from raydistill.config import Config
from raydistill.errors import UserError
from raydistill.recovery.bring import bring_record, newest_here, newest_of_both, set_aside, whole_lines
from raydistill.recovery.checkpoint import CHECKPOINTS, is_pruned, read_description, version_of
from raydistill.recovery.lease import Say, living_driver, seems_driven, unheard
from raydistill.recovery.storage import Storage
from raydistill.results.provenance import scrub
from raydistill.results.record_lines import RECORD_FILE, decode_line, read_record, start_of
from raydistill.results.run_folders import ASIDE, LOCK, is_at_work

NEUTRAL = (
    "run.name",
    "run.output",
    "run.storage",
    "run.verbose",
    "run.resume",
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
    "evaluation.shown_rows",
    "evaluation.num_gpus",
    "evaluation.num_cpus",
    "checkpoint.",
    "results.",
    "cluster.",
)
"""Fields (or, with a dot at the end, sections) that decide how a run gets on, not what it trains: limits, devices, places.
Our own error lines advise to change such a field and to start the same command again."""
OPERATIONAL = (*NEUTRAL, "study.", "world.")
"""What may differ between two starts of the same command that names no run: a run has its models and rows by then."""
MAY_CHANGE = (
    *OPERATIONAL,
    "trainer.num_steps",
    "trainer.learning_rate",
    "trainer.lr_schedule",
    "trainer.warmup_fraction",
    "evaluation.eval_every",
)
"""What a run that is named may set anew on the way, although its result changes."""


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


def run_folder(config: Config, data_fingerprint: str, say: Say = unheard) -> Path:
    """The folder of this command's run: an unfinished one that it resumes, or one that does not exist yet.

    With `run.storage` the run may be one that another machine began; its record is brought here.
    say: told of an unfinished run that differs only in what a named run may set anew, where another one begins.
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
        passed_over: list[str] = []
        for name, changed in chain(
            _alike_here(runs, config, data_fingerprint), _alike_there(runs, config, data_fingerprint)
        ):
            if changed:
                passed_over.append(
                    f"runs/{name} is unfinished and differs in {', '.join(changed)} only; --run.name {name} goes on with it"
                )
                continue
            storage = run_storage(config, runs / name)
            if storage is None or not bring_record(runs / name, storage) or _is_unfinished(runs / name):
                return runs / name
        for text in passed_over[:1]:
            say(text)
    return runs / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"


def goes_on_with(config: Config, data_fingerprint: str) -> Path | None:
    """The run on this disk that this command would go on with, without bringing or moving anything; None: there is none."""
    runs = (config.run.output / "runs").absolute()
    if config.run.resume == "never":
        return None
    if config.run.name is not None:
        return runs / config.run.name if _is_unfinished(runs / config.run.name) else None
    alike = _alike_here(runs, config, data_fingerprint)
    return next((runs / name for name, changed in alike if not changed), None)


def _alike_here(runs: Path, config: Config, data_fingerprint: str) -> Iterator[tuple[str, list[str]]]:
    """Idle runs that have not finished and could go on with these settings, newest first: name, and the fields that differ
    and change the result, with which they go on only if they are named."""
    for folder in _newest_first(runs):
        changed = _changed_on_purpose(start_of(folder), config, data_fingerprint)  # first: it reads one line only
        if changed is None or not _is_unfinished(folder) or is_at_work(folder) or _was_pruned(folder, config):
            continue
        yield folder.name, changed


def _alike_there(runs: Path, config: Config, data_fingerprint: str) -> Iterator[tuple[str, list[str]]]:
    """The same of the runs in run.storage that do not lie on this disk and that nobody drives."""
    if config.run.storage is None:
        return
    stored = Storage(config.run.storage).below(RUNS)
    names = sorted({Path(name).parts[0] for name in stored.list() if Path(name).name == RECORD_FILE}, reverse=True)
    for name in names:
        if (runs / name).exists() or ASIDE in name:
            continue
        first = (stored.read(f"{name}/{RECORD_FILE}", end=HEAD_BYTES) or b"").partition(b"\n")[0]
        with suppress(ValueError):  # torn, or of another kind
            changed = _changed_on_purpose(decode_line(first), config, data_fingerprint)
            if changed is None or status_of(whole_lines(stored.read(f"{name}/{RECORD_FILE}") or b"")) == "finished":
                continue
            run = stored.below(name)
            if seems_driven(run) if changed else living_driver(run) is not None:
                continue
            yield name, changed


def _check_named(folder: Path, config: Config, data_fingerprint: str) -> None:
    """Make sure that a run of this name can go on; with run.resume=never its folder is set aside."""
    if config.run.resume == "never":
        if is_at_work(folder):
            raise UserError(f"run.name={folder.name!r} is at work in another process; choose another run.name")
        folder.rename(folder.with_name(f"{folder.name}{ASIDE}{time.strftime('%Y%m%d-%H%M%S')}"))
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
    if _was_pruned(folder, config):
        raise UserError(
            f"run.name={folder.name!r} was given up: `raydistill runs prune --unfinished` removed what it would go on from; "
            "choose another run.name, or start it anew with --resume never, which sets the old folder aside"
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
    return (
        ["the run has no record"]
        if start is None
        else list(_differences(start, config, data_fingerprint, allowed).values())
    )


def _changed_on_purpose(start: Mapping[str, Any] | None, config: Config, data_fingerprint: str) -> list[str] | None:
    """Which fields of MAY_CHANGE differ and change the result; None where a run with this start line cannot go on at all."""
    if start is None:
        return None
    found = _differences(start, config, data_fingerprint, OPERATIONAL)
    return list(found) if all(is_listed(name, MAY_CHANGE) for name in found) else None


def _differences(
    start: Mapping[str, Any], config: Config, data_fingerprint: str, allowed: tuple[str, ...]
) -> dict[str, str]:
    """The same by field."""
    # The record keeps no password: two addresses that differ in it only are one.
    before, now = flat_settings(start["config"]), flat_settings(scrub(json.loads(config.model_dump_json())))
    before["data fingerprint"], now["data fingerprint"] = start["data_fingerprint"], data_fingerprint
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return {
        name: f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in changed
        if not is_listed(name, allowed)
    }


def is_listed(name: str, fields: tuple[str, ...]) -> bool:
    """Whether a field is one of these, or in one of these sections (with a dot at the end)."""
    return any(name == field or (field.endswith(".") and name.startswith(field)) for field in fields)


def flat_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """`section.field` -> value, of the plain form of a config."""
    return {f"{section}.{name}": value for section, fields in config.items() for name, value in fields.items()}


def _newest_first(runs: Path) -> list[Path]:
    folders = [folder for folder in runs.glob("*") if (folder / LOCK).exists() and ASIDE not in folder.name]
    return sorted(folders, key=lambda folder: (folder / LOCK).stat().st_mtime, reverse=True)


def _is_unfinished(folder: Path) -> bool:
    return last_status(folder) not in (None, "finished")


def _was_pruned(folder: Path, config: Config) -> bool:
    """Whether `runs prune --unfinished` gave the run up, and no other place has what it would go on from."""
    return config.run.storage is None and is_pruned(folder / CHECKPOINTS)
