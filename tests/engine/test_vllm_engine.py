"""The real vLLM computes and samples the student that is trained, version after version.

vLLM runs in one process of its own (`vllm_worker_process.py`); the reference is the transformers engine, which is built
by the trainer's own function.
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_questions import (
    A_TURN,
    ALONE,
    ENVIRONMENT,
    GREEDY,
    LONG_GREEDY,
    SAMPLED,
    Answers,
    Scenario,
    ask,
    make_scenario,
    make_spec,
    play_in_a_process,
)

from raydistill.actors.engine import Completion, SamplingSettings
from raydistill.actors.hf_engine import HfEngine
from raydistill.actors.rollout import EngineSpec, RolloutActor
from raydistill.config import Config, RolloutSection
from raydistill.errors import StaleWeightsError
from raydistill.loop import DistillationLoop
from raydistill.messages import LoadReport, ProbeAnswers, StepOutcome, StudentWeights, TokenRows
from raydistill.models import StudentSpec, build_student
from raydistill.quant.export import export_live
from raydistill.quant.hashing import hash_tensors
from raydistill.quant.student import adapter_state, load_adapter_state

pytestmark = pytest.mark.engine

SCENARIOS = {
    "merged": {"mode": "merged", "dtype": "float32", "format": "int4"},
    "served": {"mode": "served", "dtype": "float32", "format": "int4"},
    "none": {"mode": "none", "dtype": "float32", "format": "int4"},
    "unquantized": {"mode": "merged", "dtype": "float32", "format": "none"},
    "bfloat16": {"mode": "merged", "dtype": "bfloat16", "format": "int2"},
    "llama": {"mode": "merged", "dtype": "float32", "format": "int4"},
    "gemma3": {"mode": "merged", "dtype": "float32", "format": "int4"},
    "sharded": {"mode": "merged", "dtype": "float32", "format": "int4"},  # by two ranks; the last, see the process
}
FROZEN_CODES = ("served", "unquantized")
FEW_IDS = 60  # in the scenario "unquantized": as if the teacher had no more
FLOAT32 = [name for name, kind in SCENARIOS.items() if kind["dtype"] == "float32"]
QUANTIZED = [name for name, kind in SCENARIOS.items() if kind["format"] != "none"]


def spec_of(name: str, model: Path) -> StudentSpec:
    return make_spec(model, **SCENARIOS[name])


@pytest.fixture(scope="module")
def scenarios(tiny_world: Any, architectures: dict[str, Path]) -> dict[str, Scenario]:
    from transformers import AutoTokenizer

    models = {name: architectures.get(name.split()[0], tiny_world.teacher_folder) for name in SCENARIOS}
    known_ids = {"unquantized": FEW_IDS, "llama": len(AutoTokenizer.from_pretrained(tiny_world.teacher_folder))}
    return {
        name: make_scenario(
            name,
            tiny_world,
            spec_of(name, model),
            sampled_ids=known_ids.get(name),
            tensor_parallel_size=2 if name == "sharded" else 1,
        )
        for name, model in models.items()
    }


@pytest.fixture(scope="module")
def vllm(scenarios: dict[str, Scenario], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """name -> what vLLM said in that scenario."""
    played = play_in_a_process(list(scenarios.values()), tmp_path_factory.mktemp("vllm"), ENVIRONMENT)
    return played.__getitem__


@pytest.fixture(scope="module")
def transformers_answers(scenarios: dict[str, Scenario]) -> Any:
    """The reference for a scenario, computed when first asked for."""
    known: dict[str, list[Answers]] = {}

    def of(name: str) -> list[Answers]:
        if name not in known:
            scenario = scenarios[name]
            engine = HfEngine(scenario.spec, scenario.eos_ids, scenario.sampled_ids)
            known[name] = [ask(engine, scenario, weights) for weights in scenario.versions]
        return known[name]

    return of


def mean_gap(one: Answers, other: Answers) -> float:
    return float(np.abs(one.scores_N - other.scores_N).mean())


@pytest.mark.parametrize("name", SCENARIOS)
def test_both_engines_hold_the_published_weights(
    name: str, vllm: Any, transformers_answers: Any, scenarios: dict[str, Scenario]
) -> None:
    for weights, mine, reference in zip(
        scenarios[name].versions, vllm(name)["answers"], transformers_answers(name), strict=True
    ):
        assert mine.weights_hash == reference.weights_hash == hash_tensors(weights.tensors)


@pytest.mark.parametrize("name", SCENARIOS)
def test_both_engines_compute_with_the_codes_that_are_exported(
    name: str, vllm: Any, transformers_answers: Any, scenarios: dict[str, Scenario], tmp_path: Path
) -> None:
    spec = scenarios[name].spec
    model = build_student(spec)
    for weights, mine, reference in zip(
        scenarios[name].versions, vllm(name)["answers"], transformers_answers(name), strict=True
    ):
        assert mine.codes_hash == reference.codes_hash
        assert (mine.codes_hash is not None) == (name in QUANTIZED)
        load_adapter_state(model, {key: torch.from_numpy(value) for key, value in weights.tensors.items()})
        exported = export_live(tmp_path / str(weights.version), model, spec.model, {})
        assert name not in QUANTIZED or exported == mine.codes_hash
    hashes = {answers.codes_hash for answers in vllm(name)["answers"]}
    assert len(hashes) == (1 if name in FROZEN_CODES else 3)


@pytest.mark.parametrize("name", FLOAT32)
def test_log_probs_agree_within_1e_5_nats_in_float32(name: str, vllm: Any, transformers_answers: Any) -> None:
    for mine, reference in zip(vllm(name)["answers"], transformers_answers(name), strict=True):
        assert mean_gap(mine, reference) < 1e-5


def test_log_probs_agree_within_0_05_nats_in_bfloat16(vllm: Any, transformers_answers: Any) -> None:
    for mine, reference in zip(vllm("bfloat16")["answers"], transformers_answers("bfloat16"), strict=True):
        assert mean_gap(mine, reference) < 0.05


def test_two_ranks_answer_as_one_does(vllm: Any) -> None:
    for sharded, alone in zip(vllm("sharded")["answers"], vllm("merged")["answers"], strict=True):
        assert (sharded.weights_hash, sharded.codes_hash) == (alone.weights_hash, alone.codes_hash)
        assert mean_gap(sharded, alone) < 1e-5
        assert ids(sharded.greedy) == ids(alone.greedy)


def test_each_rank_keeps_its_share_of_the_weights(vllm: Any) -> None:
    (whole,) = vllm("merged")["weights_kept"]
    assert vllm("sharded")["weights_kept"] == [whole // 2, whole // 2]


def test_the_engines_process_ends_with_a_rank_that_is_killed_and_takes_the_others_along(vllm: Any) -> None:
    sharded = vllm("sharded")
    assert sharded["exit_status"] == 1
    assert sharded["ended_at"] - sharded["killed_at"] < 30
    assert len(sharded["ranks"]) == 2
    assert sharded["alive"] == []


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_new_version_changes_the_answers_to_the_same_prompts(name: str, vllm: Any) -> None:
    """No stale prefix cache: together with the parity above, the new answers are the new version's."""
    start, first, second = vllm(name)["answers"]
    for older, newer in ((start, first), (first, second)):
        assert mean_gap(older, newer) > 0.1
        assert ids(older.greedy) != ids(newer.greedy)


@pytest.mark.parametrize("name", SCENARIOS)
def test_repeating_a_load_changes_nothing(name: str, vllm: Any) -> None:
    last, repeated = vllm(name)["answers"][-1], vllm(name)["repeated"]
    assert (last.weights_hash, last.codes_hash) == (repeated.weights_hash, repeated.codes_hash)
    np.testing.assert_array_equal(last.scores_N, repeated.scores_N)
    assert ids(last.greedy) == ids(repeated.greedy)


@pytest.mark.parametrize("name", SCENARIOS)
def test_runs_that_share_an_engine_are_answered_by_their_own_weights(name: str, vllm: Any) -> None:
    """Served, the adapters of two runs are held at once: a third takes the place of the one that was asked longest ago."""
    answers, turns = vllm(name)["answers"], vllm(name)["turns"]
    assert [turn.version for turn in turns] == [0, 1, 0, 2, 0, 1, 1]
    held = [False, False, True, False, True, False, True] if name == "served" else [*[False] * 6, True]
    assert [turn.was_held for turn in turns] == held
    for turn in turns:
        np.testing.assert_allclose(turn.scores_N, answers[turn.version].scores_N, atol=1e-6)
        assert ids(turn.greedy) == [said[: A_TURN.max_new_tokens] for said in ids(answers[turn.version].greedy)]


@pytest.mark.parametrize("name", FLOAT32)
def test_greedy_completions_equal_those_of_transformers(name: str, vllm: Any, transformers_answers: Any) -> None:
    for mine, reference in zip(vllm(name)["answers"], transformers_answers(name), strict=True):
        for kind in ("greedy", "long_greedy"):
            assert ids(getattr(mine, kind)) == ids(getattr(reference, kind))
            assert [c.finish_reason for c in getattr(mine, kind)] == [c.finish_reason for c in getattr(reference, kind)]


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_completion_depends_on_its_seed_and_not_on_its_batch(name: str, vllm: Any) -> None:
    orders = vllm(name)["orders"]
    assert ids(orders["first"]) == ids(orders["again"])
    assert ids(orders["first"]) != ids(orders["other seeds"])
    if name in FLOAT32:  # in bfloat16 the batch's shape moves a last bit
        assert ids(orders["first"]) == ids(orders["backwards"])
        assert ids(orders["first"])[:ALONE] == ids(orders["alone"])


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_end_token_stays_and_lengths_keep_their_bounds(
    name: str, vllm: Any, transformers_answers: Any, scenarios: dict[str, Scenario]
) -> None:
    end = set(scenarios[name].eos_ids)
    played = vllm(name)
    for answers in (*played["answers"], *transformers_answers(name)):
        check_ends(answers.greedy, end, GREEDY)
        check_ends(answers.long_greedy, end, LONG_GREEDY)
    for completions in played["orders"].values():
        check_ends(completions, end, SAMPLED)


def test_padding_is_never_sampled(vllm: Any, scenarios: dict[str, Scenario]) -> None:
    drawn = {name: {i for c in vllm(name)["orders"]["first"] for i in c.ids} for name in SCENARIOS}
    assert max(drawn["unquantized"]) < FEW_IDS <= max(drawn["none"])
    known = scenarios["llama"].sampled_ids
    assert known is not None
    assert max(drawn["llama"]) < known, "an eighth of its vocabulary is padding, and its head is random"


def test_both_finish_reasons_occur(vllm: Any) -> None:
    """Else the test of ends proves nothing."""
    for kind in ("greedy", "long_greedy"):
        reasons = {
            c.finish_reason for name in SCENARIOS for answers in vllm(name)["answers"] for c in getattr(answers, kind)
        }
        assert reasons == {"stop", "length"}, kind


def check_ends(completions: Sequence[Completion], end: set[int], settings: SamplingSettings) -> None:
    for completion in completions:
        *before, last = completion.ids
        assert not end & set(before)
        assert (completion.finish_reason == "stop") == (last in end)
        if completion.finish_reason == "length":
            assert len(completion.ids) == settings.max_new_tokens
        else:
            assert len(completion.ids) > settings.min_new_tokens


def ids(completions: Sequence[Completion]) -> list[list[int]]:
    return [list(c.ids) for c in completions]


class LateEngine(HfEngine):
    """An engine whose delivery is one version behind: it loads what it was sent before."""

    def load(self, run: str, weights: StudentWeights, want_codes: bool) -> tuple[str, str | None]:
        late, self.held = getattr(self, "held", weights), weights
        return super().load(run, late, want_codes)


def test_an_adapter_one_version_old_is_caught_by_its_hash_where_the_gap_passes(tiny_model: Path) -> None:
    """Two neighbouring versions differ by less than the bound on the gap, so only the hash can tell them apart."""
    spec = spec_of("served", tiny_model)
    probes = TokenRows.from_rows([list(range(5, 40))])
    reference = HfEngine(spec, (2,))
    start = adapter_state(build_student(spec))
    reports, weights = [], []
    actor = RolloutActor("rollout-0", "hf")
    engine_spec = EngineSpec(
        student=spec, rollout=RolloutSection(engine="hf"), max_model_len=128, eos_ids=(2,), probes=probes
    )
    actor.start("run-a", engine_spec, LateEngine(spec, (2,)))
    for version in range(2):
        state = {key: (value + version * 1e-6).numpy() for key, value in start.items()}
        unproved = StudentWeights(version=version, tensors=state, probe=None)
        reference.load("run-a", unproved, want_codes=False)
        probe = ProbeAnswers(logprobs_N=reference.score(probes))
        weights.append(StudentWeights(version=version, tensors=state, probe=probe))
        reports.append(actor.load("run-a", weights[-1], want_codes=True))
    bound = Config.model_validate({"student": {"dtype": "float32"}}).policy_gap_bound_nats
    assert all(report.gap_mean_nats is not None and report.gap_mean_nats < bound for report in reports)
    sync(reports[0], weights[0])
    with pytest.raises(StaleWeightsError, match=r"rollout-0 holds adapter .* the trainer published"):
        sync(reports[1], weights[1])


def sync(report: LoadReport, weights: StudentWeights) -> None:
    """The loop's check of one engine's report, through a loop that ends after its first sync."""

    class Enough(Exception):  # noqa: N818
        pass

    class Everyone:
        async def outcome(self, step: int) -> StepOutcome:
            if step >= 0:
                raise Enough
            published = hash_tensors(weights.tensors)
            return StepOutcome(
                step=-1,
                version=0,
                weights_hash=published,
                codes_hash=report.codes_hash,
                skipped=None,
                metrics={},
                spans=(),
            )

        def weights(self, version: int) -> None:
            return None

        async def load(self, handle: Any, version: int, want_codes: bool) -> list[LoadReport]:
            return [report]

        def sync(self, report: LoadReport) -> None:
            raise Enough

    everyone: Any = Everyone()
    from raydistill.roles import Roles

    roles = Roles(
        prompts=everyone, rollouts=everyone, teachers=None, trainer=everyone, evaluator=None, records=everyone,
        reference_parts=None,
    )  # fmt: skip
    config = Config.model_validate({"student": {"dtype": "float32"}})
    try:
        asyncio.run(DistillationLoop(config, roles).run())
    except Enough:
        return
    raise AssertionError("the loop went on")
