"""What Optuna is told of the trials of a sweep's earlier lives."""

import math
from pathlib import Path

from raydistill.sweep.spec import load_sweep
from raydistill.sweep.state import SweepState

FILE = """
sampler = "optuna"
num_samples = 9
scheduler = "asha"
[space]
"trainer.learning_rate" = { log_range = [1e-4, 1e-2] }
"adapter.targets" = [["q_proj"], ["q_proj", "v_proj"]]
"""


def test_optuna_hears_of_finished_trials_and_of_stopped_ones_as_pruned(tmp_path: Path) -> None:
    import optuna
    from optuna.trial import TrialState

    from raydistill.sweep.tuner import found_before

    path = tmp_path / "lr.toml"
    path.write_text(FILE)
    sweep = load_sweep(path, ["--run.output", str(tmp_path)])
    state = SweepState.of(sweep)
    for number, (status, kl) in enumerate(
        (
            ("finished", 0.1),
            ("stopped", 0.3),
            ("failed", 0.2),
            ("finished", math.nan),
            ("stopped", None),
            ("running", 0.4),
        )
    ):
        values = {"trainer.learning_rate": 1e-3 * (number + 1), "adapter.targets": ("q_proj", "v_proj")}
        metrics = {} if kl is None else {"evaluate/kl_nats": kl}
        state.change(f"lr-{number}", values=values, status=status, metrics=metrics)
    study = optuna.load_study(study_name="lr", storage=found_before(sweep))
    assert [(trial.state, trial.value, trial.params["trainer.learning_rate"]) for trial in study.trials] == [
        (TrialState.COMPLETE, 0.1, 1e-3),
        (TrialState.PRUNED, 0.3, 2e-3),
    ]
    assert study.trials[0].params["adapter.targets"] == ("q_proj", "v_proj")
    assert study.direction.name == "MINIMIZE"
