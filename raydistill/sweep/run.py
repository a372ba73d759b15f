"""A sweep from its checked file to its page: cluster, host, Ray Tune, records."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raydistill.cli import console
from raydistill.config import Config, WorldSection
from raydistill.config.load import require_inputs
from raydistill.errors import ResourceError, SweepStopped, UserError
from raydistill.launch import start_cluster
from raydistill.preflight.placement import check_placement, node_resources, placement_plan
from raydistill.preflight.storage import check_nodes_reach_storage, check_storage, check_writable
from raydistill.recovery.lease import held
from raydistill.recovery.resume import LOCK, locked
from raydistill.report.sweep_page import SweepPage, write_sweep_page
from raydistill.results.deliver import start_delivery
from raydistill.results.record_lines import require_start
from raydistill.results.recorded import recorded
from raydistill.results.sinks import check_results
from raydistill.results.store import default_uri
from raydistill.sweep.host import SweepHost
from raydistill.sweep.recorder import SweepRecorder
from raydistill.sweep.spec import Sweep
from raydistill.sweep.state import OVER, SweepState, trials_of
from raydistill.sweep.stored import bring_sweep, mirrored, set_sweep_aside, sweep_storage
from raydistill.sweep.tuner import run_trials
from raydistill.worlds import resolve_world

IDENTITY_FILE = "identity.json"
SHUTDOWN_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepResult:
    """What a finished sweep leaves behind."""

    page: SweepPage
    num_finished: int
    sharing: str  # one line


def run_sweep(sweep: Sweep, anew: bool = False, retry_failed: bool = False) -> SweepResult:
    """Run a sweep, or what is left of it. Raises UserError before anything starts, SweepStopped if it was interrupted."""
    require_inputs(sweep.base)
    check_writable(sweep.base)
    check_results(sweep.base.results)
    check_storage(sweep.base)
    if anew:
        _set_aside(sweep.folder)
        set_sweep_aside(sweep)
    else:
        bring_sweep(sweep)
    with locked(sweep.folder):
        base = resolve_world(sweep.base, console)
        run = base.run.model_copy(update={"output": base.run.output.absolute()})  # of all its processes
        sweep = replace(sweep, base=base.model_copy(update={"world": WorldSection(), "run": run}))
        _check_identity(sweep, retry_failed)
        start_cluster(base)
        check_placement(base, node_resources(ray.nodes()))
        check_parallel(base, sweep.file.parallel, ray.cluster_resources())
        with _standing_in(sweep.folder):
            check_nodes_reach_storage(base)
            with held(sweep_storage(sweep), console.print), mirrored(sweep, console):
                return _run(sweep, retry_failed)


def _run(sweep: Sweep, retry_failed: bool) -> SweepResult:
    recorder = SweepRecorder(sweep)
    with _delivered(sweep), recorded(sweep.folder, sweep.base, console, delivers=False) as record:
        console.print(
            f"sweep {sweep.name}: {sweep.num_trials} trials over {', '.join(sweep.fields)}, {sweep.file.parallel} at a "
            f"time; {sweep.folder}",
            soft_wrap=True,
        )
        record_id = str(require_start(sweep.folder)["record_id"])
        with _host(sweep, record_id) as host, _sigterm_as_sigint():
            run_trials(sweep, host, recorder, retry_failed)
            state = SweepState.of(sweep)  # as Tune's own copy of the recorder left it
            state.share(ray.get(host.shares.remote()))
            state.pause()
        page = write_sweep_page(sweep.folder)
        record.table("trials", page.rows, page.markdown.read_text())
        for name, path in {"page": page.page, **page.plots}.items():
            record.artifact(name, path)
        over = sum(trial.status in OVER for trial in state.trials.values())
        if over < sweep.num_trials:
            raise SweepStopped(f"stopped with {sweep.num_trials - over} of {sweep.num_trials} trials to go")
        finished = sum(trial.status == "finished" for trial in state.trials.values())
        return SweepResult(page=page, num_finished=finished, sharing=sharing_line(state.shared))


@contextmanager
def _delivered(sweep: Sweep) -> Iterator[None]:
    """One process brings the sweep's record and those of its trials to the results store."""
    output, results = sweep.base.run.output, sweep.base.results
    if not results.deliver:
        yield
        return
    uri = results.uri or default_uri(output)
    delivery = start_delivery(output, uri, results.experiment, under=True, family_of=sweep.folder)
    try:
        yield
    finally:
        if not delivery.finish():
            later = f"python -m raydistill.results.deliver --under {output}"
            console.print(
                f"warning: the results store is behind; deliver later with `{later}`", style="yellow", soft_wrap=True
            )


@contextmanager
def _host(sweep: Sweep, record_id: str) -> Iterator[Any]:
    """The process that drives all trials; Ray starts it again if it dies. Its trials are stopped at the end."""
    options: dict[str, Any] = {
        "name": f"sweep-{sweep.name}",
        "num_cpus": 0,
        "max_concurrency": 1000,
        "max_restarts": -1,
        # Beside the sweep's own process, where the outputs are.
        "scheduling_strategy": NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False),
    }
    host: Any = ray.remote(SweepHost).options(**options).remote(sweep, record_id)
    try:
        yield host
    finally:
        with suppress(ray.exceptions.RayError):
            ray.get(host.shutdown.remote(), timeout=SHUTDOWN_TIMEOUT_S)
        ray.kill(host)


@contextmanager
def _standing_in(folder: Path) -> Iterator[None]:
    """Ray Tune and git ask for the current folder; a job's goes away when another node of the same machine unpacks the job."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        with suppress(FileNotFoundError):
            os.chdir(before)


@contextmanager
def _sigterm_as_sigint() -> Iterator[None]:
    """Ray Tune listens to SIGINT alone: it ends its trials, and leaves."""
    before = signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check_parallel(config: Config, parallel: int, resources: Mapping[str, float]) -> None:
    """ResourceError if so many trials at a time do not fit the cluster; it names the most that do. The trainer's workers are
    each trial's own, the pools are shared."""
    plan = placement_plan(config)
    for kind, field in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
        own = sum(d.count * getattr(d, field) for d in plan if d.role == "trainer")
        shared = sum(d.count * getattr(d, field) for d in plan if d.role != "trainer")
        there = resources.get(kind, 0.0)
        if own and shared + parallel * own > there + 1e-6:
            most = int((there - shared + 1e-6) // own)
            raise ResourceError(
                f"parallel={parallel} trials need {shared + parallel * own:g} {kind}s ({shared:g} for what they share, "
                f"{own:g} for each trial's trainer), the cluster has {there:g}; the most that fit are {most}: set "
                f"--parallel {most}, lower trainer.{field}, or add nodes"
            )


def sharing_line(shared: Mapping[str, Any]) -> str:
    """What sharing saved, in words."""
    rows, pools = shared["teacher_rows"], shared["pools"]
    text = (
        f"the teachers computed {rows['computed_rows']:,} rows and answered {rows['kept_rows']:,} more from those kept"
    )
    return f"{text}; {pools['rollouts']} rollout pools, {pools['teachers']} teacher pools, {shared['datasets']} data sets read"


def _check_identity(sweep: Sweep, retry_failed: bool) -> None:
    """A sweep that goes on is the one that was begun; UserError with the differences, or if it is over."""
    path, now = sweep.folder / IDENTITY_FILE, json.loads(json.dumps(sweep.identity()))
    if not path.exists():
        path.write_text(json.dumps(now, indent=1) + "\n")
        return
    before = _flat(json.loads(path.read_text()))
    changed = [
        f"{key} was {before.get(key)!r}, is {value!r}" for key, value in _flat(now).items() if before.get(key) != value
    ]
    way_out = "choose another --name, or start anew with --resume never, which sets the old folder aside"
    if changed:
        raise UserError(
            f"sweep {sweep.name!r} cannot go on with other settings: {'; '.join(changed)}. Take them back, {way_out}"
        )
    statuses = [trial["status"] for trial in trials_of(sweep.folder)]
    again = retry_failed and "failed" in statuses
    if sum(status in OVER for status in statuses) >= sweep.num_trials and not again:
        raise UserError(f"sweep {sweep.name!r} has finished (see {sweep.folder}); {way_out}")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _set_aside(folder: Path) -> None:
    """The sweep's folder and its trials' runs get another name."""
    if not (folder / LOCK).exists():
        return
    with locked(folder):
        stamp = time.strftime("%Y%m%d-%H%M%S")
        for trial in trials_of(folder):
            run = folder.parent.parent / "runs" / trial["run"]
            if run.exists():
                run.rename(run.with_name(f"{run.name}.before-{stamp}"))
        folder.rename(folder.with_name(f"{folder.name}.before-{stamp}"))
