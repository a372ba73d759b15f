"""What a sweep says of its trials."""

import json
from pathlib import Path
from types import SimpleNamespace

from raydistill.results.record_lines import RECORD_FILE
from raydistill.sweep.recorder import reason_of


def test_the_reason_of_a_failure_is_this_tries_own(tmp_path: Path) -> None:
    end = {"kind": "end", "status": "failed", "message": "the disk is full", "time_s": 100.0}
    (tmp_path / RECORD_FILE).write_text(json.dumps(end) + "\n")
    error = SimpleNamespace(cause="Traceback\n  line 3\nResourceError: no teacher answers\n")
    trial = SimpleNamespace(get_pickled_error=lambda: error)
    assert reason_of(tmp_path, trial, since=90.0) == "the disk is full"
    assert (
        reason_of(tmp_path, trial, since=110.0) == "ResourceError: no teacher answers"
    )  # its record was not opened again
    assert reason_of(tmp_path / "none", trial, since=0.0) == "ResourceError: no teacher answers"
