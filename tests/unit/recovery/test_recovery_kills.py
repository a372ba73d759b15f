"""The kills of benchmarks/chaos.py: one that meets nobody is no hit."""

import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raydistill.results.record import RunRecord

chaos_kills = pytest.importorskip("chaos_kills")


def gone() -> int:
    """The id of a process that has ended."""
    with subprocess.Popen(["true"]) as process:
        process.wait()
    return process.pid


@pytest.mark.parametrize("there", [True, False])
def test_a_kill_whose_victim_has_gone_by_then_is_no_hit(tmp_path: Path, there: bool) -> None:
    with RunRecord(tmp_path) as record:
        record.start(name="run", config={}, provenance={}, seed=0)
        record.step(0, {})
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    answers = [gone()] if there else []  # the first answer finds the moment, the next one the victim

    class Workers:
        def newest(self, title: str) -> int | None:
            return (answers or [None])[0]

    striker: Any = chaos_kills.Striker(tmp_path, SimpleNamespace(workers=Workers), lambda: True)
    striker._is_now = lambda kill: True
    kill = chaos_kills.Kill(victim="teacher", moment="score", step=1, number=signal.SIGKILL)
    assert striker.strike(kill) is None
