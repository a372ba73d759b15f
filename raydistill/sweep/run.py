"""A sweep from its checked file to its page: cluster, host, Ray Tune, records."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raydistill.cli import console
from raydistill.config import WorldSection
from raydistill.config.load import require_inputs
from raydistill.errors import SweepStopped, UserError
from raydistill.launch import start_cluster
from raydistill.preflight.findings import results_findings
from raydistill.preflight.placement import check_placement, node_resources
from raydistill.preflight.storage import check_nodes_reach_storage, check_storage, check_writable
from raydistill.recovery.lease import held
from raydistill.recovery.resume import LOCK, locked
from raydistill.report.sweep_page import SweepPage, write_sweep_page
from raydistill.results.deliver import FINISH_S, start_delivery
from raydistill.results.record_lines import require_start
from raydistill.results.recorded import STOPPED_S, recorded
from raydistill.results.run_folders import ASIDE, is_at_work
from raydistill.results.store import default_uri
from raydistill.sweep.host import SweepHost
from raydistill.sweep.identity import check_identity, check_runs
from raydistill.sweep.parallel import check_parallel, configs_of
from raydistill.sweep.recorder import SweepRecorder
from raydistill.sweep.spec import Sweep
from raydistill.sweep.state import OVER, SweepState, named_runs
from raydistill.sweep.stored import bring_sweep, mirrored, set_sweep_aside, sweep_storage
from raydistill.sweep.tuner import run_trials
from raydistill.worlds import resolve_world

SHUTDOWN_TIMEOUT_S = 120.0
SHARES_TIMEOUT_S = 60.0


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
    _tell_results(sweep)
    check_storage(sweep.base)
    if anew:
        _set_aside(sweep)
        set_sweep_aside(sweep)
    else:
        bring_sweep(sweep)
    with locked(sweep.folder):
        base = resolve_world(sweep.base, console)
        run = base.run.model_copy(update={"output": base.run.output.absolute()})  # of all its processes
        sweep = replace(sweep, base=base.model_copy(update={"world": WorldSection(), "run": run}))
        check_runs(sweep)
        check_identity(sweep, retry_failed)
        start_cluster(base)
        _check_room(sweep)
        with _standing_in(sweep.folder):
            check_nodes_reach_storage(base)
            with held(sweep_storage(sweep), console.print), mirrored(sweep, console):
                return _run(sweep, retry_failed)


def _tell_results(sweep: Sweep) -> None:
    """A warning where the results store does not answer; UserError where it cannot be one."""
    for finding in results_findings(sweep.base.results):
        if finding.status == "warning":
            console.print(f"warning: {finding.text}", style="yellow", soft_wrap=True)


def _check_room(sweep: Sweep) -> None:
    """ResourceError if a trial does not fit the cluster, or not as many of them as are to run at a time."""
    nodes, configs = node_resources(ray.nodes()), configs_of(sweep)
    for config in configs:
        check_placement(config, nodes)
    check_parallel(configs, min(sweep.file.parallel, sweep.num_trials), nodes)


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
            with suppress(ray.exceptions.RayError):  # what it saved is worth a line, and no wait
                state.share(ray.get(host.shares.remote(), timeout=SHARES_TIMEOUT_S))
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
    patience_s = FINISH_S
    try:
        yield
    except (KeyboardInterrupt, SweepStopped):
        patience_s = STOPPED_S
        raise
    finally:
        if not delivery.finish(patience_s):
            later = f"python -m raydistill.results.deliver --under {output}"
            console.print(
                f"warning: the results store is behind ({delivery.problem}); deliver later with `{later}`",
                style="yellow",
                soft_wrap=True,
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


def sharing_line(shared: Mapping[str, Any]) -> str:
    """What sharing saved, in words."""
    if not shared:
        return "what the trials shared is not known: their host did not say"
    rows, pools = shared["teacher_rows"], shared["pools"]
    text = (
        f"the teachers computed {rows['computed_rows']:,} rows and answered {rows['kept_rows']:,} more from those kept"
    )
    return f"{text}; {pools['rollouts']} rollout pools, {pools['teachers']} teacher pools, {shared['datasets']} data sets read"


def _set_aside(sweep: Sweep) -> None:
    """The sweep's folder and the runs of its trials' names get another name, also where the folder has gone before."""
    folder, stamp = sweep.folder, time.strftime("%Y%m%d-%H%M%S")
    has_begun = (folder / LOCK).exists()
    with locked(folder) if has_begun else nullcontext():
        runs = [run for run in named_runs(sweep) if run.exists()]
        for run in runs:
            if is_at_work(run):
                raise UserError(f"{run} is at work in another process; wait for it, stop it, or choose another --name")
        for path in [*runs, *([folder] if has_begun else [])]:
            path.rename(path.with_name(f"{path.name}{ASIDE}{stamp}"))
