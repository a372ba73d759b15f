"""The loop with simple roles: the order of events, staleness, and what ends a run."""

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
import torch

from raydistill.config import Config
from raydistill.data.schedule import StepPlan
from raydistill.errors import ModelError, PolicyGapError, RunError, StaleWeightsError
from raydistill.loop import DistillationLoop, LoopSummary, step_metrics
from raydistill.messages import (
    REFERENCE_VERSION,
    EvalReport,
    LoadReport,
    Metric,
    PromptBatch,
    Samples,
    Span,
    StageReport,
    StepOutcome,
    TokenRows,
    reduce_metrics,
)
from raydistill.ray_metrics import OF_STAGE, STAGES
from raydistill.roles import Roles, Sampled
from raydistill.trainer.step import NAMES
from raydistill.trainer.step import _metrics as trainer_metrics

RANKS = 2
Event = tuple[Any, ...]


def make_config(num_steps: int = 4, staleness: int = 0, **changes: Any) -> Config:
    base: dict[str, Any] = {
        "student": {"dtype": "float32"},
        "trainer": {
            "num_steps": num_steps,
            "num_workers": RANKS,
            "sequences_per_step": 8,
            "sequences_per_micro_batch": 1,
        },
        "sync": {"max_staleness": staleness},
    }
    for section, fields in changes.items():
        base[section] = base.get(section, {}) | fields
    return Config.model_validate(base)


class World:
    """Every role in one: each notes what it was asked, in order. `pause` says how long a call takes, in loop turns."""

    def __init__(self, config: Config, pause: Any = lambda what: 1) -> None:
        self.config, self.pause = config, pause
        self.events: list[Event] = []
        self.held = -1  # the version the engines hold
        self.offered: dict[int, list[list[Any]]] = {}
        self.trained: dict[int, list[list[Any]]] = {}
        self.recorded: dict[int, dict[str, float]] = {}
        self.warnings: list[str] = []
        self.shown: dict[int, list[dict[str, str]]] = {}
        self.changed = asyncio.Event()
        self.load_changes: dict[str, Any] = {}
        self.skip_reason: dict[int, str] = {}
        self.fail: dict[str, BaseException] = {}
        self.references: tuple[int, ...] = ()  # steps that use references only
        self.stale: dict[int, int] = {}  # held-out answers of another version, by the version evaluated

    async def busy(self, what: str) -> None:
        if what in self.fail:
            raise self.fail[what]
        for _ in range(self.pause(what)):
            await asyncio.sleep(0)

    # PromptSource
    def plan(self, step: int) -> StepPlan:
        prompts = PromptBatch(step=step, indices=(0,), row_ids=("p",), prompts=TokenRows.from_rows([[1]]))
        references = Samples(
            step=step,
            indices=(1,),
            row_ids=("r",),
            prompts=TokenRows.from_rows([[1]]),
            completions=TokenRows.from_rows([[2]]),
            policy_versions=(REFERENCE_VERSION,),
            finish_reasons=("reference",),
        )
        has_references = step in self.references
        return StepPlan(
            step=step,
            prompts=None if has_references and step % 2 else prompts,
            references=references if has_references else None,
        )

    def reference_parts(self, references: Samples) -> list[Sampled]:
        return [Sampled(rank=1, num_tokens=1, samples=("reference", references.step))]

    # Rollouts
    async def sample(self, prompts: PromptBatch, version: int) -> AsyncIterator[tuple[StageReport, list[Sampled]]]:
        assert self.held >= version
        self.events.append(("sample", prompts.step, version))
        held = self.held
        for actor in range(2):
            await self.busy("sample")
            handle = ("sampled", prompts.step, held, actor)
            yield (
                report("rollout", f"rollout-{actor}", prompts.step),
                [Sampled(rank=actor, num_tokens=3, samples=handle)],
            )

    async def load(self, weights: Any, version: int, want_codes: bool) -> list[LoadReport]:
        assert weights == f"weights-{version}"
        await self.busy("load")
        self.events.append(("load", version))
        self.held = version
        fields: dict[str, Any] = {
            "actor": "rollout-0",
            "version": version,
            "weights_hash": f"hash-{version}",
            "codes_hash": f"codes-{version}" if want_codes else None,
            "gap_mean_nats": 1e-6,
            "gap_p99_nats": 1e-5,
            "size_bytes": 8,
            "seconds": 0.0,
        }
        return [LoadReport(**(fields | self.load_changes))]

    async def answer_held_out(self) -> list[Any]:
        self.events.append(("answer", self.held))
        return [("answers", self.held)]

    # Teachers
    async def score(self, samples: Any, num_tokens: int, home: int | None = None) -> tuple[StageReport, Any]:
        await self.busy("score")
        self.events.append(("score", *samples[:2]))
        return report("teacher", "teacher-0", samples[1]), ("scored", *samples)

    # Trainer
    async def offer(self, step: int, parts: list[list[Any]]) -> None:
        self.events.append(("offer", step))
        self.offered[step] = parts
        self.changed.set()

    async def outcome(self, step: int) -> StepOutcome:
        while step >= 0 and step not in self.offered:
            self.changed.clear()
            await self.changed.wait()
        await self.busy("outcome")
        await asyncio.sleep(0.001)  # the answer comes from another process
        if step >= 0:
            self.events.append(("trained", step))
            self.trained[step] = self.offered.pop(step)
        codes = f"codes-{step + 1}" if self.config.checks_codes(step + 1) else None
        return StepOutcome(
            step=step,
            version=step + 1,
            weights_hash=f"hash-{step + 1}",
            codes_hash=codes,
            skipped=self.skip_reason.get(step),
            metrics={"trainer/loss": 1.0},
            spans=(),
        )

    def weights(self, version: int) -> str:
        return f"weights-{version}"

    # Evaluator
    async def evaluate(self, weights: Any, version: int, answers: list[Any]) -> EvalReport:
        assert weights == f"weights-{version}"
        assert answers in ([], [("answers", version)])
        await self.busy("evaluate")
        self.events.append(("evaluated", version))
        span = Span(stage="evaluate", actor="evaluator-0", step=version, start_s=0.0, end_s=1.0)
        metrics = {"evaluate/kl_nats": 1.0 / (version + 1)}
        return EvalReport(version=version, metrics=metrics, span=span, stale_answers=self.stale.get(version, 0))

    # Records
    def step(self, outcome: StepOutcome, metrics: dict[str, float]) -> None:
        self.events.append(("recorded", outcome.step))
        self.recorded[outcome.step] = metrics

    def spans(self, spans: list[Span]) -> None: ...

    def sync(self, report: LoadReport) -> None: ...

    async def show(self, weights: Any, version: int) -> list[dict[str, str]]:
        assert weights == f"weights-{version}"
        return [{"student": f"written by {version}"}]

    def evaluation(self, report: EvalReport) -> None: ...

    def samples(self, version: int, rows: list[dict[str, str]]) -> None:
        self.shown[version] = rows

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    def roles(self, **changes: Any) -> Roles:
        fields = dict.fromkeys(("prompts", "rollouts", "teachers", "trainer", "evaluator", "records"), self)
        return Roles(**(fields | {"reference_parts": self.reference_parts} | changes))

    def run(self, **changes: Any) -> LoopSummary:
        async def whole() -> LoopSummary:
            try:
                return await asyncio.wait_for(DistillationLoop(self.config, self.roles(**changes)).run(), 20)
            finally:
                await asyncio.sleep(0.01)
                assert asyncio.all_tasks() == {asyncio.current_task()}, "the loop left tasks behind"

        return asyncio.run(whole())

    def only(self, *kinds: str) -> list[Event]:
        return [event for event in self.events if event[0] in kinds]


def report(stage: Any, actor: str, step: int) -> StageReport:
    span = Span(stage=stage, actor=actor, step=step, start_s=0.0, end_s=0.5)
    metric = Metric(name=f"{stage}/completion_tokens", total=3.0, weight=1.0)
    return StageReport(step=step, num_sequences=1, num_tokens=3, metrics=(metric,), span=span)


def test_without_staleness_everything_is_serial() -> None:
    world = World(make_config(num_steps=3))
    summary = world.run(evaluator=None)
    expected: list[Event] = [("load", 0)]
    for step in range(3):
        expected += [("sample", step, step), ("score", "sampled", step), ("score", "sampled", step)]
        expected += [("offer", step), ("trained", step), ("recorded", step), ("load", step + 1)]
    assert world.events == expected
    assert summary.steps == 3
    assert summary.skipped == 0


def test_each_rank_gets_its_own_parts() -> None:
    world = World(make_config(num_steps=1))
    world.run()
    assert world.trained[0] == [[("scored", "sampled", 0, 0, 0)], [("scored", "sampled", 0, 0, 1)]]


def test_a_staleness_of_one_prefetches_exactly_one_step() -> None:
    world = World(make_config(num_steps=6, staleness=1), pause=lambda what: 200 if what == "outcome" else 1)
    world.run(evaluator=None)
    for step in range(6):
        before = world.events[: world.events.index(("trained", step))]
        offered = [event[1] for event in before if event[0] == "offer"]
        assert offered == list(range(min(step + 2, 6))), f"when step {step} was trained"


def ages(world: World) -> list[int]:
    return [step - part[3] for step, ranks in world.trained.items() for parts in ranks for part in parts]


@pytest.mark.parametrize("staleness", [0, 1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_sample_is_older_than_the_staleness_allows(staleness: int, seed: int) -> None:
    generator = random.Random(seed)
    world = World(make_config(num_steps=12, staleness=staleness), pause=lambda what: generator.randrange(12))
    world.run(evaluator=None)
    assert sorted(world.trained) == list(range(12))
    assert all(0 <= age <= staleness for age in ages(world))
    asked = [step - version for _, step, version in world.only("sample")]
    assert max(asked) == staleness  # the overlap is used


def test_references_are_scored_too_and_mixed_with_samples() -> None:
    world = World(make_config(num_steps=3))
    world.references = (1, 2)  # step 1: references only; step 2: both
    world.run(evaluator=None)
    assert world.trained[1] == [[], [("scored", "reference", 1)]]
    assert world.trained[2][0] == [("scored", "sampled", 2, 2, 0)]
    assert sorted(world.trained[2][1]) == [("scored", "reference", 2), ("scored", "sampled", 2, 2, 1)]
    assert [event[1] for event in world.only("sample")] == [0, 2]


def test_without_a_teacher_parts_go_to_the_trainer_as_they_are() -> None:
    objective = {"on_policy_fraction": 0, "distill_weight": 0, "ce_weight": 1}
    world = World(make_config(num_steps=2, objective=objective))
    world.references = (1,)
    world.run(teachers=None, evaluator=None)
    assert world.trained[1] == [[], [("reference", 1)]]


def test_without_rollouts_nothing_is_loaded() -> None:
    objective = {"on_policy_fraction": 0}
    world = World(make_config(num_steps=2, objective=objective))
    world.references = (1, 3)
    world.plan = lambda step: StepPlan(  # type: ignore[method-assign]
        step=step, prompts=None, references=World.plan(world, 1).references
    )
    world.run(rollouts=None)
    assert world.only("load", "sample", "answer") == []
    assert [event[1] for event in world.only("evaluated")] == [0, 2]


def test_weights_that_differ_from_the_trainers_end_the_run() -> None:
    world = World(make_config())
    world.load_changes = {"weights_hash": "hash-0"}  # right at version 0, one version old afterwards
    with pytest.raises(StaleWeightsError, match=r"rollout-0 holds adapter hash-0 at version 1, .* published hash-1"):
        world.run()
    assert [event[1] for event in world.only("trained")] == [0]


def test_codes_that_differ_from_the_trainers_end_the_run() -> None:
    world = World(make_config())
    world.load_changes = {"codes_hash": "other"}
    with pytest.raises(PolicyGapError, match="rollout-0 rebuilt quantized codes other at version 0"):
        world.run()
    assert world.only("trained") == []


@pytest.mark.parametrize("gap", [0.0011, float("inf"), float("nan")])
def test_a_policy_gap_beyond_the_bound_ends_the_run(gap: float) -> None:
    world = World(make_config())
    world.load_changes = {"gap_mean_nats": gap}
    with pytest.raises(PolicyGapError, match=r"sync.max_policy_gap_nats=1e-03"):
        world.run()


def test_a_gap_within_the_bound_is_remembered_and_an_unchecked_one_is_not_judged() -> None:
    world = World(make_config())
    world.load_changes = {"gap_mean_nats": 9e-4}
    summary = world.run()
    assert summary.largest_gap_nats == 9e-4
    assert summary.codes_hash == "codes-4"
    world = World(make_config())
    world.load_changes = {"gap_mean_nats": None, "gap_p99_nats": None}
    assert world.run().largest_gap_nats == 0.0


def test_skipped_steps_are_recorded_and_the_run_goes_on() -> None:
    world = World(make_config(num_steps=10, trainer={"max_skipped_fraction": 0.2}))
    world.skip_reason = {2: "the loss is NaN or infinite", 7: "the gradient is NaN or infinite"}
    summary = world.run()
    assert (summary.steps, summary.skipped) == (10, 2)
    assert world.warnings == [
        "step 2 was skipped: the loss is NaN or infinite",
        "step 7 was skipped: the gradient is NaN or infinite",
    ]


def test_more_skipped_steps_than_allowed_end_the_run() -> None:
    world = World(make_config(num_steps=10, trainer={"max_skipped_fraction": 0.2}))
    world.skip_reason = dict.fromkeys((2, 5, 7), "the loss is NaN or infinite")
    with pytest.raises(
        RunError, match=r"3 steps were skipped, the last \(step 7\) .*max_skipped_fraction=0.2 allows 2 of 10"
    ):
        world.run()
    assert max(world.recorded) == 7


def test_the_allowed_share_is_not_rounded_down_by_floating_point() -> None:
    section = {"num_steps": 100, "max_skipped_fraction": 0.29}  # 0.29 * 100 is 28.999999999999996
    world = World(make_config(trainer=section))
    world.skip_reason = dict.fromkeys(range(29), "the loss is NaN or infinite")
    assert world.run(evaluator=None).skipped == 29


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_held_out_answers_are_asked_for_before_the_next_load(staleness: int) -> None:
    evaluation = {"eval_every": 1, "exact_match": "final_number"}
    world = World(make_config(num_steps=5, staleness=staleness, evaluation=evaluation), pause=lambda what: 0)
    summary = world.run()
    assert world.only("load", "answer") == [(what, version) for version in range(6) for what in ("load", "answer")]
    assert sorted(evaluation.version for evaluation in summary.evaluations) == list(range(6))


def test_held_out_answers_of_another_version_are_said() -> None:
    world = World(make_config(num_steps=2, evaluation={"eval_every": 1, "exact_match": "final_number"}))
    world.stale[1] = 24
    world.run()
    assert world.warnings == [
        "version 1: 24 held-out answers were written by other weights; its exact match is left out"
    ]


def test_evaluation_runs_beside_training() -> None:
    world = World(make_config(num_steps=4), pause=lambda what: 2000 if what == "evaluate" else 0)
    world.run()
    assert world.events.index(("trained", 0)) < world.events.index(("evaluated", 0))
    assert [event[1] for event in world.only("evaluated")] == [0, 4]


@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize("place", ["sample", "load", "score", "outcome", "evaluate"])
def test_an_error_in_any_task_ends_the_run_with_that_error(place: str, staleness: int) -> None:
    world = World(make_config(staleness=staleness))
    world.fail = {place: ModelError(f"{place} failed")}
    with pytest.raises(ModelError, match=f"^{place} failed$"):
        world.run()


def test_a_reference_that_cannot_be_scored_ends_the_run_while_others_wait() -> None:
    world = World(make_config(staleness=1))
    world.references = (0, 1)
    waiting = asyncio.Event()

    async def score(samples: Any, num_tokens: int, home: int | None) -> Any:
        if samples[0] == "reference":
            raise ModelError("no such token")
        await waiting.wait()

    world.score = score  # type: ignore[method-assign]
    with pytest.raises(ModelError, match="no such token"):
        world.run()


def test_a_steps_metrics_join_trainer_actors_and_stages() -> None:
    outcome = StepOutcome(
        step=0, version=1, weights_hash="", codes_hash=None, skipped=None, metrics={"trainer/loss": 2.0}, spans=()
    )
    reports = [report("rollout", "rollout-0", 0), report("rollout", "rollout-1", 0), report("teacher", "teacher-0", 0)]
    metrics = step_metrics(outcome, reports, wall_s=2.0)
    assert metrics["trainer/loss"] == 2.0
    assert metrics["rollout/completion_tokens"] == 3.0
    assert metrics["rollout/busy_s"] == 1.0
    assert metrics["rollout/wait_s"] == 3.0  # two actors, two seconds, one of them busy
    assert metrics["rollout/tokens_per_s"] == 6.0
    assert metrics["teacher/busy_s"] == 0.5
    assert metrics["loop/step_s"] == 2.0


def test_each_stage_has_the_numbers_that_the_dashboard_draws() -> None:
    """The trainer's tokens are counted by its step, its seconds by rank 0."""
    sums = torch.zeros(len(NAMES), dtype=torch.float64)
    sums[NAMES.index("tokens")] = 90.0
    trained = reduce_metrics(trainer_metrics(sums, norm=1.0)) | {"trainer/busy_s": 0.25, "trainer/wait_s": 0.5}
    outcome = StepOutcome(step=0, version=1, weights_hash="", codes_hash=None, skipped=None, metrics=trained, spans=())
    metrics = step_metrics(outcome, [report("rollout", "rollout-0", 0), report("teacher", "teacher-0", 0)], wall_s=2.0)
    assert {f"{stage}/{kind}" for stage in STAGES for kind in OF_STAGE} <= metrics.keys()
    assert metrics["trainer/tokens_per_s"] == 360.0


def test_a_health_warning_is_given_once() -> None:
    world = World(make_config(num_steps=4))
    metrics = (
        Metric(name="rollout/truncated_fraction", total=1.0),
        Metric(name="rollout/repetition_fraction", total=0.0),
        Metric(name="rollout/empty_fraction", total=0.0),
    )

    async def sample(prompts: PromptBatch, version: int) -> AsyncIterator[Any]:
        yield StageReport(step=prompts.step, num_sequences=1, num_tokens=1, metrics=metrics), []

    world.sample = sample  # type: ignore[method-assign]
    world.run()
    assert len(world.warnings) == 1
    assert world.warnings[0].startswith("step 0: nearly all completions are cut")


def test_what_the_first_and_the_last_version_write_is_shown() -> None:
    world = World(make_config(num_steps=5, evaluation={"eval_every": 2}))
    world.run()
    assert world.shown == {version: [{"student": f"written by {version}"}] for version in (0, 5)}
    world = World(make_config(num_steps=5, evaluation={"eval_every": 2, "shown_rows": 0}))
    world.run()
    assert world.shown == {}
