"""Processes that die or hang at chosen moments, and a node that is lost, cost time only: a short selection of
benchmarks/chaos.py, inside a sweep."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from chaos_cluster import Nodes
from chaos_kills import Hit, Kill, Striker
from ray.util.placement_group import placement_group_table
from run_helpers import HF, sweep_file, trial_config
from tiny_runs import compare

from raydistill.results.record import read_record
from raydistill.sweep.run import run_sweep
from raydistill.sweep.spec import load_sweep
from raydistill.sweep.state import read_state

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]

KILLS = (  # trainer, feed and driver: test_resume.py; a rollout actor alone: test_run.py
    Kill(victim="controller", moment="backward", step=2),
    Kill(victim="teacher", moment="score", step=5, number=signal.SIGSTOP),
    Kill(victim="evaluator", moment="evaluate", step=8),
    Kill(victim="raylet", moment="sync", step=10),  # with the rollout, teacher and evaluation actors
)
STEPS = 14
ROLES = {"rollout", "teacher", "trainer"}
PLACES = {  # one node has the first two roles, another one the third
    **dict.fromkeys(("rollout", "teacher", "evaluator"), "rollout teacher"),
    "RayTrainWorker": "trainer",
}
TRIAL = "ImplicitFunc"  # Tune's process of a trial: on no node of a role, but where the sweep is
HANG_S = 15.0  # how long a call may take before its actor counts as dead
SETTINGS: dict[str, dict[str, Any]] = {
    "trainer": {"num_steps": STEPS},
    "checkpoint": {"save_every": 3},
    "rollout": HF["rollout"] | {"timeout_s": HANG_S},
    "teacher": HF["teacher"],
    "cluster": {"by_role": True},
}


def booked_now() -> set[str]:
    """The ids of placement groups that hold resources."""
    return {group for group, state in placement_group_table().items() if state["state"] != "REMOVED"}


def actors_by_role() -> set[tuple[str, str]]:
    """The kind of each living actor of PLACES, and TRIAL, by its name (rollout-0) or class, and its node's roles, where it
    has any."""
    import ray

    roles = {node["NodeID"]: " ".join(sorted(ROLES & node["Resources"].keys())) for node in ray.nodes()}
    living = [actor for actor in ray._private.state.actors().values() if actor["State"] == "ALIVE"]
    found = [(actor["Name"] or actor["ActorClassName"], roles[actor["Address"]["NodeID"]]) for actor in living]
    places = {(name.partition("-")[0], role) for name, role in found if role}
    return {(kind, role) for kind, role in places if kind in PLACES or kind == TRIAL}


def kill_trial() -> int:
    """The process that waits for the trial's run; returns its id."""
    import ray

    living = [actor for actor in ray._private.state.actors().values() if actor["State"] == "ALIVE"]
    (pid,) = (int(actor["Pid"]) for actor in living if actor["ActorClassName"] == TRIAL)
    os.kill(pid, signal.SIGKILL)
    return pid


@pytest.fixture
def nodes(ray_cluster: Any) -> Iterator[Nodes]:
    """Two nodes beside the session's own, one of which can be lost."""
    with Nodes(head=ray_cluster._private.worker._global_node) as nodes:
        yield nodes


def test_what_is_killed_or_hangs_in_a_sweeps_second_trial_costs_time_only(
    nodes: Nodes, make_config: Any, tmp_path: Path
) -> None:
    """Its trials differ in a time limit that neither meets, so both should end as one."""
    config = trial_config(make_config, tmp_path, **SETTINGS)
    sweep = load_sweep(sweep_file(tmp_path / "twice.toml", config, '"trainer.timeout_s" = [240.0, 241.0]'))
    calm, disturbed = (tmp_path / "runs" / f"twice-{number:03d}" for number in range(2))
    booked, hits, places = booked_now(), list[Hit | None](), set[tuple[str, str]]()
    lost = list[int]()
    is_over = threading.Event()
    striker = Striker(disturbed, nodes, lambda: not is_over.is_set())

    def strike() -> None:
        for kill in KILLS:
            hits.append(striker.strike(kill))
            places.update(actors_by_role())
            if kill is KILLS[0]:
                lost.append(kill_trial())

    thread = threading.Thread(target=strike, daemon=True)
    thread.start()
    try:
        result = run_sweep(sweep)
    finally:
        is_over.set()
        thread.join(60)
    assert len(hits) == len(KILLS) and all(hit is not None and hit.recovered_s is not None for hit in hits), hits
    assert len(lost) == 1 and not psutil.pid_exists(lost[0])
    assert not any(psutil.pid_exists(hit.pid) for hit in hits if hit and hit.pid), "a killed or hanging process is left"
    assert places == set(PLACES.items())
    assert booked_now() <= booked, "a killed controller's ranks still hold what they had booked"
    assert [trial["status"] for trial in read_state(sweep.folder)["trials"]] == ["finished"] * 2
    assert result.num_finished == 2
    assert compare(disturbed, calm, STEPS, 8) == {"ledger": "complete", "losses": "equal", "weights": "equal"}
    versions = [
        [line["version"] for line in read_record(run) if line["kind"] == "evaluation"] for run in (calm, disturbed)
    ]
    assert versions[0] == versions[1]
