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
