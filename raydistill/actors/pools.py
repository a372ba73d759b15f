"""The rollout pool, the teacher pool and the evaluator as the loop sees them: roles on top of `ActorPool`.

Pools are made apart from runs: `RolloutPool.begin` and `TeacherPool.begin` arm them for one run, and the actors (and
what they imported) stay for the next.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ObjectLostError

from raydistill.actors.engine import SamplingSettings
from raydistill.actors.evaluator import EvaluatorActor
from raydistill.actors.pool import ActorPool
from raydistill.actors.rollout import EngineSpec, RolloutActor
from raydistill.actors.teacher import TeacherActor
from raydistill.actors.vllm_settings import CPU_ENGINE_ENVIRONMENT, ENGINE_ENVIRONMENT
from raydistill.config import Config, EvaluationSection, ObjectiveSection, RolloutSection, TeacherSection
from raydistill.data.collate import split_by_tokens
from raydistill.errors import StaleWeightsError
from raydistill.messages import EvalReport, LoadReport, PromptBatch, Samples, StageReport, TokenRows
from raydistill.models import StudentSpec
from raydistill.preflight.placement import ROLE_SHARE
from raydistill.roles import Handle, Sampled

MAX_NAMESAKES = 100
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}  # Ray hides no GPU from an actor that booked none: it would take one unbooked
START_TIMEOUT_S = 900.0  # reading a large model from a cold disk


def rank_of(index: int, num_ranks: int) -> int:
    """Which trainer rank trains on a step's sequence `index`: equal counts for every rank."""
    return index % num_ranks


def actor_options(
    role: str, section: RolloutSection | TeacherSection | EvaluationSection, environment: dict[str, str], by_role: bool
) -> dict[str, Any]:
    """Ray's options for one role's actors; `by_role`: on a node that has the role's resource."""
    return {
        "num_cpus": section.num_cpus,
        "num_gpus": section.num_gpus,
        "runtime_env": {"env_vars": environment},
        **({"resources": {role: ROLE_SHARE}} if by_role else {}),
    }


def start_actor(actor_class: Any, options: dict[str, Any], name: str, *args: Any) -> Any:
    """An actor that Ray's dashboard shows by name; one whose name a dying predecessor still has gets a number behind it."""
    for number in range(MAX_NAMESAKES):
        full_name = name if number == 0 else f"{name}-{number}"
        try:
            return ray.remote(actor_class).options(name=full_name, **options).remote(name, *args)
        except ValueError as error:
            if number + 1 == MAX_NAMESAKES or "name" not in str(error):
                raise
    raise AssertionError("unreachable")


def torch_environment(section: TeacherSection | EvaluationSection) -> dict[str, str]:
    shared = {"TOKENIZERS_PARALLELISM": "false"}
    return shared | NO_GPU | {"OMP_NUM_THREADS": "1"} if section.num_gpus == 0 else shared


class RolloutPool:
    """N rollout actors; a step's prompts are spread over them by tokens."""

    def __init__(self, section: RolloutSection, by_role: bool = False) -> None:
        environment = dict(ENGINE_ENVIRONMENT)
        if section.num_gpus == 0:
            environment |= (
                NO_GPU | CPU_ENGINE_ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": str(max(1, round(section.kv_cache_gib)))}
            )
        self._section = section
        self._options = actor_options("rollout", section, environment, by_role)
        self._pool: ActorPool[Any] = ActorPool(
            "rollout", section.num_actors, self._create, self._revive, section.timeout_s
        )
        self._spec: EngineSpec | None = None
        self._newest: tuple[Handle, str] | None = None  # the weights that every engine holds, and their hash
        self.engine_names: list[str] = []

    def _create(self, index: int) -> Any:
        return start_actor(RolloutActor, self._options, f"rollout-{index}", self._section.engine)

    async def _revive(self, actor: Any, index: int) -> None:
        """Bring a replacement up to the others: the engine, then the newest weights."""
        if self._spec is not None:
            await asyncio.wait_for(actor.start.remote(self._spec), START_TIMEOUT_S)
        if self._newest is not None:
            weights, weights_hash = self._newest
            report = await asyncio.wait_for(actor.load.remote(weights, False), START_TIMEOUT_S)
            if report.weights_hash != weights_hash:
                raise StaleWeightsError(
                    f"rollout-{index}'s replacement loaded {report.weights_hash}, not {weights_hash}"
                )

    def prepare(self) -> list[Any]:
        """Start the slow imports; returns references to wait for (or not)."""
        return [actor.prepare.remote() for actor in self._pool.actors()]

    async def begin(
        self, config: Config, spec: EngineSpec, held_out: PromptBatch | None, seed_of: Callable[[int, int], int]
    ) -> None:
        """Arm the pool for one run: build every engine."""
        self._config, self._held_out, self._seed_of = config, held_out, seed_of
        self._pool.begin_run()
        self._spec, self._newest = spec, None
        self._settings = _settings(config)
        self.engine_names = await self._pool.broadcast("start", spec, timeout_s=START_TIMEOUT_S)

    @property
    def queue_depth(self) -> int:
        """Calls handed out and not answered."""
        return self._pool.queue_depth

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
        ranks = [rank_of(i, self._config.trainer.num_workers) for i in batch.indices]
        present = sorted(set(ranks))
        parts = tuple(tuple(r for r, owner in enumerate(ranks) if owner == rank) for rank in present)
        seeds = tuple(self._seed_of(batch.step, i) for i in batch.indices)
        weight = len(batch.indices) * self._settings.max_new_tokens
        report, *samples = await self._pool.work(
            weight, len(parts), "sample", batch, self._settings, seeds, version, parts, index=index
        )
        tokens = report.num_tokens // len(parts)
        return report, [
            Sampled(rank=rank, num_tokens=tokens, samples=ref) for rank, ref in zip(present, samples, strict=True)
        ]

    def _shares(self, prompts: PromptBatch) -> list[PromptBatch]:
        rows = prompts.prompts.rows()
        split = split_by_tokens(prompts.prompts.lengths_B, len(self._pool), equal_counts=True)
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
        """See `Rollouts.load`."""
        reports: list[LoadReport] = await self._pool.broadcast("load", weights, want_codes)
        self._newest = (weights, reports[0].weights_hash)
        return reports

    async def answer_held_out(self) -> list[Handle]:
        """See `Rollouts.answer_held_out`: greedy, spread over the actors."""
        if self._held_out is None:
            return []
        greedy = SamplingSettings(
            temperature=0.0, top_p=1.0, min_new_tokens=0, max_new_tokens=self._config.evaluation.max_new_tokens
        )
        work = []
        for index, batch in enumerate(self._shares(self._held_out)):
            rows = tuple(range(len(batch.indices)))
            if rows:
                arguments = (batch, greedy, (0,) * len(rows), 0, (rows,))
                weight = len(rows) * greedy.max_new_tokens
                work.append(self._pool.work(weight, 1, "sample", *arguments, index=index))
        return [samples for _, samples in await asyncio.gather(*work)]

    async def tokens_per_cpu_second(self) -> float:
        """Mean over the actors: tokens per CPU-second of the process while it samples."""
        rates = await self._pool.broadcast("tokens_per_cpu_second")
        return float(sum(rates) / len(rates))

    def shutdown(self) -> None:
        self._pool.shutdown()


def _settings(config: Config) -> SamplingSettings:
    r = config.rollout
    return SamplingSettings(
        temperature=r.temperature, top_p=r.top_p, min_new_tokens=r.min_new_tokens, max_new_tokens=r.max_new_tokens
    )


class TeacherPool:
    """M teacher actors; each piece of work goes to the actor with the fewest tokens outstanding."""

    def __init__(self, section: TeacherSection, timeout_s: float, by_role: bool = False) -> None:
        self._options = actor_options("teacher", section, torch_environment(section), by_role)
        self._pool: ActorPool[Any] = ActorPool("teacher", section.num_actors, self._create, self._revive, timeout_s)
        self._arguments: tuple[Any, ...] | None = None
        self.class_names: list[str] = []

    def _create(self, index: int) -> Any:
        return start_actor(TeacherActor, self._options, f"teacher-{index}")

    async def _revive(self, actor: Any, index: int) -> None:
        if self._arguments is not None:
            await asyncio.wait_for(actor.start.remote(*self._arguments), START_TIMEOUT_S)

    async def begin(self, section: TeacherSection, objective: ObjectiveSection, vocab_size: int) -> None:
        """Arm the pool for one run: load the teacher on every actor (those that hold it already keep it)."""
        self._pool.begin_run()
        self._arguments = (section, objective, vocab_size)
        self.class_names = await self._pool.broadcast("start", *self._arguments, timeout_s=START_TIMEOUT_S)

    @property
    def queue_depth(self) -> int:
        """Calls handed out and not answered."""
        return self._pool.queue_depth

    async def score(self, samples: Handle, num_tokens: int) -> tuple[StageReport, Handle]:
        """See `Teachers.score`."""
        report, scored = await self._pool.work(num_tokens, 1, "score", samples)
        return report, scored

    def shutdown(self) -> None:
        self._pool.shutdown()


class EvaluatorRole:
    """The evaluation actor as the loop sees it; replaced and armed again if it dies."""

    def __init__(self, section: EvaluationSection, timeout_s: float, by_role: bool = False) -> None:
        # Held-out rows are scored where the teachers are: no node type of its own for one small actor.
        self._options = actor_options("teacher", section, torch_environment(section), by_role)
        self._pool: ActorPool[Any] = ActorPool("evaluator", 1, self._create, self._revive, timeout_s)
        self._arguments: tuple[Any, ...] | None = None
        self._scored: list[Handle] = []
        self._score: Callable[[], Awaitable[list[Handle]]] | None = None
        self._references: Samples | None = None
        self._lock = asyncio.Lock()

    def _create(self, index: int) -> Any:
        return start_actor(EvaluatorActor, self._options, f"evaluator-{index}")

    async def _revive(self, actor: Any, index: int) -> None:
        if self._arguments is not None:
            await asyncio.wait_for(actor.start.remote(*self._arguments), START_TIMEOUT_S)
            try:
                await asyncio.wait_for(actor.hold_out.remote(*self._scored), START_TIMEOUT_S)
            except ObjectLostError:  # the node of the teacher that made them is gone too
                assert self._score is not None
                self._scored = await self._score()
                await asyncio.wait_for(actor.hold_out.remote(*self._scored), START_TIMEOUT_S)

    async def begin(
        self,
        spec: StudentSpec,
        objective: ObjectiveSection,
        references: Samples | None,
        score: Callable[[], Awaitable[list[Handle]]],
    ) -> None:
        """Build the student and keep the teacher's answers on the held-out references, which `score` asks for."""
        self._pool.begin_run()
        self._lock = asyncio.Lock()  # a lock belongs to one event loop, and each run has its own
        self._scored, self._score = await score(), score
        self._references, self._arguments = references, (spec, objective)
        await self._pool.call(0, "start", spec, objective, timeout_s=START_TIMEOUT_S)
        await self._pool.call(0, "hold_out", *self._scored)

    async def evaluate(self, weights: Handle, version: int, answers: list[Handle]) -> EvalReport:
        """See `Evaluator.evaluate`. Versions are evaluated one after another."""
        async with self._lock:
            report: EvalReport = await self._pool.call(0, "evaluate", weights, self._references, *answers)
        assert report.version == version, f"evaluated {report.version}, wanted {version}"
        return report

    async def export_checkpoint(self, checkpoint: Path, folder: Path, extra: dict[str, Any]) -> str:
        """See `EvaluatorActor.export_checkpoint`."""
        codes_hash: str = await self._pool.call(
            0, "export_checkpoint", checkpoint, folder, extra, timeout_s=START_TIMEOUT_S
        )
        return codes_hash

    def shutdown(self) -> None:
        self._pool.shutdown()
