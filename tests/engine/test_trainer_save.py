"""The trainer's ranks save a checkpoint together, and one of them dies: real processes on gloo (`dying_rank.py`)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

LIMIT_S = 300.0


def test_a_neighbours_death_is_no_disk_error_wherever_it_is_met(tmp_path: Path) -> None:
    """The run goes on from its last checkpoint; an error of ours would end it."""
    script = str(Path(__file__).with_name("dying_rank.py"))
    told = subprocess.run([sys.executable, script, str(tmp_path)], capture_output=True, text=True, timeout=LIMIT_S)
    assert told.returncode == 0, told.stderr[-3000:]
    met = json.loads(told.stdout.splitlines()[-1])
    assert len(met) == 3
    for moment, error in met.items():
        assert not error.get("is_ours", True), f"{moment}: {error}"
        assert "onnection" in error["message"], f"{moment}: {error}"
