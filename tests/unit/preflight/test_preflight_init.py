"""`raydistill init` writes a config that loads, fits and says why."""

import json
from pathlib import Path
from typing import Any

import pytest

from raydistill.cli import main_with_errors
from raydistill.config.load import load_config
from raydistill.errors import ConfigError
from raydistill.preflight.init import fit_trainer, init_command, split_devices


def init(world: Any, output: Path, *more: str) -> int:
    arguments = ["--model", str(world.teacher_folder), "--data", str(world.train_path), "-o", str(output), *more]
    return main_with_errors(init_command, arguments)


@pytest.mark.parametrize("gpus", [0, 1, 2, 3, 8])
def test_the_devices_add_up(gpus: int) -> None:
    d = split_devices(gpus)
    used = d.rollout * d.rollout_actors + d.teacher * d.teacher_actors + d.trainer * d.trainer_workers + d.evaluation
    assert used <= gpus + 1e-9
    assert used >= gpus * 0.9
    assert min(d.rollout_actors, d.teacher_actors, d.trainer_workers) >= 1


def test_the_config_loads_and_holds_what_the_data_says(tiny_world: Any, tmp_path: Path) -> None:
    assert init(tiny_world, tmp_path / "a.toml", "--gpus", "8", "--format", "int2") == 0
    config = load_config([f"@{tmp_path / 'a.toml'}"]).config
    assert config.quant.format == "int2"
    assert (config.trainer.num_workers, config.rollout.num_actors, config.teacher.num_actors) == (4, 2, 2)
    assert config.data.max_length == 256
    assert 1 < config.data.min_completion < 32
    assert config.rollout.max_new_tokens in (32, 64)
    assert config.objective.on_policy_fraction == 0.5
    assert config.trainer.sequences_per_micro_batch == 16
    assert not config.trainer.gradient_checkpointing


def test_rows_without_answers_are_answered_by_the_student(tiny_world: Any, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"count to {n}"}) + "\n" for n in range(20)))
    assert init(tiny_world, tmp_path / "a.toml", "--data", str(prompts)) == 0
    config = load_config([f"@{tmp_path / 'a.toml'}"]).config
    assert config.objective.on_policy_fraction == 1.0
    assert config.student.dtype == "float32"


def test_a_smaller_device_gets_smaller_batches_and_then_checkpointing(tiny_world: Any) -> None:
    devices = split_devices(4)
    tree: dict[str, Any] = {
        "student": {"model": str(tiny_world.teacher_folder), "dtype": "bfloat16"},
        "data": {"path": str(tiny_world.train_path), "max_length": 512},
        "rollout": {"max_new_tokens": 64, "num_gpus": 1},
        "teacher": {"num_gpus": 0.9},
        "trainer": {"num_workers": 2, "num_gpus": 1, "sequences_per_step": 32},
        "evaluation": {"num_gpus": 0.1},
    }
    found = []
    for percent in range(200, 100, -2):  # DeepSpeed's buffers alone take more than half of 2 GiB
        try:
            found.append(fit_trainer(tree, devices, percent / 100))
        except ConfigError as error:
            assert "one sequence of data.max_length=512 needs about" in str(error)  # noqa: PT017
            break
    order = [(checkpointing, -micro) for micro, checkpointing in found]
    assert order == sorted(order)
    assert found[0] == (16, False)
    assert len(set(found)) >= 3
    assert len(found) < 50, "the smallest device takes nothing"


def test_a_file_that_exists_is_not_overwritten(
    tiny_world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.toml").write_text("mine")
    assert init(tiny_world, tmp_path / "a.toml") == 2
    assert "exists" in capsys.readouterr().err
    assert (tmp_path / "a.toml").read_text() == "mine"


def test_a_folder_that_is_no_model_leaves_no_file(
    tiny_world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert init(tiny_world, tmp_path / "a.toml", "--model", str(tmp_path)) == 2
    assert "so not a model" in capsys.readouterr().err
    assert not (tmp_path / "a.toml").exists()
