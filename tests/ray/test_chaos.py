"""Processes that die or hang at chosen moments cost time only: a short selection of benchmarks/chaos.py."""

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from chaos_cluster import Nodes
from chaos_kills import Hit, Kill, Striker
from run_helpers import QUIET, lines, serial_config, sweep_file, trial_config, wait_for_step
from tiny_runs import compare

from raydistill.config import Config
from raydistill.launch import Pools, RunSummary, make_pools, run
from raydistill.sweep.run import run_sweep
from raydistill.sweep.spec import load_sweep
from raydistill.sweep.state import read_state

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

KILLS = (  # trainer, feed and driver: test_resume.py; a node: the sweep below
    Kill(victim="rollout", moment="generate", step=2),
    Kill(victim="controller", moment="backward", step=4),
    Kill(victim="teacher", moment="score", step=7, number=signal.SIGSTOP),
    Kill(victim="evaluator", moment="evaluate", step=10),
)
STEPS = 15
HANG_S = 15.0  # how long a call may take before its actor counts as dead


SETTINGS: dict[str, dict[str, Any]] = {
    "trainer": {"num_steps": STEPS},
    "checkpoint": {"save_every": 3},
    "rollout": {"engine": "hf", "timeout_s": HANG_S},
    "teacher": {"model": None},
    "cluster": {"by_role": True},
}


def config_of(make_config: Any, name: str) -> Config:
    return serial_config(make_config, name, **SETTINGS)


@pytest.fixture(scope="module")
def nodes(ray_cluster: Any) -> Iterator[Nodes]:
    """Two nodes beside the session's own, one of which can be lost."""
    with Nodes(head=ray_cluster._private.worker._global_node) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def pools(nodes: Nodes, make_config: Any) -> Iterator[Pools]:
    pools = make_pools(config_of(make_config, "any"))
    yield pools
    pools.shutdown()


@pytest.fixture(scope="module")
def undisturbed(pools: Pools, make_config: Any) -> RunSummary:
    return run(config_of(make_config, "undisturbed"), pools, QUIET)


def test_killed_and_hanging_processes_cost_time_only(
    nodes: Nodes, pools: Pools, make_config: Any, undisturbed: RunSummary
) -> None:
    config = config_of(make_config, "disturbed")
    folder = config.run.output / "runs" / "disturbed"
    hits: list[Hit | None] = []
    is_over = threading.Event()
    striker = Striker(folder, nodes, lambda: not is_over.is_set())
    thread = threading.Thread(target=lambda: hits.extend(map(striker.strike, KILLS)), daemon=True)
    thread.start()
    try:
        summary = run(config, pools, QUIET)
    finally:
        is_over.set()
        thread.join(30)
    assert len(hits) == len(KILLS) and all(hit is not None and hit.recovered_s is not None for hit in hits), hits
    assert compare(folder, undisturbed.folder, STEPS, 8) == {
        "ledger": "complete",
        "losses": "equal",
        "weights": "equal",
    }
    versions = [[line["version"] for line in lines(s, "evaluation")] for s in (summary, undisturbed)]
    assert versions[0] == versions[1]
    assert not any(psutil.pid_exists(hit.pid) for hit in hits if hit and hit.pid), "a killed or hanging process is left"


def test_a_sweep_ends_though_a_node_is_lost_in_its_second_trial(
    nodes: Nodes, pools: Pools, make_config: Any, undisturbed: RunSummary, tmp_path: Path
) -> None:
    """The node of its rollout, teacher and evaluation actors. The last trial has the settings of the undisturbed run."""
    config = trial_config(make_config, tmp_path, **SETTINGS)
    space = f'"trainer.learning_rate" = [1e-3, {config.trainer.learning_rate}]'
    sweep = load_sweep(sweep_file(tmp_path / "lr.toml", config, space))
    last = tmp_path / "runs" / "lr-001"
    lost: list[bool] = []

    def lose() -> None:
        wait_for_step(last, 5)
        nodes.replace_worker()
        lost.append(not (last / "export").exists())

    thread = threading.Thread(target=lose, daemon=True)
    thread.start()
    result = run_sweep(sweep)
    thread.join(60)
    assert lost == [True]
    assert [trial["status"] for trial in read_state(sweep.folder)["trials"]] == ["finished"] * 2
    assert result.num_finished == 2
    assert compare(last, undisturbed.folder, STEPS, 8) == {"ledger": "complete", "losses": "equal", "weights": "equal"}
