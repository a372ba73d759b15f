"""What Ray shows of its other processes stays off stdout, which holds tables and JSON."""

import pytest

from raydistill.quiet import MANY_PROCESSES, ray_speaks_on_stderr


def test_a_raylets_complaint_goes_to_stderr_and_what_is_no_complaint_nowhere(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from ray._private import worker

    ray_speaks_on_stderr()
    ray_speaks_on_stderr()
    # As `ray._private.worker.listen_error_messages` does it.
    for text in ("the node ran out of memory", f"8 PYTHON {MANY_PROCESSES}: 0bdf"):
        worker.print_to_stdstream({"lines": [text], "pid": "raylet", "is_err": False}, ignore_prefix=False)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("the node ran out of memory") == 1
    assert "PYTHON" not in err
