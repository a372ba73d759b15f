"""What the student wrote, kept until a checkpoint covers it: a run that goes on trains on the same tokens again.

    sampled/step-000012-rank-0.npz     one rank's sampled sequences of one step, written before they are trained on

Only token ids are kept; the teacher scores them again. Without them the steps behind a checkpoint would be sampled anew:
at S = 0 by the same weights, but at S > 0 by fresher ones, and the run would not be the one that was interrupted.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from raydistill.config import Config
from raydistill.health import completion_metrics
from raydistill.merge import merge_samples
from raydistill.messages import REFERENCE_VERSION, PromptBatch, Samples, StageReport, TokenRows
from raydistill.recovery.storage import Storage
from raydistill.roles import Rollouts, Sampled

FOLDER = "sampled"
SHAPES_THE_POLICY = ("num_steps", "learning_rate", "lr_schedule", "warmup_fraction")
"""Settings of the trainer that may change on a resume and make other policies of the steps to come."""


class SampledTokens:
    """The kept tokens of one run, for one rank that writes or the driver that reads."""

    def __init__(self, run_folder: Path, config: Config) -> None:
        self._folder = run_folder / FOLDER
        # Tokens are used again only under the settings that their policies came from.
        self._key = json.dumps({name: getattr(config.trainer, name) for name in SHAPES_THE_POLICY})

    def keep(self, step: int, rank: int, parts: Sequence[Samples]) -> str | None:
        """Write one rank's sampled sequences; references of the data set are known anyway. Best effort: a full disk
        costs the repetition, not the run. Returns the file's name in the run's folder, None if there is none."""
        sampled = [part for part in parts if REFERENCE_VERSION not in part.policy_versions]
        if not sampled:
            return None
        whole = merge_samples(sampled)
        path = self._folder / f"step-{step:06d}-rank-{rank}.npz"
        partial = path.with_suffix(".partial")
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                np.savez(
                    file,
                    key=np.array(self._key),
                    indices=np.array(whole.indices, np.int64),
                    row_ids=np.array(whole.row_ids, dtype=str),
                    prompts=whole.prompts.ids_T,
                    prompt_lengths=whole.prompts.lengths_B,
                    completions=whole.completions.ids_T,
                    completion_lengths=whole.completions.lengths_B,
                    policy_versions=np.array(whole.policy_versions, np.int64),
                    finish_reasons=np.array(whole.finish_reasons, dtype=str),
                )
            os.replace(partial, path)
            return f"{FOLDER}/{path.name}"
        return None

    def of(self, prompts: PromptBatch) -> Samples | None:
        """The kept answers to exactly these prompts, in their order; None unless every one is there."""
        found = [self._read(path, prompts.step) for path in sorted(self._folder.glob(f"step-{prompts.step:06d}-*.npz"))]
        parts = [part for part in found if part is not None]
        if not parts:
            return None
        whole = merge_samples(parts)
        place = {index: row for row, index in enumerate(whole.indices)}
        if any(index not in place for index in prompts.indices):
            return None
        kept = whole.take([place[index] for index in prompts.indices])
        same = kept.row_ids == prompts.row_ids and np.array_equal(kept.prompts.ids_T, prompts.prompts.ids_T)
        return kept if same else None

    def forget(self, before_step: int) -> None:
        """Remove what a checkpoint covers."""
        for path in self._folder.glob("step-*"):
            if _step_of(path.name) < before_step:
                path.unlink(missing_ok=True)

    @staticmethod
    def forget_stored(run: Storage, before_step: int) -> None:
        """The same in the run's folder in run.storage."""
        for name in run.list(FOLDER):
            if _step_of(Path(name).name) < before_step:
                run.remove(name)

    def bring(self, run: Storage, from_step: int) -> None:
        """Bring here what ranks on other disks kept; what is here already stays."""
        for name, size in run.list(FOLDER).items():
            path = self._folder / Path(name).name
            if _step_of(path.name) >= from_step and not path.exists():  # after a crash there are few
                run.get(name, path, size)

    def _read(self, path: Path, step: int) -> Samples | None:
        try:
            with np.load(path, allow_pickle=False) as arrays:
                if str(arrays["key"]) != self._key:
                    return None
                return Samples(
                    step=step,
                    indices=tuple(arrays["indices"].tolist()),
                    row_ids=tuple(arrays["row_ids"].tolist()),
                    prompts=TokenRows(ids_T=arrays["prompts"], lengths_B=arrays["prompt_lengths"]),
                    completions=TokenRows(ids_T=arrays["completions"], lengths_B=arrays["completion_lengths"]),
                    policy_versions=tuple(arrays["policy_versions"].tolist()),
                    finish_reasons=tuple(arrays["finish_reasons"].tolist()),
                )
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError):
            return None  # torn or foreign: sampled anew


def _step_of(name: str) -> int:
    return int(name.split("-")[1])


class ReplayedRollouts:
    """The rollout pool, but for steps whose tokens are kept."""

    def __init__(self, pool: Rollouts, kept: SampledTokens, split: Callable[[Samples], list[Sampled]]) -> None:
        self._pool, self._kept, self._split = pool, kept, split
        self.load, self.answer_held_out = pool.load, pool.answer_held_out

    async def sample(self, prompts: PromptBatch, version: int) -> AsyncIterator[tuple[StageReport, list[Sampled]]]:
        """See `Rollouts.sample`; kept tokens come at once, as parts of their own."""
        kept = self._kept.of(prompts)
        if kept is None:
            async for answer in self._pool.sample(prompts, version):
                yield answer
            return
        report = StageReport(
            step=prompts.step,
            num_sequences=len(kept),
            num_tokens=kept.completions.num_tokens,
            metrics=completion_metrics(kept),
        )
        yield report, self._split(kept)
