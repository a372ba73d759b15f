"""Sampled tokens outlive a crash: the same tokens come back, whole, to the ranks of today, or not at all."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np

from raydistill.config import Config
from raydistill.messages import REFERENCE_VERSION, PromptBatch, Samples, StageReport, TokenRows
from raydistill.recovery.sampled import FOLDER, ReplayedRollouts, SampledTokens
from raydistill.roles import Sampled


def config(**trainer: Any) -> Config:
    return Config.model_validate({"trainer": trainer})


def prompts(indices: tuple[int, ...], step: int = 3) -> PromptBatch:
    return PromptBatch(
        step=step,
        indices=indices,
        row_ids=tuple(f"zeile-ä-{i}" for i in indices),
        prompts=TokenRows.from_rows([[1, i] for i in indices]),
    )


def answers(indices: tuple[int, ...], step: int = 3, version: int = 2) -> Samples:
    batch = prompts(indices, step)
    return Samples(
        step=step,
        indices=indices,
        row_ids=batch.row_ids,
        prompts=batch.prompts,
        completions=TokenRows.from_rows([[7] * i for i in indices]),
        policy_versions=(version,) * len(indices),
        finish_reasons=("stop",) * len(indices),
    )


def test_the_parts_of_all_ranks_come_back_in_the_order_of_the_prompts(tmp_path: Path) -> None:
    kept = SampledTokens(tmp_path, config())
    kept.keep(3, 0, [answers((0, 4)), answers((2,))])
    kept.keep(3, 1, [answers((1, 3))])
    found = SampledTokens(tmp_path, config()).of(prompts((0, 1, 2, 3, 4)))
    assert found is not None
    expected = answers((0, 1, 2, 3, 4))
    assert (found.step, found.indices, found.row_ids) == (3, expected.indices, expected.row_ids)
    assert (found.policy_versions, found.finish_reasons) == (expected.policy_versions, expected.finish_reasons)
    np.testing.assert_array_equal(found.completions.ids_T, expected.completions.ids_T)
    np.testing.assert_array_equal(found.completions.lengths_B, expected.completions.lengths_B)


def test_a_step_of_which_a_rank_is_missing_torn_or_of_other_prompts_is_sampled_anew(tmp_path: Path) -> None:
    kept = SampledTokens(tmp_path, config())
    kept.keep(3, 0, [answers((0, 2))])
    assert kept.of(prompts((0, 1, 2))) is None
    kept.keep(3, 1, [answers((1,))])
    assert kept.of(prompts((0, 1, 2))) is not None
    assert kept.of(prompts((0, 1, 2), step=4)) is None
    other = PromptBatch(
        step=3,
        indices=(0, 1, 2),
        row_ids=prompts((0, 1, 2)).row_ids,
        prompts=TokenRows.from_rows([[9, i] for i in range(3)]),
    )
    assert kept.of(other) is None
    path = tmp_path / FOLDER / "step-000003-rank-1.npz"
    path.write_bytes(path.read_bytes()[:-40])
    assert kept.of(prompts((0, 1, 2))) is None


def test_references_are_not_kept(tmp_path: Path) -> None:
    kept = SampledTokens(tmp_path, config())
    kept.keep(3, 0, [answers((0,), version=REFERENCE_VERSION)])
    assert not (tmp_path / FOLDER).exists()
    kept.keep(3, 0, [answers((0,), version=REFERENCE_VERSION), answers((1,))])
    found = kept.of(prompts((1,)))
    assert found is not None
    assert found.indices == (1,)


def test_policies_of_another_learning_rate_are_other_policies(tmp_path: Path) -> None:
    SampledTokens(tmp_path, config(learning_rate=1e-3)).keep(3, 0, [answers((0,))])
    assert SampledTokens(tmp_path, config(learning_rate=2e-3)).of(prompts((0,))) is None
    assert SampledTokens(tmp_path, config(learning_rate=1e-3, num_cpus=2)).of(prompts((0,))) is not None


def test_steps_that_a_checkpoint_covers_are_let_go(tmp_path: Path) -> None:
    kept = SampledTokens(tmp_path, config())
    for step in (3, 4, 5):
        kept.keep(step, 0, [answers((0,), step)])
    kept.forget(5)
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ["step-000005-rank-0.npz"]


def test_a_full_disk_costs_the_repetition_and_not_the_run(tmp_path: Path) -> None:
    (tmp_path / FOLDER).write_text("a file where the folder should be")
    kept = SampledTokens(tmp_path, config())
    kept.keep(3, 0, [answers((0,))])
    assert kept.of(prompts((0,))) is None


class Pool:
    """Stands for the rollout pool: says that it was asked."""

    load = answer_held_out = None

    async def sample(self, batch: PromptBatch, version: int) -> AsyncIterator[tuple[StageReport, list[Sampled]]]:
        yield StageReport(step=batch.step, num_sequences=1, num_tokens=0), []


def test_kept_tokens_are_replayed_with_their_metrics_and_others_sampled(tmp_path: Path) -> None:
    kept = SampledTokens(tmp_path, config())
    kept.keep(3, 0, [answers((2, 5))])

    async def sampled(batch: PromptBatch) -> list[tuple[StageReport, list[Sampled]]]:
        pool: Any = Pool()
        rollouts = ReplayedRollouts(pool, kept, lambda known: [Sampled(rank=0, num_tokens=7, samples=known)])
        return [answer async for answer in rollouts.sample(batch, 4)]

    ((report, parts),) = asyncio.run(sampled(prompts((2, 5))))
    assert (report.step, report.num_sequences, report.num_tokens) == (3, 2, 7)
    assert {metric.name: metric.value for metric in report.metrics}["rollout/completion_tokens"] == 3.5
    assert parts[0].samples.indices == (2, 5)
    ((_, parts),) = asyncio.run(sampled(prompts((2, 5), step=4)))
    assert parts == []
