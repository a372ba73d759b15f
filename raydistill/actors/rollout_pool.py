"""The rollout pool: N rollout actors that several runs can share; each run has its own view of them.

    pool = RolloutPool(config.rollout)
    rollouts = await pool.begin(name, config, spec, held_out)   # the role that a run's loop knows
    ...
    await pool.end(name)

An actor keeps the newest weights of every run and computes with those of the run that asks.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from raydistill.actors.engine import SamplingSettings
from raydistill.actors.give_up import needs_of
from raydistill.actors.pool import ActorPool, PoolOfRuns
from raydistill.actors.rollout import EngineSpec, RolloutActor
from raydistill.actors.starting import NO_GPU, START_TIMEOUT_S, actor_options, start_actor
from raydistill.actors.vllm_settings import CPU_ENGINE_ENVIRONMENT, ENGINE_ENVIRONMENT
from raydistill.config import Config, RolloutSection
from raydistill.data.collate import split_by_tokens
from raydistill.data.schedule import rank_of, sampling_seed
from raydistill.errors import StaleWeightsError
from raydistill.messages import LoadReport, PromptBatch, StageReport, TokenRows
from raydistill.roles import Handle, Sampled


class RolloutPool(PoolOfRuns):
    """N rollout actors; `begin` arms them for one run."""

    def __init__(self, section: RolloutSection, by_role: bool = False) -> None:
        environment = dict(ENGINE_ENVIRONMENT)
        if section.num_gpus == 0:
            environment |= (
                NO_GPU | CPU_ENGINE_ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": str(max(1, round(section.kv_cache_gib)))}
            )
        self._section = section
        self._options = actor_options("rollout", section, environment, by_role)
        self._pool: ActorPool[Any] = ActorPool(
            "rollout", section.num_actors, self._create, self._revive, section.timeout_s, needs_of(self._options)
        )
        self._runs: dict[str, RunRollouts] = {}

    def _create(self, index: int) -> Any:
        return start_actor(RolloutActor, self._options, f"rollout-{index}", self._section.engine)

    async def _revive(self, actor: Any, index: int) -> None:
        """Bring a replacement up to the others: the engine, then each run's newest weights."""
        for run in list(self._runs.values()):
            await asyncio.wait_for(actor.start.remote(run.name, run.spec), START_TIMEOUT_S)
            if run.newest is None:
                continue
            weights, weights_hash = run.newest
            report = await asyncio.wait_for(actor.load.remote(run.name, weights, False), START_TIMEOUT_S)
            if report.weights_hash != weights_hash:
                raise StaleWeightsError(
                    f"rollout-{index}'s replacement loaded {report.weights_hash}, not {weights_hash}"
                )

    def prepare(self) -> list[Any]:
        """Start the slow imports; returns references to wait for (or not)."""
        return [actor.prepare.remote() for actor in self._pool.actors()]

    async def begin(self, name: str, config: Config, spec: EngineSpec, held_out: PromptBatch | None) -> RunRollouts:
        """Arm the pool for a run: build every engine that is not there yet. Runs that share a pool have equal engines."""
        self._pool.begin_run(is_alone=not self._runs)
        run = self._runs[name] = RunRollouts(name=name, pool=self._pool, config=config, spec=spec, held_out=held_out)
        run.engine_names = await self._pool.broadcast("start", name, spec, timeout_s=START_TIMEOUT_S)
        return run

    async def end(self, name: str) -> None:
        """Let go of what the actors keep for a run."""
        if self._runs.pop(name, None) is not None:
            await self._pool.tell("end", name)


@dataclass(kw_only=True)
class RunRollouts:
    """One run's view of the pool: the role `Rollouts`. A step's prompts are spread over the actors by tokens."""

    name: str
    pool: ActorPool[Any] = field(repr=False)
    config: Config
    spec: EngineSpec
    held_out: PromptBatch | None
    newest: tuple[Handle, str] | None = None  # the weights that every engine holds for this run, and their hash
    engine_names: list[str] = field(default_factory=list)
    answering: set[asyncio.Future[Any]] = field(default_factory=set, repr=False)  # held-out prompts that are out

    async def sample(self, prompts: PromptBatch, version: int) -> AsyncIterator[tuple[StageReport, list[Sampled]]]:
        """See `Rollouts.sample`."""
        work = [
            asyncio.ensure_future(self._sample_share(batch, index, version))
            for index, batch in enumerate(self._shares(prompts))
            if len(batch.indices)
        ]
        try:
            for done in asyncio.as_completed(work):
                yield await done
        finally:
            for task in work:
                task.cancel()

    async def _sample_share(self, batch: PromptBatch, index: int, version: int) -> tuple[StageReport, list[Sampled]]:
        ranks = [rank_of(i, self.config.trainer.num_workers) for i in batch.indices]
        present = sorted(set(ranks))
        parts = tuple(tuple(r for r, owner in enumerate(ranks) if owner == rank) for rank in present)
        seeds = tuple(sampling_seed(self.config.run.seed, batch.step, i) for i in batch.indices)
        settings = _settings(self.config)
        weight = len(batch.indices) * settings.max_new_tokens
        report, *samples = await self.pool.work(
            weight, len(parts), "sample", self.name, batch, settings, seeds, version, parts, index=index
        )
        tokens = report.num_tokens // len(parts)
        return report, [
            Sampled(rank=rank, num_tokens=tokens, samples=ref) for rank, ref in zip(present, samples, strict=True)
        ]

    def _shares(self, prompts: PromptBatch) -> list[PromptBatch]:
        rows = prompts.prompts.rows()
        split = split_by_tokens(prompts.prompts.lengths_B, len(self.pool), equal_counts=True)
        return [
            PromptBatch(
                step=prompts.step,
                indices=tuple(prompts.indices[r] for r in part),
                row_ids=tuple(prompts.row_ids[r] for r in part),
                prompts=TokenRows.from_rows([rows[r] for r in part]),
            )
            for part in split
        ]

    async def load(self, weights: Handle, version: int, want_codes: bool) -> list[LoadReport]:
        """See `Rollouts.load`.

        A load that waits behind held-out prompts in an actor's queue could overtake them when the actor dies and both are
        given to another, so it is not sent before they are answered.
        """
        if self.answering:
            await asyncio.wait(self.answering)
        reports: list[LoadReport] = await self.pool.broadcast("load", self.name, weights, want_codes)
        self.newest = (weights, reports[0].weights_hash)
        return reports

    async def answer_held_out(self) -> list[Handle]:
        """See `Rollouts.answer_held_out`: greedy, spread over the actors."""
        if self.held_out is None:
            return []
        greedy = SamplingSettings(
            temperature=0.0, top_p=1.0, min_new_tokens=0, max_new_tokens=self.config.evaluation.max_new_tokens
        )
        work = []
        for index, batch in enumerate(self._shares(self.held_out)):
            rows = tuple(range(len(batch.indices)))
            if rows:
                arguments = (self.name, batch, greedy, (0,) * len(rows), 0, (rows,))
                weight = len(rows) * greedy.max_new_tokens
                task = asyncio.ensure_future(self.pool.work(weight, 1, "sample", *arguments, index=index))
                self.answering.add(task)
                task.add_done_callback(self.answering.discard)
                work.append(task)
        return [samples for _, samples in await asyncio.gather(*work)]

    async def tokens_per_cpu_second(self) -> float:
        """Mean over the actors: tokens per CPU-second of the process while it samples for this run."""
        rates = await self.pool.broadcast("tokens_per_cpu_second", self.name)
        return float(sum(rates) / len(rates))


def _settings(config: Config) -> SamplingSettings:
    r = config.rollout
    return SamplingSettings(
        temperature=r.temperature, top_p=r.top_p, min_new_tokens=r.min_new_tokens, max_new_tokens=r.max_new_tokens
    )
