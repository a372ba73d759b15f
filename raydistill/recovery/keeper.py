"""Driver side of checkpoints: which version is best, and which folders may go."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from raydistill.recovery.checkpoint import PREFIX, checkpoint_folder, remove_checkpoint, version_of
from raydistill.recovery.sampled import SampledTokens

BEST = "best.json"
FALLBACK = "evaluate/perplexity"  # without a teacher


def read_best(root: Path) -> int | None:
    """The best version as the keeper last wrote it down."""
    try:
        return int(json.loads((root / BEST).read_text())["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


class CheckpointKeeper:
    """Keeps the newest `keep_last` versions, the best `keep_best` and those that wait for their evaluation.

    `sampled`: the run's kept tokens; those of steps before the oldest of the newest versions go as well.
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
    ) -> None:
        self._root, self._sampled, self._metric = root, sampled, metric
        self._keep_last, self._keep_best, self._is_evaluated = keep_last, keep_best, is_evaluated
        self._values: dict[int, float] = {}

    def folder(self, version: int) -> Path:
        return checkpoint_folder(self._root, version)

    @property
    def best_version(self) -> int | None:
        return next(iter(self._best()), None)

    def restore(self, evaluations: Mapping[int, Mapping[str, float]]) -> None:
        """Take in what an earlier life of the run evaluated (version -> metrics)."""
        for version, metrics in evaluations.items():
            self._note(version, metrics)

    def evaluated(self, version: int, metrics: Mapping[str, float]) -> bool:
        """Take in one evaluation; returns whether this version is the best so far."""
        if not self._note(version, metrics):
            return False
        is_best = self.best_version == version
        if is_best:
            name = self._metric if self._metric in metrics else FALLBACK
            record = {"version": version, "folder": self.folder(version).name, name: self._values[version]}
            (self._root / BEST).write_text(json.dumps(record, indent=1))
        self.remove_the_rest()
        return is_best

    def remove_the_rest(self) -> None:
        """Remove what is neither new, nor best, nor still to be evaluated."""
        present = sorted((version_of(folder) for folder in self._root.glob(f"{PREFIX}*")), reverse=True)
        kept = {*present[: self._keep_last], *self._best()[: self._keep_best]}
        for version in present:
            if version not in kept and (version in self._values or not self._is_evaluated(version)):
                remove_checkpoint(self.folder(version))
        if self._sampled is not None and present:
            self._sampled.forget(min(present[: self._keep_last]))

    def _note(self, version: int, metrics: Mapping[str, float]) -> bool:
        value = metrics.get(self._metric, metrics.get(FALLBACK))
        if value is None or not self.folder(version).exists():
            return False
        self._values[version] = value
        return True

    def _best(self) -> list[int]:
        """Evaluated versions that are still there, best first; of equal ones the earlier."""
        finite = [v for v, value in self._values.items() if not math.isnan(value) and self.folder(v).exists()]
        return sorted(finite, key=lambda version: (self._values[version], version))
