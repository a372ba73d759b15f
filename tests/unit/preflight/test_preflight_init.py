"""`raydistill init` writes a config that loads, fits and says why."""

import json
from pathlib import Path
from typing import Any

import pytest

from raydistill.cli import main_with_errors
from raydistill.config.load import load_config
from raydistill.errors import ConfigError
from raydistill.models import empty_model
from raydistill.preflight import init as init_module
from raydistill.preflight.init import fit_trainer, gpus_for, init_command, split_devices
from raydistill.preflight.sizes import model_size


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


@pytest.mark.parametrize(
    ("teacher", "rollout", "gpus"), [(2, 1, 4), (2, 1, 8), (1, 2, 4), (4, 2, 8), (2, 2, 5), (4, 4, 16)]
)
def test_the_devices_add_up_where_an_actor_needs_several(teacher: int, rollout: int, gpus: int) -> None:
    d = split_devices(gpus, teacher, rollout)
    used = d.rollout * d.rollout_actors + d.teacher * d.teacher_actors + d.trainer * d.trainer_workers + d.evaluation
    assert gpus * 0.8 <= used <= gpus + 1e-9
    assert (round(d.teacher), round(d.rollout)) == (teacher, rollout)
    assert min(d.rollout_actors, d.teacher_actors, d.trainer_workers) >= 1
    assert 0.5 < d.trainer <= 1  # NCCL: no two workers on one device


def test_too_few_devices_are_told_what_the_roles_need() -> None:
    with pytest.raises(ConfigError, match=r"--gpus 3: one teacher needs 2, one rollout engine 1 .* together 4"):
        split_devices(3, teacher_gpus=2)


def test_a_model_too_large_for_one_gpu_is_split_over_as_few_as_hold_it(tiny_world: Any) -> None:
    tree: dict[str, Any] = {
        "student": {"model": str(tiny_world.teacher_folder), "dtype": "bfloat16"},
        "data": {"path": str(tiny_world.train_path), "max_length": 64},
        "objective": {"top_k": 4},
        "rollout": {"max_new_tokens": 32},
        "teacher": {"num_gpus": 1, "batch_tokens": 64},
    }
    gib = 2**-30
    weights = 2 * model_size(empty_model(tiny_world.teacher_folder)).parameters
    assert gpus_for(tree, "rollout", 4, 10 * weights * gib) == 1
    assert gpus_for(tree, "rollout", 4, weights / 2 / 0.59 * gib) == 2
    assert gpus_for(tree, "rollout", 4, weights / 4 / 0.59 * gib) == 4
    with pytest.raises(ConfigError, match="one rollout actor needs about 0 GiB on each of 2 GPUs"):
        gpus_for(tree, "rollout", 2, weights / 4 / 0.59 * gib)
    found = [gpus_for(tree, "teacher", 4, size * weights * gib) for size in (20, 4, 3.5)]
    assert found[0] == 1
    assert found == sorted(found)


def test_the_config_of_a_model_too_large_for_one_gpu_loads(
    tiny_world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(init_module, "gpus_for", lambda tree, role, *_: 2)
    assert init(tiny_world, tmp_path / "a.toml", "--gpus", "8") == 0
    config = load_config([f"@{tmp_path / 'a.toml'}"]).config
    assert (config.teacher.num_gpus, config.teacher.num_actors) == (2, 1)
    assert (config.rollout.num_gpus, config.rollout.tensor_parallel_size, config.rollout.num_actors) == (2, 2, 1)
    assert (config.trainer.num_gpus, config.trainer.num_workers, config.evaluation.num_gpus) == (0.9, 4, 0.1)


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
    for percent in range(200, 100, -6):  # DeepSpeed's buffers alone take more than half of 2 GiB
        try:
            found.append(fit_trainer(tree, devices, percent / 100))
        except ConfigError as error:
            assert "one sequence of data.max_length=512 needs about" in str(error)  # noqa: PT017
            break
    order = [(checkpointing, -micro) for micro, checkpointing in found]
    assert order == sorted(order)
    assert found[0] == (16, False)
    assert len(set(found)) >= 3
    assert len(found) < len(range(200, 100, -6)), "the smallest device takes nothing"


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
