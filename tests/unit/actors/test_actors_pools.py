"""The rollout and teacher pools on a simple actor pool: shares, seeds, ranks, and what a replacement is armed with."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ObjectLostError, RayActorError

from raydistill.actors import evaluator_pool, rollout_pool, starting, teacher_pool
from raydistill.actors.engine import Completion
from raydistill.actors.evaluator_pool import EvaluatorPool
from raydistill.actors.rollout import EngineSpec, RolloutActor
from raydistill.actors.rollout_pool import RolloutPool, RunRollouts
from raydistill.actors.teacher_pool import TeacherPool
from raydistill.config import Config
from raydistill.data.schedule import rank_of, sampling_seed
from raydistill.messages import PromptBatch, Samples, StudentWeights, TokenRows
from raydistill.models import StudentSpec
from raydistill.preflight.placement import ROLE_SHARE


class LocalRef:
    """A reference whose object is here; `await` and `.future()` as Ray's."""

    def __init__(self) -> None:
        self.result: Future[Any] = Future()

    def future(self) -> Future[Any]:
        return self.result

    def __await__(self) -> Any:
        return asyncio.wrap_future(self.result).__await__()


class LocalMethod:
    def __init__(self, handle: "LocalHandle", name: str) -> None:
        self.handle, self.name, self.num_returns = handle, name, 1

    def options(self, num_returns: int) -> "LocalMethod":
        self.num_returns = num_returns
        return self

    def remote(self, *args: Any) -> Any:
        refs = [LocalRef() for _ in range(self.num_returns)]
        try:
            values = self.handle.answer(self.name, args)
        except Exception as error:
            for ref in refs:
                ref.result.set_exception(error)
        else:
            for ref, value in zip(refs, values if self.num_returns > 1 else (values,), strict=True):
                ref.result.set_result(value)
        return refs if self.num_returns > 1 else refs[0]


class LocalHandle:
    """An actor in this process; `kill` ends it."""

    def __init__(self, actor: Any, log: list[tuple[Any, ...]]) -> None:
        self.actor, self.log, self.is_dead = actor, log, False

    def __getattr__(self, name: str) -> LocalMethod:
        return LocalMethod(self, name)

    def answer(self, name: str, args: tuple[Any, ...]) -> Any:
        if self.is_dead:
            raise RayActorError()
        if name == "__ray_ready__":
            return True
        self.log.append((self.actor, name))
        return getattr(self.actor, name)(*(a.result.result() if isinstance(a, LocalRef) else a for a in args))


class LocalRay:
    """The few calls of Ray that the pools make."""

    def __init__(self) -> None:
        self.handles: list[LocalHandle] = []
        self.log: list[tuple[Any, ...]] = []

    def remote(self, actor_class: Any) -> Any:
        ray = self

        class Maker:
            def options(self, **_: Any) -> Any:
                return self

            def remote(self, *args: Any) -> LocalHandle:
                ray.handles.append(LocalHandle(actor_class(*args), ray.log))
                return ray.handles[-1]

        return Maker()

    def kill(self, handle: LocalHandle, no_restart: bool) -> None:
        handle.is_dead = True


class EchoEngine:
    """Completes a prompt with its first id and its seed."""

    name = "echo"

    def load(self, run: str, weights: StudentWeights, want_codes: bool) -> tuple[str, str | None]:
        return f"hash-{weights.version}", None

    def select(self, run: str) -> bool:
        return True

    def drop(self, run: str) -> None: ...

    def sample(self, prompts: TokenRows, settings: Any, seeds: Any) -> list[Completion]:
        self.settings = settings
        return [
            Completion(ids=[int(p[0]), s], finish_reason="stop") for p, s in zip(prompts.rows(), seeds, strict=True)
        ]

    def score(self, rows: TokenRows) -> np.ndarray:
        return np.zeros(rows.num_tokens - len(rows), np.float32)


class EchoRolloutActor(RolloutActor):
    def start(self, run: str, spec: EngineSpec, engine: Any = None) -> str:
        return super().start(run, spec, EchoEngine())


CONFIG = Config.model_validate(
    {
        "student": {"model": "m"},
        "trainer": {"num_workers": 2, "sequences_per_step": 8, "sequences_per_micro_batch": 2},
        "rollout": {"num_actors": 3, "max_new_tokens": 4, "timeout_s": 5},
        "evaluation": {"max_new_tokens": 9},
    }
)
PROMPTS = [[10], [11] * 9, [12] * 3, [13] * 5, [14], [15] * 2, [16] * 7, [17]]


def prompt_batch(step: int) -> PromptBatch:
    return PromptBatch(
        step=step,
        indices=tuple(range(8)),
        row_ids=tuple(f"row-{i}" for i in range(8)),
        prompts=TokenRows.from_rows(PROMPTS),
    )


def weights(version: int) -> LocalRef:
    ref = LocalRef()
    ref.result.set_result(StudentWeights(version=version, tensors={}, probe=None))
    return ref


@pytest.fixture
def local_ray(monkeypatch: pytest.MonkeyPatch) -> LocalRay:
    ray = LocalRay()
    monkeypatch.setattr(starting.ray, "remote", ray.remote)
    monkeypatch.setattr(starting.ray, "kill", ray.kill)
    monkeypatch.setattr(rollout_pool, "RolloutActor", EchoRolloutActor)
    return ray


def engine_spec() -> EngineSpec:
    student, probes = StudentSpec.of(CONFIG), TokenRows.from_rows([[1, 2]])
    return EngineSpec(student=student, rollout=CONFIG.rollout, max_model_len=32, eos_ids=(1,), probes=probes)


async def armed_pool(version: int = 0, num_actors: int = 3) -> RunRollouts:
    pool = RolloutPool(CONFIG.rollout.model_copy(update={"num_actors": num_actors}))
    rollouts = await pool.begin("run-a", CONFIG, engine_spec(), prompt_batch(-2))
    await rollouts.load(weights(version), version, False)
    return rollouts


async def sample(pool: RunRollouts, step: int, version: int) -> list[tuple[int, Samples]]:
    sampled = []
    async for report, parts in pool.sample(prompt_batch(step), version):
        assert report.step == step
        sampled += [(part.rank, part.samples.result.result()) for part in parts]
    return sampled


def run(whole: Callable[[], Any]) -> Any:
    return asyncio.run(asyncio.wait_for(whole(), 10))


def test_every_rank_gets_an_equal_number_of_sequences() -> None:
    assert [rank_of(index, 4) for index in range(8)] == [0, 1, 2, 3, 0, 1, 2, 3]


def test_a_steps_prompts_are_spread_and_come_back_with_their_own_seeds_and_ranks(local_ray: LocalRay) -> None:
    async def whole() -> None:
        sampled = await sample(await armed_pool(), step=3, version=0)
        seen = []
        for rank, samples in sampled:
            for index, ids in zip(samples.indices, samples.completions.rows(), strict=True):
                assert rank == index % 2
                assert ids.tolist() == [PROMPTS[index][0], sampling_seed(CONFIG.run.seed, 3, index)]
                seen.append(index)
        assert sorted(seen) == list(range(8))

    run(whole)
    assert len({actor for actor, method in local_ray.log if method == "sample"}) == 3


def test_what_is_sampled_does_not_depend_on_the_number_of_actors(local_ray: LocalRay) -> None:
    async def completions(num_actors: int) -> dict[int, list[int]]:
        sampled = await sample(await armed_pool(num_actors=num_actors), step=3, version=0)
        return {
            index: ids.tolist()
            for _, samples in sampled
            for index, ids in zip(samples.indices, samples.completions.rows(), strict=True)
        }

    assert run(lambda: completions(3)) == run(lambda: completions(1))


def test_a_replacement_is_armed_with_the_newest_weights_before_it_samples(local_ray: LocalRay) -> None:
    async def whole() -> None:
        pool = await armed_pool(version=0)
        await pool.load(weights(1), 1, False)
        local_ray.handles[1].is_dead = True
        sampled = await sample(pool, step=1, version=1)
        assert sum(len(samples) for _, samples in sampled) == 8
        assert all(version == 1 for _, samples in sampled for version in samples.policy_versions)

    run(whole)
    replacement = local_ray.handles[3].actor
    assert [method for actor, method in local_ray.log if actor is replacement] == ["start", "load", "sample"]


def test_a_replacement_is_armed_for_every_run_that_shares_the_pool(local_ray: LocalRay) -> None:
    async def whole() -> None:
        pool = RolloutPool(CONFIG.rollout.model_copy(update={"num_actors": 1}))
        views = [await pool.begin(name, CONFIG, engine_spec(), None) for name in ("run-a", "run-b", "run-c")]
        for number, rollouts in enumerate(views):
            await rollouts.load(weights(number), number, False)
        await pool.end("run-b")
        local_ray.handles[0].is_dead = True
        for number, rollouts in ((0, views[0]), (2, views[2])):
            assert {v for _, s in await sample(rollouts, 1, number) for v in s.policy_versions} == {number}
        assert set(local_ray.handles[1].actor._runs) == {"run-a", "run-c"}

    run(whole)


def test_rows_of_the_data_set_have_a_home_where_their_answers_are_kept(
    local_ray: LocalRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_pool, "TeacherActor", EchoTeacher)
    names = [f"row-{number}" for number in range(200)]

    async def homes(cache_gib: float) -> list[int | None]:
        section = CONFIG.teacher.model_copy(update={"num_actors": 3, "cache_gib": cache_gib})
        pool = TeacherPool(section, timeout_s=5)
        teachers = await pool.begin("run-a", section, CONFIG.objective, 61)
        assert (await teachers.score("samples", 7, home=2))[0] == "report by teacher-2"
        return teachers.homes(names)

    async def whole() -> None:
        kept = await homes(1.0)
        assert kept == await homes(1.0)  # another run asks the same actor
        assert {kept.count(actor) > 40 for actor in range(3)} == {True}
        assert await homes(0.0) == [None] * 200

    run(whole)


def test_a_replacement_during_a_load_holds_the_new_version(local_ray: LocalRay) -> None:
    async def whole() -> None:
        pool = await armed_pool(version=0)
        local_ray.handles[2].is_dead = True
        reports = await pool.load(weights(1), 1, False)
        assert [(r.actor, r.version) for r in reports] == [(f"rollout-{i}", 1) for i in range(3)]

    run(whole)


def test_held_out_prompts_are_answered_greedily_once_each(local_ray: LocalRay) -> None:
    async def whole() -> None:
        handles = await (await armed_pool(version=4)).answer_held_out()
        parts = [handle.result.result() for handle in handles]
        assert sorted(index for part in parts for index in part.indices) == list(range(8))
        assert all(version == 4 for part in parts for version in part.policy_versions)

    run(whole)
    settings = local_ray.handles[0].actor._engine.settings
    assert (settings.temperature, settings.max_new_tokens) == (0.0, 9)


class SlowHandle(LocalHandle):
    """Its answers wait until it dies, and Ray tells of lost calls in any order: here the last one first."""

    def __init__(self, actor: Any, log: list[tuple[Any, ...]]) -> None:
        super().__init__(actor, log)
        self.waiting: list[LocalRef] = []

    def __getattr__(self, name: str) -> LocalMethod:
        return SlowMethod(self, name)

    def die(self) -> None:
        self.is_dead = True
        for ref in reversed(self.waiting):
            ref.result.set_exception(RayActorError())


class SlowMethod(LocalMethod):
    def remote(self, *args: Any) -> Any:
        assert isinstance(self.handle, SlowHandle)
        refs = [LocalRef() for _ in range(self.num_returns)]
        self.handle.waiting += refs[:1]
        return refs if self.num_returns > 1 else refs[0]


def test_held_out_answers_keep_their_version_though_an_actor_dies_before_the_next_load(local_ray: LocalRay) -> None:
    async def whole() -> None:
        pool = await armed_pool(version=4)
        slow = SlowHandle(local_ray.handles[0].actor, local_ray.log)
        pool.pool._members[0].actor = slow
        answers = asyncio.create_task(pool.answer_held_out())
        await asyncio.sleep(0)  # the loop asks for the answers first
        load = asyncio.create_task(pool.load(weights(5), 5, False))
        await asyncio.sleep(0.01)
        slow.die()
        parts = [handle.result.result() for handle in await answers]
        assert {version for part in parts for version in part.policy_versions} == {4}
        assert [report.version for report in await load] == [5, 5, 5]

    run(whole)


def test_a_step_that_is_given_up_leaves_no_work_behind(local_ray: LocalRay, monkeypatch: pytest.MonkeyPatch) -> None:
    async def whole() -> None:
        pool = await armed_pool()
        local_ray.handles[0].actor._engine.sample = None  # this actor's work fails
        monkeypatch.setattr(pool.pool, "work", hang_unless_first(pool.pool.work))
        with pytest.raises(TypeError):
            await sample(pool, step=1, version=0)
        await asyncio.sleep(0.01)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(whole())


def hang_unless_first(work: Any) -> Any:
    async def changed(*args: Any, index: int) -> Any:
        return await (work(*args, index=index) if index == 0 else asyncio.Event().wait())

    return changed


class EchoTeacher:
    def __init__(self, name: str) -> None:
        self.name, self.started = name, 0

    def start(self, *arguments: Any) -> str:
        self.started += 1
        return "Echo"

    def score(self, samples: Any, request: Any) -> tuple[Any, Any]:
        assert self.started
        return f"report by {self.name}", ("scored", samples)


def test_a_pool_knows_what_its_actors_book(local_ray: LocalRay) -> None:
    section = CONFIG.rollout.model_copy(update={"num_gpus": 2.0, "num_cpus": 0.5})
    assert RolloutPool(section)._pool._needs == {"GPU": 2.0, "CPU": 0.5}
    teachers = TeacherPool(CONFIG.teacher.model_copy(update={"num_gpus": 1.0, "num_cpus": 1.0}), 5, by_role=True)
    assert teachers._pool._needs == {"GPU": 1.0, "CPU": 1.0, "teacher": ROLE_SHARE}


def test_a_teacher_that_dies_is_replaced_and_started(local_ray: LocalRay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_pool, "TeacherActor", EchoTeacher)

    async def whole() -> None:
        pool = TeacherPool(CONFIG.teacher, timeout_s=5)
        teachers = await pool.begin("run-a", CONFIG.teacher, CONFIG.objective, 61)
        assert teachers.class_names == ["Echo"]
        local_ray.handles[0].is_dead = True
        report, scored = await teachers.score("samples", 7)
        assert report == "report by teacher-0"
        assert scored.result.result() == ("scored", "samples")

    run(whole)
    assert [method for _, method in local_ray.log] == ["start", "start", "score"]


class EchoEvaluator:
    def __init__(self, name: str) -> None:
        self.held: list[str] = []

    def start(self, run: str, spec: Any, objective: Any) -> None: ...

    def hold_out(self, run: str, *scored: str) -> None:
        self.held = list(scored)

    def evaluate(self, run: str, weights: StudentWeights, references: Any) -> Any:
        return SimpleNamespace(version=weights.version, held=self.held)


def test_an_evaluator_and_the_answers_it_held_may_be_lost_together(
    local_ray: LocalRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They lay on the same node: the teachers are asked again."""
    monkeypatch.setattr(evaluator_pool, "EvaluatorActor", EchoEvaluator)
    answers = [LocalRef(), LocalRef()]
    for answer, text in zip(answers, ("first", "again"), strict=True):
        answer.result.set_result(text)

    asked: list[LocalRef] = []

    async def score() -> list[Any]:
        asked.append(answers[len(asked)])
        return asked[-1:]

    async def whole() -> None:
        pool = EvaluatorPool(CONFIG.evaluation, timeout_s=5)
        role = await pool.begin("run-a", StudentSpec.of(CONFIG), CONFIG.objective, None, score)
        assert (await role.evaluate(weights(1), 1, [])).held == ["first"]
        local_ray.handles[0].is_dead = True
        answers[0].result = Future()
        answers[0].result.set_exception(ObjectLostError("00" * 28, None, ""))
        assert (await role.evaluate(weights(2), 2, [])).held == ["again"]

    run(whole)
    assert len(asked) == 2 and len(local_ray.handles) == 2
