"""What a sweep's own process says and hears, without a cluster."""

import signal
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from raydistill.errors import SweepStopped, UserError
from raydistill.results.deliver import FINISH_S
from raydistill.results.recorded import STOPPED_S
from raydistill.sweep import run as module
from raydistill.sweep.run import run_sweep, sharing_line
from raydistill.sweep.spec import Sweep, load_sweep


def sweep(tmp_path: Path, *arguments: str) -> Sweep:
    path = tmp_path / "lr.toml"
    path.write_text('[space]\n"trainer.learning_rate" = [1e-3]')
    return load_sweep(path, ["--run.output", str(tmp_path / "out"), *arguments])


class Behind:
    """A delivery whose store does not answer."""

    problem = "ConnectionError: refused"

    def __init__(self) -> None:
        self.patience_s: float | None = None

    def finish(self, timeout_s: float) -> bool:
        self.patience_s = timeout_s
        return False


def test_a_store_that_does_not_answer_is_told_once_before_and_with_its_reason_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any) -> None:
        raise UserError("as far as this test goes")

    with socket.socket() as nobody_listens:
        nobody_listens.bind(("127.0.0.1", 0))
        port = nobody_listens.getsockname()[1]
        asked = sweep(tmp_path, "--results.uri", f"http://127.0.0.1:{port}", "--world.name", "stories")
        monkeypatch.setattr(module, "check_storage", stop)
        with pytest.raises(UserError, match="as far as"):
            run_sweep(asked)
    assert capsys.readouterr().err.count(f"warning: results.uri does not answer (127.0.0.1:{port}") == 1

    monkeypatch.setattr(module, "start_delivery", lambda *_, **__: Behind())
    with module._delivered(asked):
        pass
    told = capsys.readouterr().err
    assert "the results store is behind (ConnectionError: refused); deliver later with" in told
    assert f"--under {tmp_path / 'out'}`" in told


def test_a_sweep_that_was_stopped_does_not_wait_for_its_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, waited = sweep(tmp_path, "--world.name", "stories"), []
    for stop in (SweepStopped("stopped"), KeyboardInterrupt(), None):
        delivery = Behind()
        monkeypatch.setattr(module, "start_delivery", lambda *_, found=delivery, **__: found)
        with suppress(SweepStopped, KeyboardInterrupt), module._delivered(asked):
            if stop is not None:
                raise stop
        waited.append(delivery.patience_s)
    assert waited == [STOPPED_S, STOPPED_S, FINISH_S]


def test_sigterm_is_heard_as_ctrl_c_while_trials_run() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), module._sigterm_as_sigint():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_was_shared_may_be_unknown() -> None:
    assert "not known" in sharing_line({})
