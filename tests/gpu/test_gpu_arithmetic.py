"""On CUDA: the checks that tests/unit/core/test_core_devices.py makes on the CPU, and a teacher over two devices."""

from pathlib import Path

import device_checks
import pytest
from device_checks import FORMATS

from raydistill.quant.formats import WeightFormat

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return device_checks.model_folder(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("fmt", FORMATS, ids=[fmt.name for fmt in FORMATS])
def test_codes_are_the_same_bits_on_cuda(fmt: WeightFormat) -> None:
    device_checks.check_codes(DEVICE, fmt)


@pytest.mark.parametrize("is_dense", [True, False], ids=["dense", "top-k"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_losses_and_gradients_on_cuda_are_those_of_the_formula(beta: float, is_dense: bool) -> None:
    device_checks.check_losses(DEVICE, beta, is_dense)


def test_logits_on_cuda_are_those_of_the_whole_model(folder: Path) -> None:
    device_checks.check_completion_model(DEVICE, folder)


def test_a_student_on_cuda_has_the_same_codes_and_gradients(folder: Path) -> None:
    device_checks.check_student(DEVICE, folder)


def test_a_teacher_on_cuda_answers_as_in_float64(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device_checks.check_teacher(DEVICE, folder, 1, monkeypatch)


@pytest.mark.gpu(num=2)
def test_a_teacher_over_two_devices_answers_as_in_float64(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    actor = device_checks.check_teacher(DEVICE, folder, 2, monkeypatch)
    assert actor._model is not None
    assert set(actor._model.model.hf_device_map.values()) == {0, 1}
