"""Checkpoint folders: one per version, complete or absent; damage is recognised by size and digest.

    checkpoints/step-000150/weights.safetensors       A and B (or all trained weights), whole, float32
    checkpoints/step-000150/optimizer/                DeepSpeed's own files, one or more for each rank
    checkpoints/step-000150/random-0.safetensors      random state of each rank
    checkpoints/step-000150/checkpoint.json           version, hashes, ledger sizes, size and sha256 of every other file

A folder is written under another name, `checkpoint.json` last, and renamed when every byte is on the disk. Trainer ranks
write (`trainer/save.py`), the driver finds the newest whole one (`newest_checkpoint`) and removes old ones (`keeper.py`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from raydistill.errors import RunError
from raydistill.messages import StudentWeights
from raydistill.quant.hashing import hash_tensors

CHECKPOINTS = "checkpoints"  # of a run
WEIGHTS, DESCRIPTION, OPTIMIZER = "weights.safetensors", "checkpoint.json", "optimizer"
FULL_BYTES = 64 * 1024  # a disk with less is full: what failed wrote until nothing more went in
PREFIX, WRITING = "step-", ".writing-"
TORCH_STREAM_ERRORS = ("iostream error", "inline_container", "PytorchStreamWriter")  # what torch.save says of a disk


def checkpoint_folder(root: Path, version: int) -> Path:
    return root / f"{PREFIX}{version:06d}"


def version_of(folder: Path) -> int:
    return int(folder.name.removeprefix(PREFIX))


def partial_folder(root: Path, version: int, attempt: str = "") -> Path:
    """Where a version is written before it gets its name; empty, whatever an earlier attempt left.

    attempt: a word of this attempt alone, with which several processes make the folder, each where none has before it.
    """
    partial = _partial_name(checkpoint_folder(root, version))
    if attempt:
        partial = partial.with_name(f"{partial.name}.{attempt}")
    else:
        shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, exist_ok=bool(attempt))
    return partial


def save_checkpoint(root: Path, weights: StudentWeights, description: Mapping[str, object]) -> Path:
    """Write weights and description of one version; trainer ranks add their state before (see `commit_checkpoint`)."""
    with writing(root, weights.version):
        partial = partial_folder(root, weights.version)
        write_weights(partial, weights)
        return commit_checkpoint(partial, weights.version, {**description, "files": digests(partial)})


def write_weights(partial: Path, weights: StudentWeights) -> None:
    """The file of the whole weights."""
    save_file({k: np.ascontiguousarray(v) for k, v in weights.tensors.items()}, partial / WEIGHTS)


def digests(folder: Path) -> dict[str, list[int | str]]:
    """Name -> [bytes, sha256] of every file in a folder; all of them are on the disk afterwards."""
    return {path.relative_to(folder).as_posix(): digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def commit_checkpoint(partial: Path, version: int, description: Mapping[str, object]) -> Path:
    """Complete `partial` with its description, which has the `files`, and give it its final name: from then on it is whole."""
    final = checkpoint_folder(partial.parent, version)
    (partial / DESCRIPTION).write_text(json.dumps({"version": version, **description}, indent=1))
    _sync(partial / DESCRIPTION)
    _sync(partial)
    if final.exists():
        remove_checkpoint(final)
    os.rename(partial, final)
    _sync(final.parent)
    for left_over in final.parent.glob(f"{WRITING}*"):  # by a crash: one group of ranks writes at a time
        shutil.rmtree(left_over, ignore_errors=True)
    return final


@contextmanager
def writing(root: Path, version: int) -> Iterator[None]:
    """Around one rank's part of writing a checkpoint: a disk error becomes one clear line and leaves nothing behind.

    Other errors pass. They leave the folder: to a rank that still writes there, its end would look like a disk error.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:  # safetensors and torch have errors of their own
        final, is_full = checkpoint_folder(root, version), _is_full(root)
        if not (is_full or isinstance(error, (OSError, SafetensorError, RunError)) or _is_of_stream(error)):
            raise  # a neighbour's death, seen by torch.distributed
        for partial in root.glob(f"{_partial_name(final).name}*"):
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, RunError):
            raise  # a clear line already
        reason = getattr(error, "strerror", None) or (str(error).strip().splitlines() or [type(error).__name__])[0]
        if is_full:
            reason = os.strerror(errno.ENOSPC)  # torch says "iostream error"
        raise RunError(
            f"checkpoint {final} could not be written ({reason}); earlier ones stand. Make room and start the same "
            "command again: it resumes from the last one"
        ) from error


def load_checkpoint(folder: Path) -> StudentWeights:
    """The weights of a checkpoint folder, without probe answers."""
    try:
        description = read_description(folder)
        version = int(description["version"])
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RunError(f"checkpoint {folder} is damaged or incomplete ({error}); use another one") from error
    written = description.get("weights_hash")
    if written is not None and hash_tensors(tensors) != written:
        raise RunError(f"checkpoint {folder} is damaged: its weights are not those that were written; use another one")
    return StudentWeights(version=version, tensors=tensors, probe=None)


def read_description(folder: Path) -> dict[str, Any]:
    """What checkpoint.json says."""
    description: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text())
    return description


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, one phrase; None if every file is as it was written."""
    try:
        description = read_description(folder)
        if int(description["version"]) != version_of(folder):
            return f"its {DESCRIPTION} is that of version {description['version']}"
        for name, written in description["files"].items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if digest(folder / name) != written:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{DESCRIPTION} cannot be read ({error})"
    return None


def newest_checkpoint(
    root: Path, further: Callable[[Path], str | None] = lambda _: None, newest: int | None = None
) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and a line for each newer one that is damaged. further: says what else is wrong with one;
    newest: versions after this one do not count."""
    complaints: list[str] = []
    for folder in sorted(root.glob(f"{PREFIX}*"), reverse=True):
        if newest is not None and version_of(folder) > newest:
            continue
        problem = damage(folder) or further(folder)
        if problem is None:
            return folder, complaints
        complaints.append(f"checkpoint {folder} is damaged: {problem}; the one before it is used")
    return None, complaints


def is_pruned(root: Path) -> bool:
    """Whether there are checkpoints, and the optimizer state of each was removed: they can be exported, not continued."""
    folders = list(root.glob(f"{PREFIX}*"))
    return bool(folders) and all(_lacks_optimizer(folder) for folder in folders)


def _lacks_optimizer(folder: Path) -> bool:
    with suppress(OSError, ValueError, KeyError):
        had = any(name.startswith(f"{OPTIMIZER}/") for name in read_description(folder)["files"])
        return had and not (folder / OPTIMIZER).exists()
    return False


def remove_checkpoint(folder: Path) -> None:
    """Remove a folder without a moment in which half of it has the final name."""
    doomed = folder.with_name(f".removing-{folder.name}")
    with suppress(OSError):  # another process removed it, or the disk is read-only: nothing is lost
        os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _partial_name(final: Path) -> Path:
    return final.with_name(f"{WRITING}{final.name}")


def digest(path: Path) -> list[int | str]:
    """[bytes, sha256] of a file, whose bytes are on the disk afterwards."""
    _sync(path)
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _is_full(root: Path) -> bool:
    with suppress(OSError):
        return shutil.disk_usage(root).free < FULL_BYTES
    return False


def _is_of_stream(error: RuntimeError) -> bool:
    return any(words in str(error) for words in TORCH_STREAM_ERRORS)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
