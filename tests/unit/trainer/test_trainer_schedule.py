"""The learning rate as a plain function of the optimizer step."""

from typing import Any

import pytest
import torch

from raydistill.config import TrainerSection
from raydistill.trainer.schedule import SCHEDULES, learning_rate_factor


def section(**fields: Any) -> TrainerSection:
    return TrainerSection.model_validate({"num_steps": 10, "warmup_fraction": 0.2, "lr_schedule": "linear"} | fields)


def factors(**fields: Any) -> list[float]:
    trainer = section(**fields)
    return [learning_rate_factor(trainer, step) for step in range(trainer.num_steps)]


def test_the_warm_up_rises_linearly_and_the_first_step_trains() -> None:
    assert factors()[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert factors(warmup_fraction=0.0)[0] == 1.0
    assert factors(warmup_fraction=1.0) == pytest.approx([(step + 1) / 11 for step in range(10)])


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_a_falling_schedule_falls_from_the_peak_and_trains_to_the_last_step(name: str) -> None:
    values = factors(lr_schedule=name, num_steps=100)[20:]
    assert values[0] == 1.0
    assert values == sorted(values, reverse=True)
    assert values[40] == pytest.approx(0.5)
    assert 0 < values[-1] < 0.02
    assert learning_rate_factor(section(lr_schedule=name, num_steps=100), 100) == pytest.approx(0.0, abs=1e-12)
    assert learning_rate_factor(section(lr_schedule=name, num_steps=100), 500) == pytest.approx(0.0, abs=1e-12)


def test_a_constant_schedule_stays_at_the_peak() -> None:
    assert factors(lr_schedule="constant")[2:] == [1.0] * 8


def test_a_run_of_one_step_trains() -> None:
    assert factors(num_steps=1, warmup_fraction=0.05) == [1.0]


def test_every_schedule_of_the_config_is_there() -> None:
    assert set(SCHEDULES) == set(TrainerSection.model_fields["lr_schedule"].annotation.__args__)  # type: ignore[union-attr]


def test_the_rate_depends_on_optimizer_steps_only_whatever_the_ranks_and_micro_batches() -> None:
    split = {"num_workers": 4, "sequences_per_step": 32, "sequences_per_micro_batch": 2}
    assert section(**split).micro_batches_per_step == 4
    assert factors(**split) == factors()


def test_a_torch_scheduler_stepped_once_per_optimizer_step_follows_it() -> None:
    trainer = section(learning_rate=2.0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=trainer.learning_rate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(trainer, step))
    used = []
    for _ in range(trainer.num_steps):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert used == pytest.approx([2.0 * factor for factor in factors()])
