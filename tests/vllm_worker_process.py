"""One process with the real vLLM that plays every scenario; started by test_vllm_engine.py.

    python vllm_worker_process.py SCENARIOS.pkl RESULTS.pkl

vLLM changes process-wide state and takes long to import: so it lives here, once, and its environment is set before the
process starts. Engines follow one another, as they do when a pool serves several runs. The last one has several ranks:
when all is written down one of them is killed, and this process has to end by itself.
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

from engine_questions import ENVIRONMENT, MAX_NEW_TOKENS, Scenario, ask, sample_orders

from raydistill.config import RolloutSection

STILL_HERE = 3  # the exit status of a process that outlived a rank of its engine


def build(scenario: Scenario) -> Any:
    from raydistill.actors.vllm_engine import VllmEngine

    section = RolloutSection(max_new_tokens=MAX_NEW_TOKENS, tensor_parallel_size=scenario.tensor_parallel_size)
    return VllmEngine(scenario.spec, section, 192, scenario.eos_ids, scenario.sampled_ids)


def play(scenario: Scenario, engine: Any) -> dict[str, Any]:
    answers = [ask(engine, scenario, weights) for weights in scenario.versions]
    repeated = ask(engine, scenario, scenario.versions[-1])
    return {
        "answers": answers,
        "repeated": repeated,
        "orders": sample_orders(engine, scenario.prompts),
        "weights_kept": engine.weights_kept,
        "ranks": [child.pid for child in multiprocessing.active_children()],
    }


def main(scenarios: list[Scenario], results: Path) -> None:
    played: dict[str, Any] = {}
    *others, last = scenarios
    for scenario in others:
        try:
            engine = build(scenario)
            try:
                played[scenario.name] = play(scenario, engine)
            finally:
                engine.close()
        except Exception:
            played[scenario.name] = {"error": traceback.format_exc()}
    engine = build(last)
    played[last.name] = play(last, engine) | {"killed_at": time.time()}
    results.write_bytes(pickle.dumps(played))
    outlive_a_rank(engine, last)


def outlive_a_rank(engine: Any, scenario: Scenario) -> None:
    """Kill the last rank while the engine samples."""
    os.kill(max(child.pid or 0 for child in multiprocessing.active_children()), signal.SIGKILL)
    try:
        while True:
            sample_orders(engine, scenario.prompts)
    finally:
        os._exit(STILL_HERE)


if __name__ == "__main__":
    assert all(os.environ.get(name) == value for name, value in ENVIRONMENT.items())
    main(pickle.loads(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2]))
