"""Ray Tune gets what is left of a sweep, by the sweep's own word, whatever a killed process left of Tune's state."""

import math
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from raydistill.sweep.recorder import SweepRecorder
from raydistill.sweep.space import gathered
from raydistill.sweep.spec import Sweep, load_sweep
from raydistill.sweep.state import SweepState
from raydistill.sweep.tuner import run_trials

pytestmark = pytest.mark.ray

TOGETHER = '[space]\nquant = [{ format = "int2" }, { format = "nf4", symmetric = true, scale = "absmax" }]'
RATES = """[space]
"trainer.learning_rate" = { log_range = [1e-4, 1e-2] }
"adapter.targets" = [["q_proj"], ["q_proj", "v_proj"]]"""


def start_host(num_reports: int = 0) -> Any:
    """Stands for the sweep's host: a run is over once its evaluations were asked for; all of a trial have its learning rate
    as their value."""

    class Host:  # local, so that it is pickled whole: Ray's workers cannot import this file
        def __init__(self) -> None:
            self.asked: list[tuple[str, dict[str, Any]]] = []
            self.rates: dict[str, float] = {}
            self.told: dict[str, int] = {}
            self.stopped: list[str] = []

        def run(self, name: str, point: dict[str, Any]) -> dict[str, Any]:
            self.asked.append((name, point))
            rate = self.rates[name] = float(point.get("trainer.learning_rate", 1e-3))
            rows = {"life": "a", "teacher_rows": {}, "pools": {}, "datasets": 0, "cpu_s": 0.0, "time_s": 0.0}
            return {"metrics": {"evaluate/kl_nats": rate}, "seconds": {}, "shares": rows}

        def next_report(self, name: str) -> dict[str, float] | None:
            told = self.told[name] = self.told.get(name, 0) + 1
            return {"version": float(told), "evaluate/kl_nats": self.rates[name]} if told <= num_reports else None

        def stop(self, name: str) -> None:
            self.stopped.append(name)

        def was_stopped(self) -> list[str]:
            return self.stopped

        def heard(self) -> list[tuple[str, dict[str, Any]]]:
            return self.asked

    return ray.remote(Host).options(num_cpus=0).remote()


def swept(tmp_path: Path, text: str, **changes: Any) -> Sweep:
    path = tmp_path / "lr.toml"
    path.write_text(text)
    sweep = load_sweep(path, ["--run.output", str(tmp_path)], **changes)
    sweep.folder.mkdir(parents=True, exist_ok=True)
    return sweep


def asked_for(sweep: Sweep, **options: bool) -> dict[str, dict[str, Any]]:
    host = start_host()
    run_trials(sweep, host, SweepRecorder(sweep), **options)
    asked = ray.get(host.heard.remote())
    ray.kill(host)
    assert len({name for name, _ in asked}) == len(asked), "each once"
    return dict(asked)


def test_points_that_are_not_over_run_under_their_own_names(ray_cluster: Any, tmp_path: Path) -> None:
    sweep = swept(tmp_path, TOGETHER + '\n"run.seed" = [1, 2]')
    (sweep.folder / "tune").mkdir()
    (sweep.folder / "tune" / "experiment_state-1.json").write_text('{"trial_data": [')  # half written, then killed
    assert sweep.points is not None
    state = SweepState.of(sweep)
    for number, status in enumerate(("finished", "failed", "running")):
        state.change(f"lr-{number:03d}", values=dict(sweep.points[number]), status=status)
    assert asked_for(sweep) == {"lr-002": sweep.points[2], "lr-003": sweep.points[3]}
    assert asked_for(sweep, retry_failed=True) == {"lr-001": sweep.points[1]}
    assert asked_for(sweep) == {}
    assert SweepState.of(sweep).counts() == {"finished": 4}


def test_optuna_goes_on_with_what_it_had_begun_and_found(ray_cluster: Any, tmp_path: Path) -> None:
    first = swept(tmp_path, RATES, sampler="optuna", num_samples=2)
    begun = asked_for(first)
    assert len(begun) == 2
    more = swept(tmp_path, RATES, sampler="optuna", num_samples=4)
    state = SweepState.of(more)
    killed = min(begun)
    state.change(killed, status="running")
    state.change(max(begun), metrics={"evaluate/kl_nats": math.nan})
    after = asked_for(more)
    assert len(after) == 3
    assert gathered(more.space, after[killed]) == begun[killed]
    rates = [point["trainer.learning_rate"] for point in {**begun, **after}.values()]
    assert len(set(rates)) == 4, "a draw of the first life was drawn again"
    assert SweepState.of(more).counts() == {"finished": 4}


def test_a_trial_that_lags_is_stopped_and_its_run_with_it(ray_cluster: Any, tmp_path: Path) -> None:
    space = '[asha]\ngrace_steps = 1\n[space]\n"trainer.learning_rate" = [1e-3, 2e-2, 3e-2]'
    sweep, host = swept(tmp_path, space, scheduler="asha"), start_host(num_reports=3)
    run_trials(sweep, host, SweepRecorder(sweep))
    trials = SweepState.of(sweep).trials
    stopped = wait_until_stopped(host, 2)
    ray.kill(host)
    assert {run: trial.status for run, trial in trials.items()} == {
        "lr-000": "finished",
        "lr-001": "stopped",
        "lr-002": "stopped",
    }
    assert trials["lr-001"].error == "the scheduler stopped it at version 1"
    assert trials["lr-001"].metrics == {"evaluate/kl_nats": 2e-2}
    assert sorted(stopped) == ["lr-001", "lr-002"]


def wait_until_stopped(host: Any, number: int) -> list[str]:
    """The runs that the host was told to stop: their trials' processes say so on their way out, and nobody waits for it."""
    until = time.monotonic() + 120
    while True:
        stopped: list[str] = ray.get(host.was_stopped.remote(), timeout=120)
        if len(stopped) >= number or time.monotonic() > until:
            return stopped
        time.sleep(0.1)
