"""What is asked of an engine in test_vllm_engine.py; the same for vLLM (in a process of its own) and for transformers."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from raydistill.actors.engine import Completion, SamplingSettings
from raydistill.actors.vllm_settings import CPU_ENGINE_ENVIRONMENT, ENGINE_ENVIRONMENT
from raydistill.messages import StudentWeights, TokenRows
from raydistill.models import StudentSpec

ENVIRONMENT = ENGINE_ENVIRONMENT | CPU_ENGINE_ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
MAX_NEW_TOKENS = 48
GREEDY = SamplingSettings(temperature=0.0, top_p=1.0, min_new_tokens=0, max_new_tokens=MAX_NEW_TOKENS)
LONG_GREEDY = SamplingSettings(temperature=0.0, top_p=1.0, min_new_tokens=30, max_new_tokens=MAX_NEW_TOKENS)
SAMPLED = SamplingSettings(temperature=1.0, top_p=1.0, min_new_tokens=4, max_new_tokens=MAX_NEW_TOKENS)


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
    weights_hash, codes_hash = engine.load(weights, want_codes=True)
    seeds = [0] * len(scenario.prompts)
    return Answers(
        weights_hash=weights_hash,
        codes_hash=codes_hash,
        scores_N=engine.score(scenario.probes),
        greedy=engine.sample(scenario.prompts, GREEDY, seeds),
        long_greedy=engine.sample(scenario.prompts, LONG_GREEDY, seeds),
    )


def sample_orders(engine: Any, prompts: TokenRows) -> dict[str, list[Completion]]:
    """The same prompts and seeds: again, in the opposite order, one at a time, and with other seeds."""
    rows, seeds = prompts.rows(), [1000 + i for i in range(len(prompts))]
    backwards = engine.sample(TokenRows.from_rows(rows[::-1]), SAMPLED, seeds[::-1])[::-1]
    alone = [
        engine.sample(TokenRows.from_rows([row]), SAMPLED, [seed])[0] for row, seed in zip(rows, seeds, strict=True)
    ]
    return {
        "first": engine.sample(prompts, SAMPLED, seeds),
        "again": engine.sample(prompts, SAMPLED, seeds),
        "backwards": backwards,
        "alone": alone,
        "other seeds": engine.sample(prompts, SAMPLED, [seed + 1 for seed in seeds]),
    }
