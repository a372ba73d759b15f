"""What a process that loads models imports."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.engine


def test_a_process_that_loads_models_does_without_them() -> None:
    code = (
        "import sys, raydistill.models, raydistill.quant.student; from transformers import AutoModelForCausalLM;"
        "from raydistill.imports import UNUSED_BY_MODELS;"
        "print(*(name in sys.modules for name in (*UNUSED_BY_MODELS, 'bitsandbytes')));"
        "import sklearn.metrics, chardet; print('sklearn' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.split() == ["False"] * 5 + ["True"]


def test_the_files_of_an_export_can_be_the_first_that_is_imported() -> None:
    """As `raydistill serve` does: transformers was asked for scipy before scipy is hidden from it."""
    subprocess.run([sys.executable, "-c", "import raydistill.quant.export_files"], capture_output=True, check=True)
