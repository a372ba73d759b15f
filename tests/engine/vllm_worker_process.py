"""One process with the real vLLM that plays every scenario; started by test_vllm_engine.py.

    python vllm_worker_process.py SCENARIOS.pkl RESULTS.pkl

vLLM changes process-wide state and takes long to import: so it lives here, once, and its environment is set before the
process starts. Engines follow one another, as they do when a pool serves several runs.
"""

import os
import pickle
import sys
import traceback
from pathlib import Path
from typing import Any

from engine_questions import ENVIRONMENT, MAX_NEW_TOKENS, Scenario, ask, sample_orders

from raydistill.config import RolloutSection


def play(scenario: Scenario) -> dict[str, Any]:
    from raydistill.actors.vllm_engine import VllmEngine

    section = RolloutSection(max_new_tokens=MAX_NEW_TOKENS)
    engine = VllmEngine(scenario.spec, section, 192, scenario.eos_ids, scenario.sampled_ids)
    try:
        answers = [ask(engine, scenario, weights) for weights in scenario.versions]
        repeated = ask(engine, scenario, scenario.versions[-1])
        return {"answers": answers, "repeated": repeated, "orders": sample_orders(engine, scenario.prompts)}
    finally:
        engine.close()


def main(scenarios: Path, results: Path) -> None:
    played: dict[str, Any] = {}
    for scenario in pickle.loads(scenarios.read_bytes()):
        try:
            played[scenario.name] = play(scenario)
        except Exception:
            played[scenario.name] = {"error": traceback.format_exc()}
    results.write_bytes(pickle.dumps(played))


if __name__ == "__main__":
    assert all(os.environ.get(name) == value for name, value in ENVIRONMENT.items())
    main(Path(sys.argv[1]), Path(sys.argv[2]))
