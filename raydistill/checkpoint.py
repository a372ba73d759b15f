"""Checkpoints of the student: one folder per version, complete or absent, best and last kept.

    checkpoints/step-000150/weights.safetensors    A and B (or all weights) in float32
    checkpoints/step-000150/checkpoint.json        version, hashes, metrics of the held-out evaluation once known
    checkpoints/best.json                          which folder is best, by which metric
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from raydistill.errors import RunError
from raydistill.messages import StudentWeights

WEIGHTS, DESCRIPTION, BEST = "weights.safetensors", "checkpoint.json", "best.json"


def checkpoint_folder(root: Path, version: int) -> Path:
    return root / f"step-{version:06d}"


def save_checkpoint(root: Path, weights: StudentWeights, description: dict[str, object]) -> Path:
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
    except OSError as error:
        raise RunError(f"checkpoint {final} could not be written ({error.strerror or error}); earlier ones stand") from error
    return final


def load_checkpoint(folder: Path) -> StudentWeights:
    """The weights of a checkpoint folder, without probe answers."""
    try:
        version = int(json.loads((folder / DESCRIPTION).read_text())["version"])
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"checkpoint {folder} is damaged or incomplete ({error}); use another one") from error
    return StudentWeights(version=version, tensors=tensors, probe=None)


def read_description(folder: Path) -> dict[str, object]:
    """What checkpoint.json says."""
    description: dict[str, object] = json.loads((folder / DESCRIPTION).read_text())
    return description


class CheckpointKeeper:
    """Driver side: remembers the best version and removes what is neither best nor last."""

    def __init__(self, root: Path, metric: str = "evaluate/kl_nats") -> None:
        self._root, self._metric = root, metric
        self._best: tuple[float, int] | None = None

    def folder(self, version: int) -> Path:
        return checkpoint_folder(self._root, version)

    @property
    def best_version(self) -> int | None:
        return self._best[1] if self._best else None

    def evaluated(self, version: int, metrics: dict[str, float], last: int) -> bool:
        """Take in one evaluation; returns whether this version is the best so far."""
        value = metrics.get(self._metric, metrics.get("evaluate/perplexity"))
        if value is None or not checkpoint_folder(self._root, version).exists():
            return False
        is_best = self._best is None or value < self._best[0]
        if is_best:
            self._best = (value, version)
            record = {"version": version, "folder": checkpoint_folder(self._root, version).name, self._metric: value}
            (self._root / BEST).write_text(json.dumps(record, indent=1))
        assert self._best is not None
        for folder in self._root.glob("step-*"):
            number = int(folder.name.removeprefix("step-"))
            if number < last and number != self._best[1]:
                shutil.rmtree(folder, ignore_errors=True)
        return is_best
