"""The rollout actor around a simple engine: versions, parts and the gap to the trainer."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from raydistill.actors import rollout as rollout_module
from raydistill.actors.engine import Completion, SamplingSettings
from raydistill.actors.rollout import EngineSpec, RolloutActor
from raydistill.config import AdapterSection, QuantSection, RolloutSection, StudentSection
from raydistill.errors import StaleWeightsError
from raydistill.messages import ProbeAnswers, PromptBatch, StudentWeights, TokenRows, reduce_metrics
from raydistill.models import StudentSpec

RUN = "run-a"
PROBES = TokenRows.from_rows([[1, 2, 3], [4, 5]])
SETTINGS = SamplingSettings(temperature=1.0, top_p=1.0, min_new_tokens=0, max_new_tokens=8)
BATCH = PromptBatch(
    step=9, indices=(0, 1, 2, 5), row_ids=("a", "b", "c", "f"), prompts=TokenRows.from_rows([[10], [11], [12], [15]])
)


class FakeEngine:
    """Completes a prompt with its own first token and its seed; scores by the version it holds."""

    name = "fake"

    def __init__(self) -> None:
        self.version, self.run, self.loads = -1, "", 0

    def select(self, run: str) -> bool:
        return self.run == run

    def drop(self, run: str) -> None: ...

    def load(self, run: str, weights: StudentWeights, want_codes: bool) -> tuple[str, str | None]:
        self.version, self.run, self.loads = weights.version, run, self.loads + 1
        return f"hash-{weights.version}", f"codes-{weights.version}" if want_codes else None

    def sample(self, prompts: TokenRows, settings: SamplingSettings, seeds: Sequence[int]) -> list[Completion]:
        pairs = zip(prompts.rows(), seeds, strict=True)
        return [
            Completion(ids=[int(p[0]), seed], finish_reason="stop" if seed < 102 else "length") for p, seed in pairs
        ]

    def score(self, rows: TokenRows) -> np.ndarray:
        return np.full(rows.num_tokens - len(rows), -1.0 - 0.01 * self.version, np.float32)


def make_actor() -> tuple[RolloutActor, FakeEngine]:
    engine, actor = FakeEngine(), RolloutActor("rollout-3", "hf")
    student = StudentSpec(student=StudentSection(model="m"), quant=QuantSection(), adapter=AdapterSection())
    spec = EngineSpec(student=student, rollout=RolloutSection(), max_model_len=32, eos_ids=(1,), probes=PROBES)
    assert actor.start(RUN, spec, engine) == "fake"
    return actor, engine


def weights(version: int, probe: Sequence[float] | None = None) -> StudentWeights:
    answers = None if probe is None else ProbeAnswers(logprobs_N=np.asarray(probe, np.float32))
    return StudentWeights(version=version, tensors={"a": np.zeros(6, np.float32)}, probe=answers)


def sample(actor: RolloutActor, version: int, parts: Any = ((0, 1, 2, 3),)) -> tuple[Any, ...]:
    return actor.sample(RUN, BATCH, SETTINGS, (100, 101, 102, 105), version, parts)


def test_an_actor_without_weights_does_not_sample() -> None:
    actor, _ = make_actor()
    with pytest.raises(StaleWeightsError, match="rollout-3 holds version -1, it was asked to sample with 0"):
        sample(actor, 0)


def test_an_older_version_than_asked_for_is_refused_and_a_newer_one_is_stamped() -> None:
    actor, _ = make_actor()
    actor.load(RUN, weights(4), want_codes=False)
    with pytest.raises(StaleWeightsError, match="rollout-3 holds version 4, it was asked to sample with 5"):
        sample(actor, 5)
    for asked in (4, 3):
        _, samples = sample(actor, asked)
        assert samples.policy_versions == (4, 4, 4, 4)


def test_a_new_run_forgets_the_versions_of_the_last() -> None:
    actor, engine = make_actor()
    actor.load(RUN, weights(7), want_codes=False)
    actor.start(RUN, actor._runs[RUN].spec, engine)
    with pytest.raises(StaleWeightsError, match="holds version -1"):
        sample(actor, 0)


def test_each_rank_gets_its_own_part_in_order() -> None:
    actor, _ = make_actor()
    actor.load(RUN, weights(0), want_codes=False)
    report, first, second = sample(actor, 0, ((0, 2), (1, 3)))
    assert (first.indices, second.indices) == ((0, 2), (1, 5))
    assert (first.row_ids, second.row_ids) == (("a", "c"), ("b", "f"))
    assert [row.tolist() for row in first.completions.rows()] == [[10, 100], [12, 102]]
    assert [row.tolist() for row in second.completions.rows()] == [[11, 101], [15, 105]]
    assert [row.tolist() for row in second.prompts.rows()] == [[11], [15]]
    assert second.finish_reasons == ("stop", "length")
    assert first.step == second.step == 9
    assert (report.step, report.num_sequences, report.num_tokens) == (9, 4, 8)
    assert reduce_metrics(report.metrics)["rollout/truncated_fraction"] == 0.5
    assert report.span.actor == "rollout-3"
    assert report.span.end_s >= report.span.start_s


def test_the_gap_is_the_distance_to_the_trainers_probe_answers() -> None:
    actor, _ = make_actor()
    report = actor.load(RUN, weights(2, probe=[-1.02, -1.03, -1.10]), want_codes=True)  # the engine says -1.02
    assert report.gap_mean_nats == pytest.approx((0.0 + 0.01 + 0.08) / 3, abs=1e-6)
    assert report.gap_p99_nats == pytest.approx(np.quantile([0.0, 0.01, 0.08], 0.99), abs=1e-6)
    assert (report.actor, report.version, report.size_bytes) == ("rollout-3", 2, 24)
    assert (report.weights_hash, report.codes_hash) == ("hash-2", "codes-2")


def test_without_probe_answers_there_is_no_gap_and_codes_come_when_asked_for() -> None:
    actor, _ = make_actor()
    report = actor.load(RUN, weights(2), want_codes=False)
    assert (report.gap_mean_nats, report.gap_p99_nats, report.codes_hash) == (None, None, None)


def test_a_gap_that_is_not_a_number_is_reported_as_such() -> None:
    actor, _ = make_actor()
    report = actor.load(RUN, weights(2, probe=[-1.0, float("nan"), -1.0]), want_codes=False)
    assert report.gap_mean_nats != report.gap_mean_nats


def test_loading_again_is_harmless() -> None:
    actor, engine = make_actor()
    first = actor.load(RUN, weights(2, probe=[-1.0] * 3), want_codes=True)
    again = actor.load(RUN, weights(2, probe=[-1.0] * 3), want_codes=True)
    assert (first.weights_hash, first.gap_mean_nats) == (again.weights_hash, again.gap_mean_nats)
    assert engine.version == 2


class BuiltEngine(FakeEngine):
    def __init__(self, spec: EngineSpec) -> None:
        super().__init__()
        self.length, self.is_closed = spec.max_model_len, False

    def close(self) -> None:
        self.is_closed = True


def test_an_engine_is_built_anew_for_a_run_that_needs_a_longer_one_and_for_no_other_of_its_kind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Trials of a sweep over data, lengths or sampling: they have an engine in common, also at the same time."""
    built: list[BuiltEngine] = []

    def build(spec: EngineSpec) -> BuiltEngine:
        if spec.max_model_len > 500:
            raise MemoryError("no room")
        built.append(BuiltEngine(spec))
        return built[-1]

    monkeypatch.setattr(rollout_module, "_build", build)
    actor, student = RolloutActor("rollout-0", "vllm"), StudentSection(model="m")

    def spec(length: int, **rollout: Any) -> EngineSpec:
        of = StudentSpec(student=student, quant=QuantSection(), adapter=AdapterSection())
        return EngineSpec(
            student=of, rollout=RolloutSection(**rollout), max_model_len=length, eos_ids=(1,), probes=PROBES
        )

    actor.start(RUN, spec(64))
    actor.load(RUN, weights(3), want_codes=False)
    actor.start("run-b", spec(32, temperature=0.5, max_new_tokens=8))
    assert [engine.length for engine in built] == [64]
    actor.start("run-c", spec(128))
    assert [(engine.length, engine.is_closed) for engine in built] == [(64, True), (128, False)]
    sample(actor, 3)
    assert (built[-1].run, built[-1].version) == (RUN, 3)
    with pytest.raises(MemoryError):
        actor.start("run-d", spec(1024))
    sample(actor, 3)
    assert (built[-1].length, built[-1].version) == (128, 3)


def test_runs_that_share_an_actor_take_turns_with_their_own_weights() -> None:
    actor, engine = make_actor()
    assert actor.start("run-b", actor._runs[RUN].spec, engine) == "fake"
    actor.load(RUN, weights(4), want_codes=False)
    actor.load("run-b", weights(1), want_codes=False)  # each run counts its own versions
    assert engine.loads == 2
    _, of_b = actor.sample("run-b", BATCH, SETTINGS, (100, 101, 102, 105), 1, ((0, 1, 2, 3),))
    assert (engine.loads, engine.version) == (2, 1)  # it was loaded last
    _, of_a = sample(actor, 4)
    assert (engine.loads, engine.version, engine.run) == (3, 4, RUN)
    assert (set(of_a.policy_versions), set(of_b.policy_versions)) == ({4}, {1})
    actor.end("run-b")
    with pytest.raises(KeyError):
        actor.load("run-b", weights(2), want_codes=False)


def test_an_engine_that_is_in_use_is_not_replaced_by_another() -> None:
    actor, _ = make_actor()
    other = replace(actor._runs[RUN].spec, eos_ids=(2,))
    with pytest.raises(AssertionError, match="rollout-3 serves run-a, whose engine is not that of run-b"):
        actor.start("run-b", other)
