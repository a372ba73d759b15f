"""One process with the real vLLM that plays every scenario; started by engine_questions.py.

    python vllm_worker_process.py SCENARIOS.pkl RESULTS.pkl

vLLM changes process-wide state and takes long to import: so it lives here, once, and its environment is set before the
process starts. Engines follow one another, as they do when a pool serves several runs. If the last one has several ranks,
one of them is killed when all is written down, and this process has to end by itself.
"""

import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from engine_questions import ADAPTERS_HELD, MAX_NEW_TOKENS, TURNS, Scenario, ask, sample_orders, take_turns

from raydistill.actors.vllm_settings import ENGINE_ENVIRONMENT
from raydistill.config import RolloutSection

STILL_HERE = 3  # the exit status of a process that outlived a rank of its engine


def build(scenario: Scenario) -> Any:
    from raydistill.actors.vllm_engine import VllmEngine

    section = RolloutSection(
        max_new_tokens=MAX_NEW_TOKENS,
        tensor_parallel_size=scenario.tensor_parallel_size,
        num_gpus=scenario.num_gpus,
        gpu_memory_utilization=0.3,
    )
    return VllmEngine(scenario.spec, section, 192, scenario.eos_ids, scenario.sampled_ids, ADAPTERS_HELD)


def play(scenario: Scenario, engine: Any) -> dict[str, Any]:
    answers = [ask(engine, scenario, weights) for weights in scenario.versions]
    repeated = ask(engine, scenario, scenario.versions[-1])
    return {
        "answers": answers,
        "repeated": repeated,
        "orders": sample_orders(engine, scenario.prompts),
        "turns": take_turns(engine, scenario, TURNS),
        "weights_kept": engine.weights_kept,
        "ranks": [child.pid for child in multiprocessing.active_children()],
    }


def main(scenarios: list[Scenario], results: Path) -> None:
    played: dict[str, Any] = {}
    for scenario in scenarios:
        is_last = scenario is scenarios[-1] and scenario.tensor_parallel_size > 1
        try:
            engine = build(scenario)
            try:
                played[scenario.name] = play(scenario, engine)
            finally:
                if not is_last:
                    engine.close()
        except Exception:
            played[scenario.name] = {"error": traceback.format_exc()}
        if is_last:
            played[scenario.name]["killed_at"] = time.time()
        results.write_bytes(pickle.dumps(played))
    if is_last and "error" not in played[scenario.name]:
        outlive_a_rank(engine, scenario)


def outlive_a_rank(engine: Any, scenario: Scenario) -> None:
    """Kill the last rank while the engine samples."""
    os.kill(max(child.pid or 0 for child in multiprocessing.active_children()), signal.SIGKILL)
    try:
        while True:
            sample_orders(engine, scenario.prompts)
    finally:
        os._exit(STILL_HERE)


if __name__ == "__main__":
    assert all(os.environ.get(name) == value for name, value in ENGINE_ENVIRONMENT.items())
    main(pickle.loads(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2]))
