"""The sweep under Ray Tune: trials, samplers, schedulers, and going on after a kill.

Ray Tune chooses and starts trials and stops those that lag; the sweep's host runs them. What Tune writes of its own state
(`<sweep folder>/tune`) is not gone back to: it is written every 10 seconds, in several files, and one that a kill left
behind may have forgotten a trial that had begun. `sweep.json` knows them all. The only module that knows Ray Tune.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayActorError, RayTaskError
from ray.tune import Callback, FailureConfig, RunConfig, TuneConfig, Tuner
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from raydistill.errors import RunError, UserError
from raydistill.sweep.space import Choice, Values, gathered, spread
from raydistill.sweep.spec import Sweep
from raydistill.sweep.state import OVER, TUNE_FOLDER, SweepState, run_name

VERSION = "version"  # the optimizer steps behind a report: what a scheduler compares at
END = 2**31  # the "version" of a run's last report, behind all others
SUMMARY = "summary"
RUN, POINT = "run", "point"
QUIET = {  # the sweep's own lines, state and page say it
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_MAX_LEN_IDENTIFIER": "40",
}
MAX_HOST_DEATHS = 5  # met by one trial; a host that dies oftener has a cause that starting it again does not cure
HOST_PAUSE_S = 2.0
LATE_S = 30.0  # for the last reports of a run that is over
THIN = 0.001  # of a node's own resource, for a trial's process, which only waits; Tune wants more than nothing


def run_trials(sweep: Sweep, host: Any, callback: Callback, retry_failed: bool = False) -> None:
    """Run the whole sweep, or what is left of it. A trial that fails ends nothing; `callback` hears of it."""
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # of a failed trial the recorder says what is to be said
    known = SweepState.of(sweep).trials
    over = [trial.run for trial in known.values() if trial.status in OVER]
    if retry_failed:
        over = [run for run in over if known[run].status != "failed"]
    if sweep.points is not None:
        named = {run_name(sweep.name, number): point for number, point in enumerate(sweep.points)}
    else:
        named = {trial.run: trial.values for trial in known.values()}
    left = [{RUN: run, POINT: dict(point)} for run, point in named.items() if run not in over]
    if left:
        _tune(sweep, host, callback, {POINT: tune.grid_search(left)}, TuneConfig())
    now = SweepState.of(sweep).trials
    new = sweep.num_trials - len(named)
    if new > 0 and all(trial.status in OVER for trial in now.values()):  # else it was interrupted
        _tune(sweep, host, callback, _domains(sweep), TuneConfig(search_alg=_searcher(sweep), num_samples=new))


def _tune(sweep: Sweep, host: Any, callback: Callback, space: Mapping[str, Any], config: TuneConfig) -> None:
    shutil.rmtree(sweep.folder / TUNE_FOLDER, ignore_errors=True)
    # Where the sweep's own process is: whatever other node is lost takes no trial along. No CPU: a cluster's head has none.
    # By its id as well: nodes of one machine have one address.
    here = tune.PlacementGroupFactory(
        [{f"node:{ray.util.get_node_ip_address()}": THIN}],
        bundle_label_selector=[{"ray.io/node-id": ray.get_runtime_context().get_node_id()}],
    )
    config.metric, config.mode, config.scheduler = sweep.file.metric, sweep.mode, _scheduler(sweep)
    config.max_concurrent_trials = sweep.file.parallel
    config.reuse_actors = True  # a trial's process is thin, and starting it costs more than what it does
    Tuner(
        tune.with_resources(partial(_trial, sweep_name=sweep.name, host=host), here),
        param_space=dict(space),
        tune_config=config,
        run_config=RunConfig(
            name=TUNE_FOLDER,
            storage_path=str(sweep.folder),
            callbacks=[callback],
            failure_config=FailureConfig(
                max_failures=1
            ),  # a process that is lost; a run that failed fails at once again
            verbose=0,
        ),
    ).fit()


def run_of(sweep_name: str, trial_id: str, parameters: Mapping[str, Any]) -> str:
    """The name of a trial's run."""
    return str(parameters[POINT][RUN]) if POINT in parameters else run_name(sweep_name, trial_id.rpartition("_")[2])


def point_of(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What Tune hands to a trial, as dotted fields and values."""
    return dict(parameters[POINT][POINT]) if POINT in parameters else spread(parameters)


def _trial(parameters: Mapping[str, Any], sweep_name: str, host: Any) -> None:
    """One trial's process: asks the host for the run, and passes its reports on to Tune."""
    name, deaths = run_of(sweep_name, tune.get_context().get_trial_id(), parameters), 0
    while True:
        try:
            summary = _run(host, name, point_of(parameters))
        except RayActorError:  # Ray starts the host again, and the run goes on from its checkpoint
            deaths += 1
            if deaths > MAX_HOST_DEATHS:
                raise
            time.sleep(HOST_PAUSE_S)
        else:
            tune.report({VERSION: END, **summary["metrics"], SUMMARY: summary})
            return


def _run(host: Any, name: str, point: Mapping[str, Any]) -> dict[str, Any]:
    # No time limits: between two evaluations may lie days. A host that dies ends the wait; one that hangs does not.
    done = host.run.remote(name, point)
    is_over = False
    try:
        while (report := _next_report(host, name, done)) is not None:
            tune.report(report)  # a scheduler that has seen enough ends this process here
        summary: dict[str, Any] = ray.get(done)
        is_over = True
        return summary
    except RayTaskError as error:
        cause = getattr(error, "cause", None)
        raise RunError(str(cause if isinstance(cause, (RunError, UserError)) else error)) from error
    finally:
        if not is_over:
            host.stop.remote(name)


def _next_report(host: Any, name: str, done: Any) -> dict[str, float] | None:
    """None: there are no more, or the host that ran the trial is gone, and the new one knows of none."""
    told = host.next_report.remote(name)
    ray.wait([told, done], num_returns=1)
    if not ray.wait([told], timeout=LATE_S)[0]:
        return None
    report: dict[str, float] | None = ray.get(told)
    return report


def _domains(sweep: Sweep) -> dict[str, Any]:
    return {field: _domain(values) for field, values in sweep.space.items()}


def _domain(values: Values) -> Any:
    if isinstance(values, Choice):
        return tune.choice(list(values.values))
    if values.is_whole:
        low, high = int(values.low), int(values.high) + 1
        return tune.lograndint(low, high) if values.is_log else tune.randint(low, high)
    return tune.loguniform(values.low, values.high) if values.is_log else tune.uniform(values.low, values.high)


def _searcher(sweep: Sweep) -> Searcher:
    """Optuna, which knows what earlier lives of the sweep found; their draws are not drawn again."""
    from ray.tune.search.optuna import OptunaSearch

    seed = sweep.base.run.seed + len(SweepState.of(sweep).trials)
    name = sweep.file.metric
    return OptunaSearch(metric=name, mode=sweep.mode, seed=seed, storage=found_before(sweep), study_name=sweep.name)


def found_before(sweep: Sweep) -> Any:
    """Optuna's storage, with what earlier lives of the sweep found as the study that has the sweep's name.

    The metric of a trial that ASHA stopped is of an early version, and no result of its point: as a pruned one, Optuna ranks
    it behind all that finished. That of a failed trial says nothing, and Optuna takes nothing that is no number.
    """
    import optuna
    from optuna.trial import TrialState
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(
        storage=storage, study_name=sweep.name, direction="minimize" if sweep.mode == "min" else "maximize"
    )
    distributions = OptunaSearch.convert_search_space(_domains(sweep))
    states = {"finished": TrialState.COMPLETE, "stopped": TrialState.PRUNED}
    for trial in SweepState.of(sweep).trials.values():
        value = trial.metrics.get(sweep.file.metric, math.nan)
        if trial.status in states and math.isfinite(value):
            found = optuna.trial.create_trial(
                state=states[trial.status],
                value=value,
                params=gathered(sweep.space, trial.values),
                distributions=distributions,
                intermediate_values={0: value},
            )
            study.add_trial(found)
    return storage


def _scheduler(sweep: Sweep) -> TrialScheduler:
    if sweep.file.scheduler == "none":
        return FIFOScheduler()
    asha = sweep.file.asha
    return ASHAScheduler(
        time_attr=VERSION,
        grace_period=asha.grace_steps,
        max_t=END,  # the last version is no reason to stop: the run still writes its export
        reduction_factor=asha.reduction_factor,
    )
