"""Driver side of checkpoints: which version is best, and which folders may go."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path

from raydistill.errors import disk_errors
from raydistill.recovery.checkpoint import PREFIX, checkpoint_folder, remove_checkpoint, version_of
from raydistill.recovery.run_storage import BEST, RunStorage
from raydistill.recovery.sampled import SampledTokens
from raydistill.results.record_lines import evaluations_of

FALLBACK = "evaluate/perplexity"  # without a teacher


def read_best(root: Path) -> int | None:
    """The best version as the keeper last wrote it down; where that cannot be read, by the evaluations in the run's record."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads((root / BEST).read_text())["version"])
    keeper = CheckpointKeeper(root)
    keeper.restore(evaluations_of(root.parent))
    return keeper.best_version


class CheckpointKeeper:
    """Keeps the newest `keep_last` versions, the best `keep_best` and those that wait for their evaluation.

    `sampled`: the run's kept tokens; those of steps before the oldest of the newest versions go as well.
    `storage`: the run's place in run.storage, where the same are kept, each side by what lies on it.
    `is_evaluated(version)`: whether an evaluation of this version will come; the trainer may be ahead of it.
    """

    def __init__(
        self,
        root: Path,
        keep_last: int = 1,
        keep_best: int = 1,
        is_evaluated: Callable[[int], bool] = lambda version: True,
        sampled: SampledTokens | None = None,
        metric: str = "evaluate/kl_nats",
        storage: RunStorage | None = None,
    ) -> None:
        self._storage = storage
        self._root, self._sampled, self._metric = root, sampled, metric
        self._keep_last, self._keep_best, self._is_evaluated = keep_last, keep_best, is_evaluated
        self._answered: set[int] = set()  # evaluated, with whatever came of it
        self._first = 0  # earlier versions are not evaluated any more
        self._values: dict[int, float] = {}
        self._names: dict[int, str] = {}  # of the metric
        self._written: int | None = None

    def folder(self, version: int) -> Path:
        return checkpoint_folder(self._root, version)

    @property
    def best_version(self) -> int | None:
        return next(iter(self._best()), None)

    def restore(self, evaluations: Mapping[int, Mapping[str, float]], first: int = 0) -> None:
        """Take in what an earlier life of the run evaluated (version -> metrics); `first`: where this life goes on."""
        self._first = first
        for version, metrics in evaluations.items():
            self._answered.add(version)
            self._note(version, metrics)

    def evaluated(self, version: int, metrics: Mapping[str, float]) -> bool:
        """Take in one evaluation; returns whether this version is the best so far."""
        self._answered.add(version)
        is_best = self._note(version, metrics) and self.best_version == version
        self.remove_the_rest()
        return is_best

    def remove_the_rest(self) -> None:
        """Remove what is neither new, nor best, nor still to be evaluated."""
        self._write_best()
        here = {version_of(folder) for folder in self._root.glob(f"{PREFIX}*")}
        there = set() if self._storage is None else self._storage.versions
        newest = {version for side in (here, there) for version in sorted(side)[-self._keep_last :]}
        best = {version for side in (here, there) for version in self._best(side)[: self._keep_best]}
        for version in (here | there) - newest - best:
            if not self._awaits(version):
                remove_checkpoint(self.folder(version))
                if version in there and self._storage is not None:
                    self._storage.remove(version)
        if newest and self._sampled is not None:
            self._sampled.forget(min(newest))
        if newest and self._storage is not None:
            self._storage.forget_sampled(min(newest))

    def _awaits(self, version: int) -> bool:
        return version >= self._first and version not in self._answered and self._is_evaluated(version)

    def _write_best(self) -> None:
        """Name the best version in a file, whole or as it was; on other disks a checkpoint may get there after its evaluation.
        RunError where the disk is full."""
        version = self.best_version
        if version is None or version == self._written:
            return
        record = {"version": version, "folder": self.folder(version).name, self._names[version]: self._values[version]}
        path = self._root / BEST
        with disk_errors(f"the name of the best checkpoint to {path}"):
            self._root.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{BEST}.new")
            temporary.write_text(json.dumps(record, indent=1))
            os.replace(temporary, path)
        self._written = version
        if self._storage is not None:
            self._storage.mirror.push(f"{self._root.name}/{BEST}")

    def _is_kept(self, version: int) -> bool:
        return self.folder(version).exists() or (self._storage is not None and version in self._storage.versions)

    def _note(self, version: int, metrics: Mapping[str, float]) -> bool:
        value = metrics.get(self._metric, metrics.get(FALLBACK))
        if value is None or not (self._storage is not None or self.folder(version).exists()):
            return False  # on other disks a checkpoint may still be on its way
        self._values[version] = value
        self._names[version] = self._metric if self._metric in metrics else FALLBACK
        return True

    def _best(self, among: Collection[int] | None = None) -> list[int]:
        """Evaluated versions that are still there, best first; of equal ones the earlier. among: of these only."""
        finite = [
            version
            for version, value in self._values.items()
            if not math.isnan(value) and (self._is_kept(version) if among is None else version in among)
        ]
        return sorted(finite, key=lambda version: (self._values[version], version))
