"""Sweeps with the real Ray Tune: sharing changes no result, a failing trial ends nothing, a killed sweep goes on."""

from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from run_helpers import QUIET, losses, sweep_file, trial_config

from raydistill.config import Config
from raydistill.data.schedule import StepSchedule
from raydistill.errors import UserError
from raydistill.launch import Pools, run
from raydistill.results.record import read_record
from raydistill.sweep.run import run_sweep
from raydistill.sweep.spec import load_sweep
from raydistill.sweep.state import read_state

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]

STEPS = 4
NO_NUMBER = 1e30  # a learning rate after which every loss is NaN


def short_config(make_config: Any, output: Path, **changes: Any) -> Config:
    return trial_config(make_config, output, rollout={"engine": "hf"}, trainer={"num_steps": STEPS}, **changes)


def check_each_row_of_the_data_set_was_computed_once(config: Config, rows: dict[str, int]) -> None:
    """Of three trials with the same rows. What students sampled is computed every time: by two trials in all of their steps,
    by the one that failed in some."""
    example: Any = SimpleNamespace(has_reference=True)
    objective, size = config.objective, config.trainer.sequences_per_step
    schedule = StepSchedule([example], config.run.seed, size, objective.on_policy_fraction, objective.mixing)
    sampled = [int(schedule.is_on_policy(step).sum()) for step in range(STEPS)]
    distinct = config.data.eval_rows + STEPS * size - sum(sampled)
    assert rows["computed_rows"] - 2 * sum(sampled) - distinct in list(accumulate(sampled))
    assert rows["kept_rows"] >= distinct, "the second of the finished trials had all of them from those kept"


def test_trials_share_pools_and_end_as_a_separate_run_does(pools: Pools, make_config: Any, tmp_path: Path) -> None:
    """Two at a time: they take turns in one engine, and one that fails leaves the others alone."""
    config = short_config(make_config, tmp_path / "sweep")
    space = f'"trainer.learning_rate" = [1e-3, {NO_NUMBER}, 4e-3]'
    sweep = load_sweep(sweep_file(tmp_path / "lr.toml", config, space, "parallel = 2"))
    result = run_sweep(sweep)
    state = read_state(sweep.folder)
    trials = sorted(
        state["trials"], key=lambda trial: trial["run"]
    )  # of two at a time either may be the first to begin
    assert [trial["status"] for trial in trials] == ["finished", "failed", "finished"]
    assert "max_skipped_fraction" in trials[1]["error"]
    assert result.num_finished == 2
    assert state["shared"]["pools"] == {"rollouts": 1, "teachers": 1, "evaluator": 1, "trainers": 1}
    assert state["shared"]["datasets"] == 1
    check_each_row_of_the_data_set_was_computed_once(config, state["shared"]["teacher_rows"])

    trial = trials[0]  # which had both others beside it
    alone = config.model_copy(
        update={
            "run": config.run.model_copy(update={"output": tmp_path / "alone", "name": trial["run"]}),
            "trainer": config.trainer.model_copy(update={"learning_rate": trial["values"]["trainer.learning_rate"]}),
        }
    )
    separate = run(alone, pools, QUIET)
    lines = read_record(tmp_path / "sweep" / "runs" / trial["run"])
    shared = [line["metrics"]["trainer/loss"] for line in lines if line["kind"] == "step"]
    np.testing.assert_allclose(shared, losses(separate), rtol=1e-5)
    assert trial["metrics"]["evaluate/kl_nats"] == pytest.approx(separate.metrics["evaluate/kl_nats"], rel=1e-4)

    with pytest.raises(UserError, match="has finished"):
        run_sweep(sweep)
