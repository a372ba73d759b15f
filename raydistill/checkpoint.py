"""Checkpoints of the student: one folder per version, complete or absent, best and last kept.

checkpoints/step-000150/weights.safetensors    A and B (or all weights) in float32
checkpoints/step-000150/checkpoint.json        version, hashes, metrics of the held-out evaluation once known
checkpoints/best.json                          which folder is best, by which metric
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from raydistill.errors import RunError
from raydistill.messages import StudentWeights
from raydistill.quant.hashing import hash_tensors

WEIGHTS, DESCRIPTION, BEST = "weights.safetensors", "checkpoint.json", "best.json"


def checkpoint_folder(root: Path, version: int) -> Path:
    return root / f"step-{version:06d}"


def save_checkpoint(root: Path, weights: StudentWeights, description: Mapping[str, object]) -> Path:
    """Write one version under a temporary name, then rename: a folder with the final name is whole."""
    final = checkpoint_folder(root, weights.version)
    partial = root / f".writing-{final.name}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file({k: np.ascontiguousarray(v) for k, v in weights.tensors.items()}, partial / WEIGHTS)
        (partial / DESCRIPTION).write_text(json.dumps({"version": weights.version, **description}, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partial, final)
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"checkpoint {final} could not be written ({reason}); earlier ones stand") from error
    return final


def load_checkpoint(folder: Path) -> StudentWeights:
    """The weights of a checkpoint folder, without probe answers."""
    try:
        description = read_description(folder)
        version = int(description["version"])  # type: ignore[call-overload]
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RunError(f"checkpoint {folder} is damaged or incomplete ({error}); use another one") from error
    written = description.get("weights_hash")
    if written is not None and hash_tensors(tensors) != written:
        raise RunError(f"checkpoint {folder} is damaged: its weights are not those that were written; use another one")
    return StudentWeights(version=version, tensors=tensors, probe=None)


def read_description(folder: Path) -> dict[str, object]:
    """What checkpoint.json says."""
    description: dict[str, object] = json.loads((folder / DESCRIPTION).read_text())
    return description


class CheckpointKeeper:
    """Driver side: remembers the best version and removes what is neither best, nor last, nor still to be evaluated."""

    def __init__(self, root: Path, metric: str = "evaluate/kl_nats") -> None:
        self._root, self._metric = root, metric
        self._best: tuple[float, int] | None = None
        self._evaluated: set[int] = set()

    def folder(self, version: int) -> Path:
        return checkpoint_folder(self._root, version)

    @property
    def best_version(self) -> int | None:
        return self._best[1] if self._best else None

    def evaluated(self, version: int, metrics: dict[str, float]) -> bool:
        """Take in one evaluation; returns whether this version is the best so far."""
        metric = self._metric if self._metric in metrics else "evaluate/perplexity"
        value, folder = metrics.get(metric), checkpoint_folder(self._root, version)
        if value is None or not folder.exists():
            return False
        self._evaluated.add(version)
        is_best = not math.isnan(value) and (self._best is None or value < self._best[0])
        if is_best:
            self._best = (value, version)
            record = {"version": version, "folder": folder.name, metric: value}
            (self._root / BEST).write_text(json.dumps(record, indent=1))
        self._remove_the_rest()
        return is_best

    def _remove_the_rest(self) -> None:
        """The trainer may be ahead of the evaluation: a version that waits for its turn can still be the best."""
        present = {int(folder.name.removeprefix("step-")): folder for folder in self._root.glob("step-*")}
        for number in self._evaluated - {self.best_version, max(present)}:
            if number in present:
                shutil.rmtree(present[number], ignore_errors=True)
