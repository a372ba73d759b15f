"""A tiny random model with rows, and an interpreter that plays llm-compressor's."""

import stat
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import Rows, make_world, write_model

from raydistill.ptq.calibration import Calibration
from raydistill.ptq.overlay import Job
from raydistill.quant.formats import WeightFormat

INT2 = WeightFormat(bits=2, group_size=32, symmetric=False, scale="absmax")
INT4 = WeightFormat(bits=4, group_size=32, symmetric=True, scale="absmax")


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    return make_world(tmp_path_factory.mktemp("ptq_world"), num_train=60, num_validation=8)


@pytest.fixture(scope="session")
def model(rows: Rows, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("qwen3", rows.tokenizer, tmp_path_factory.mktemp("ptq_model") / "model")


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Of one layer, 4 by 32."""
    return Job(
        method="gptq",
        model=tmp_path / "model",
        layers=("layer",),
        grids=(INT2, INT4),
        calibration=Calibration(rows=((1, 2, 3), (4, 5)), num_available=2, seed=7),
        dtype="float32",
    )


@pytest.fixture
def fake_python(tmp_path: Path) -> Any:
    """Gives an executable that runs `body` in place of the runner; it may use `job` (a dict), `say` and `write`."""

    def make(body: str) -> Path:
        script = tmp_path / "fake.py"
        script.write_text(PREAMBLE + body)
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
        python.chmod(python.stat().st_mode | stat.S_IXUSR)
        return python

    return make


PREAMBLE = """
import json, os, sys, time
from pathlib import Path
job = json.loads(Path(sys.argv[-1]).read_text())
def say(**event):
    print(json.dumps(event), flush=True)
def write(number, has_zero_point):
    import numpy as np
    from safetensors.numpy import save_file
    tensors = {"layer.codes": np.full((4, 32), -1, np.int8), "layer.scale": np.full((4, 1), 0.5, np.float16)}
    if has_zero_point:
        tensors["layer.zero_point"] = np.zeros((4, 1), np.int8)
    save_file(tensors | {"norm.weight": np.ones(3, np.float32)}, Path(job["out"]) / f"{number}.safetensors")
"""
