"""Ray Tune gets what is left of a sweep, by the sweep's own word, whatever a killed process left of Tune's state."""

from pathlib import Path
from typing import Any

import pytest
import ray

from raydistill.sweep.recorder import SweepRecorder
from raydistill.sweep.spec import Sweep, load_sweep
from raydistill.sweep.state import SweepState
from raydistill.sweep.tuner import run_trials

pytestmark = pytest.mark.ray

TOGETHER = '[space]\nquant = [{ format = "int2" }, { format = "nf4", symmetric = true, scale = "absmax" }]'
RATES = '[space]\n"trainer.learning_rate" = { log_range = [1e-4, 1e-2] }'


def start_host() -> Any:
    """Stands for the sweep's host: a run is over at once."""

    class Host:  # local, so that it is pickled whole: Ray's workers cannot import this file
        def __init__(self) -> None:
            self.asked: list[tuple[str, dict[str, Any]]] = []

        def run(self, name: str, point: dict[str, Any]) -> dict[str, Any]:
            self.asked.append((name, point))
            rate = float(point.get("trainer.learning_rate", 1e-3))
            rows = {"life": "a", "teacher_rows": {}, "pools": {}, "datasets": 0, "cpu_s": 0.0, "time_s": 0.0}
            return {"metrics": {"evaluate/kl_nats": rate}, "seconds": {}, "shares": rows}

        def next_report(self, name: str) -> None:
            return None

        def stop(self, name: str) -> None:
            return None

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
    after = asked_for(more)
    assert len(after) == 3
    assert after[killed] == begun[killed]
    rates = [point["trainer.learning_rate"] for point in {**begun, **after}.values()]
    assert len(set(rates)) == 4, "a draw of the first life was drawn again"
    assert SweepState.of(more).counts() == {"finished": 4}
