"""What must hold on any device, on the CPU; tests/gpu asks the same of CUDA."""

from pathlib import Path

import device_checks
import pytest
from device_checks import FORMATS

from raydistill.actors.starting import actor_options, torch_environment
from raydistill.actors.vllm_settings import ENGINE_ENVIRONMENT
from raydistill.config import Config, EvaluationSection, TeacherSection
from raydistill.trainer.crew import worker_environment

DEVICE = "cpu"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return device_checks.model_folder(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("fmt", FORMATS, ids=[fmt.name for fmt in FORMATS])
def test_codes_are_the_same_bits(fmt) -> None:
    device_checks.check_codes(DEVICE, fmt)


@pytest.mark.parametrize("is_dense", [True, False], ids=["dense", "top-k"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_losses_and_gradients_are_those_of_the_formula(beta: float, is_dense: bool) -> None:
    device_checks.check_losses(DEVICE, beta, is_dense)


def test_logits_are_those_of_the_whole_model(folder: Path) -> None:
    device_checks.check_completion_model(DEVICE, folder)


def test_a_student_has_the_same_codes_and_gradients(folder: Path) -> None:
    device_checks.check_student(DEVICE, folder)


def test_a_teacher_answers_as_in_float64(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device_checks.check_teacher(DEVICE, folder, 0, monkeypatch)


def test_an_actor_that_books_no_gpu_sees_none_and_one_that_does_is_left_to_ray() -> None:
    """Ray 2.60 leaves CUDA_VISIBLE_DEVICES alone for an actor without GPUs."""
    for section in (TeacherSection(), EvaluationSection()):
        assert torch_environment(section)["CUDA_VISIBLE_DEVICES"] == ""
    assert worker_environment(Config())["CUDA_VISIBLE_DEVICES"] == ""
    booked = Config.model_validate({"trainer": {"num_gpus": 1}, "teacher": {"num_gpus": 2}})
    assert "CUDA_VISIBLE_DEVICES" not in worker_environment(booked) | torch_environment(booked.teacher)
    options = actor_options("teacher", booked.teacher, dict(ENGINE_ENVIRONMENT), by_role=False)
    assert options["num_gpus"] == 2
    assert "CUDA_VISIBLE_DEVICES" not in options["runtime_env"]["env_vars"]
