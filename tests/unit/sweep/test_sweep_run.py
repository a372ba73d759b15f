"""What a sweep's own process says and hears, without a cluster."""

import signal
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from raydistill.errors import SweepStopped, UserError
from raydistill.results.deliver import FINISH_S
from raydistill.results.record import RunRecord
from raydistill.results.record_lines import require_start
from raydistill.results.recorded import STOPPED_S
from raydistill.sweep import run as module
from raydistill.sweep.identity import check_runs
from raydistill.sweep.run import run_sweep, sharing_line
from raydistill.sweep.spec import Sweep, load_sweep
from raydistill.sweep.state import SweepState


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


def test_a_run_that_another_sweep_left_behind_is_refused_and_set_aside_by_starting_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where somebody removes `sweeps/lr`, and starts a sweep of that name over other values."""

    def stop(*_: Any) -> None:
        raise UserError("as far as this test goes")

    asked, runs = sweep(tmp_path, "--world.name", "stories"), tmp_path / "out" / "runs"
    monkeypatch.setattr(module, "resolve_world", lambda base, console: base)
    monkeypatch.setattr(module, "start_cluster", stop)
    with RunRecord(runs / "lr-000") as record:
        record.start(name="lr-000", config={}, provenance={}, seed=0, parent="the-sweep-that-was-removed")
        record.end("finished")
    with pytest.raises(UserError, match=r"lr-000 is a run of the same name .*move it away.*--name.*--resume never"):
        run_sweep(asked)
    with pytest.raises(UserError, match="as far as"):
        run_sweep(asked, anew=True)
    assert [path.name.partition("-2")[0] for path in runs.iterdir()] == ["lr-000.before"]
    assert len(list((tmp_path / "out" / "sweeps").glob("lr.before-*"))) == 1


def test_the_runs_of_a_sweep_are_its_own(tmp_path: Path) -> None:
    asked = sweep(tmp_path)
    folder = tmp_path / "out" / "runs" / "lr-000"
    with RunRecord(asked.folder) as record:
        record.start(name="lr", config={}, provenance={}, seed=0)
    with RunRecord(folder) as record:
        record.start(name="lr-000", config={}, provenance={}, seed=0, parent=require_start(asked.folder)["record_id"])
    check_runs(asked)
    (asked.folder / "record.jsonl").unlink()
    with pytest.raises(UserError, match="does not belong to this sweep"):
        check_runs(asked)
    SweepState.of(asked).change("lr-000", values={}, status="finished")
    check_runs(asked)  # it is not asked for again


def test_sigterm_is_heard_as_ctrl_c_while_trials_run() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), module._sigterm_as_sigint():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_was_shared_may_be_unknown() -> None:
    assert "not known" in sharing_line({})
