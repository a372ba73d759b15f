"""What is asked of an engine in tests/engine and tests/gpu; the same for vLLM (in a process of its own) and for
transformers."""

import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from raydistill.actors.engine import Completion, SamplingSettings
from raydistill.actors.vllm_settings import CPU_ENGINE_ENVIRONMENT, ENGINE_ENVIRONMENT
from raydistill.config import AdapterSection, QuantSection, StudentSection
from raydistill.messages import StudentWeights, TokenRows
from raydistill.models import StudentSpec, build_student, eos_ids
from raydistill.quant.student import adapter_state

ENVIRONMENT = ENGINE_ENVIRONMENT | CPU_ENGINE_ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
MAX_NEW_TOKENS = 20
ALONE = 4  # of the prompts are also sampled one at a time
GREEDY = SamplingSettings(temperature=0.0, top_p=1.0, min_new_tokens=0, max_new_tokens=MAX_NEW_TOKENS)
LONG_GREEDY = SamplingSettings(temperature=0.0, top_p=1.0, min_new_tokens=14, max_new_tokens=MAX_NEW_TOKENS)
TURNS = (0, 1, 0, 2, 0, 1, 1)
A_TURN = SamplingSettings(temperature=0.0, top_p=1.0, min_new_tokens=0, max_new_tokens=6)
ADAPTERS_HELD = 2  # at once, by an engine that several runs share
SAMPLED = SamplingSettings(temperature=1.0, top_p=1.0, min_new_tokens=4, max_new_tokens=10)


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One student, the versions it goes through, and what it is asked at each of them."""

    name: str
    spec: StudentSpec
    versions: tuple[StudentWeights, ...]
    prompts: TokenRows
    probes: TokenRows
    eos_ids: tuple[int, ...]
    sampled_ids: int | None = None
    tensor_parallel_size: int = 1
    num_gpus: float = 0


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What an engine said while it held one version."""

    weights_hash: str
    codes_hash: str | None
    scores_N: np.ndarray
    greedy: list[Completion]
    long_greedy: list[Completion]


def ask(engine: Any, scenario: Scenario, weights: StudentWeights) -> Answers:
    """Load a version and ask the fixed questions; the same for every engine class."""
    weights_hash, codes_hash = engine.load("run-a", weights, want_codes=True)
    seeds = [0] * len(scenario.prompts)
    return Answers(
        weights_hash=weights_hash,
        codes_hash=codes_hash,
        scores_N=engine.score(scenario.probes),
        greedy=engine.sample(scenario.prompts, GREEDY, seeds),
        long_greedy=engine.sample(scenario.prompts, LONG_GREEDY, seeds),
    )


def sample_orders(engine: Any, prompts: TokenRows) -> dict[str, list[Completion]]:
    """The same prompts and seeds: again, in the opposite order, the first ones one at a time, and with other seeds."""
    rows, seeds = prompts.rows(), [1000 + i for i in range(len(prompts))]
    backwards = engine.sample(TokenRows.from_rows(rows[::-1]), SAMPLED, seeds[::-1])[::-1]
    alone = [
        engine.sample(TokenRows.from_rows([row]), SAMPLED, [seed])[0]
        for row, seed in zip(rows[:ALONE], seeds[:ALONE], strict=True)
    ]
    return {
        "first": engine.sample(prompts, SAMPLED, seeds),
        "again": engine.sample(prompts, SAMPLED, seeds),
        "backwards": backwards,
        "alone": alone,
        "other seeds": engine.sample(prompts, SAMPLED, [seed + 1 for seed in seeds]),
    }


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One run asked among others: whether the engine still held its version, and what it said."""

    version: int  # the place of its weights in the scenario
    was_held: bool
    scores_N: np.ndarray
    greedy: list[Completion]


def take_turns(engine: Any, scenario: Scenario, order: Sequence[int]) -> list[Turn]:
    """A run for each version, asked in this order; a run loads its version where the engine does not hold it."""
    turns = []
    for version in order:
        run = f"run of {version}"
        was_held = engine.select(run)
        if not was_held:
            engine.load(run, scenario.versions[version], want_codes=False)
        greedy = engine.sample(scenario.prompts, A_TURN, [0] * len(scenario.prompts))
        turns.append(Turn(version=version, was_held=was_held, scores_N=engine.score(scenario.probes), greedy=greedy))
    return turns


def make_scenario(name: str, world: Any, spec: StudentSpec, **more: Any) -> Scenario:
    """A student of the tiny world's model with prompts and probes of its validation rows."""
    from transformers import AutoTokenizer

    from raydistill.demo.tokenizer import encode_chats

    tokenizer = AutoTokenizer.from_pretrained(world.teacher_folder)
    chats = [json.loads(line)["messages"] for line in world.validation_path.read_text().splitlines()]
    pairs = encode_chats(tokenizer, chats)
    return Scenario(
        name=name,
        spec=spec,
        versions=versions_of(spec),
        prompts=TokenRows.from_rows([prompt for prompt, _ in pairs[:12]]),
        # The prompts themselves, continued: a stale prefix cache would answer for them.
        probes=TokenRows.from_rows([prompt + completion for prompt, completion in pairs[:12]]),
        eos_ids=eos_ids(spec.model, tokenizer),
        **more,
    )


def make_spec(model: Path, **kind: Any) -> StudentSpec:
    return StudentSpec(
        student=StudentSection(model=str(model), dtype=kind["dtype"]),
        quant=QuantSection(format=kind["format"]),
        adapter=AdapterSection(mode=kind["mode"], rank=4, alpha=8),
    )


def versions_of(spec: StudentSpec) -> tuple[StudentWeights, ...]:
    """The start, and two versions that are far from it and from each other."""
    with torch.random.fork_rng():
        torch.manual_seed(0)  # A starts at random
        start = adapter_state(build_student(spec))
    versions = [start]
    for version in (1, 2):
        generator = torch.Generator().manual_seed(version)
        noise = {key: torch.randn(value.shape, generator=generator) for key, value in start.items()}
        scale = 0.02 if spec.adapter.mode == "none" else 0.2
        versions.append({key: value + scale * noise[key] for key, value in start.items()})
    if spec.student.dtype == "bfloat16":  # DeepSpeed trains and publishes such values
        versions = [{key: value.bfloat16().float() for key, value in state.items()} for state in versions]
    return tuple(
        StudentWeights(version=number, tensors={key: value.numpy() for key, value in state.items()}, probe=None)
        for number, state in enumerate(versions)
    )


def play_in_a_process(
    scenarios: Sequence[Scenario], folder: Path, environment: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """name -> what vLLM said in that scenario. A last scenario of several ranks ends with a killed one, and then says how the
    process took it."""
    questions, results = folder / "scenarios.pkl", folder / "results.pkl"
    questions.write_bytes(pickle.dumps(list(scenarios)))
    script = str(Path(__file__).with_name("vllm_worker_process.py"))
    done = subprocess.run(
        [sys.executable, script, str(questions), str(results)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    ended_at = time.time()
    assert results.exists(), done.stderr[-3000:]
    played: dict[str, dict[str, Any]] = pickle.loads(results.read_bytes())
    for name, found in played.items():
        assert "error" not in found, f"{name}: {found['error']}"
    last = played[scenarios[-1].name]
    last |= {"ended_at": ended_at, "exit_status": done.returncode, "alive": survivors(last["ranks"], 20)}
    return played


def survivors(pids: Sequence[int], timeout_s: float) -> list[int]:
    """Those of the processes that still run after the time they are given to end."""
    deadline = time.monotonic() + timeout_s
    while (alive := [pid for pid in pids if psutil.pid_exists(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return alive
