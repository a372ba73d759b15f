"""Sweeps with the real Ray Tune: sharing changes no result, a failing trial ends nothing, a killed sweep goes on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_helpers import QUIET, losses, sweep_file, trial_config

from raydistill.config import Config
from raydistill.errors import UserError
from raydistill.launch import Pools, run
from raydistill.results.record import read_record
from raydistill.sweep.run import run_sweep
from raydistill.sweep.spec import load_sweep
from raydistill.sweep.state import read_state

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]
STEPS = 4
STEPS_OF_A_STOPPED_SWEEP = 40  # so many that a signal is heard before they are over
NO_NUMBER = 1e30  # a learning rate after which every loss is NaN


def short_config(make_config: Any, output: Path, **changes: Any) -> Config:
    return trial_config(make_config, output, rollout={"engine": "hf"}, trainer={"num_steps": STEPS}, **changes)


def test_trials_share_pools_and_end_as_separate_runs_do(pools: Pools, make_config: Any, tmp_path: Path) -> None:
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
    assert state["shared"]["teacher_rows"]["kept_rows"] > 0

    for trial in (trials[0], trials[2]):
        rate = trial["values"]["trainer.learning_rate"]
        alone = config.model_copy(
            update={
                "run": config.run.model_copy(update={"output": tmp_path / "alone", "name": trial["run"]}),
                "trainer": config.trainer.model_copy(update={"learning_rate": rate}),
            }
        )
        separate = run(alone, pools, QUIET)
        lines = read_record(tmp_path / "sweep" / "runs" / trial["run"])
        shared = [line["metrics"]["trainer/loss"] for line in lines if line["kind"] == "step"]
        np.testing.assert_allclose(shared, losses(separate), rtol=1e-5)
        assert trial["metrics"]["evaluate/kl_nats"] == pytest.approx(separate.metrics["evaluate/kl_nats"], rel=1e-4)

    with pytest.raises(UserError, match="has finished"):
        run_sweep(sweep)
