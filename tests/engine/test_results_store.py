"""The real MLflow on SQLite: a delivery process, restarts, a store that is down, many at once, the page."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from raydistill.errors import UserError
from raydistill.messages import EvalReport, Span
from raydistill.report.listing import results_command
from raydistill.results.deliver import deliver, deliver_all, start_delivery
from raydistill.results.delivery import STATE_FILE, read_state
from raydistill.results.query import list_runs, sort_runs
from raydistill.results.record import RunRecord
from raydistill.results.record_lines import require_start
from raydistill.results.store import ResultsStore, default_uri

pytestmark = pytest.mark.engine

EXPERIMENT = "raydistill"
WAIT_S = 240.0  # beside a run of another test, importing MLflow may take a minute


def started(output: Path, name: str, rate: float = 1e-3) -> RunRecord:
    record = RunRecord(output / "runs" / name)
    config = {"trainer": {"learning_rate": rate, "num_steps": 100}, "results": {"tags": {"owner": "me"}}}
    record.start(name=name, config=config, provenance={"versions": {"torch": "1"}, "git": None}, seed=0)
    return record


def evaluation(version: int, kl: float) -> EvalReport:
    span = Span(stage="evaluate", actor="evaluator-0", step=version, start_s=0.0, end_s=1.0)
    return EvalReport(version=version, metrics={"evaluate/kl_nats": kl}, span=span)


def history(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    points = ResultsStore(uri, EXPERIMENT).client.get_metric_history(run_id, key)
    return sorted((point.step, point.value) for point in points)


def test_a_process_of_its_own_delivers_1000_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = default_uri(tmp_path)
    record = started(tmp_path, "a")
    (tmp_path / "job").mkdir()
    monkeypatch.chdir(tmp_path / "job")
    (tmp_path / "job").rmdir()  # as a second node of one machine does with the folder of a Ray job
    handle = start_delivery(record.path.parent, uri, EXPERIMENT)
    monkeypatch.undo()
    for step in range(100):
        record.step(step, {f"trainer/m{i}": float(step * i) for i in range(9)} | {"trainer/nan": float("nan")})
    record.evaluation(evaluation(100, 0.1))
    record.table("summary", [{"name": "student"}], "| student |")
    record.artifact("checkpoint", tmp_path)
    record.warning("an actor died")
    record.end("finished")
    assert handle.finish(WAIT_S), (record.path.parent / "delivery.log").read_text()
    assert handle.problem is None
    (run,) = list_runs(uri)
    assert (run.name, run.status) == ("a", "finished")
    assert run.settings["trainer.learning_rate"] == 0.001
    assert run.tags["owner"] == "me"
    assert run.tags["num_warnings"] == "1"
    assert run.tags["path.checkpoint"] == str(tmp_path)
    assert history(uri, run.id, "trainer/m2") == [(step, float(step * 2)) for step in range(100)]
    files = {str(path.relative_to(tmp_path / "artifacts" / run.id / "artifacts")) for path in _files(tmp_path)}
    assert files == {"record.jsonl", "tables/summary.json", "tables/summary.md"}


def test_repeats_restarts_and_lost_state_store_nothing_twice(tmp_path: Path) -> None:
    uri = default_uri(tmp_path)
    record = started(tmp_path, "a")
    folder = record.path.parent
    for step in range(10):
        record.step(step, {"m": float(step)})
        assert step % 5 or deliver(folder, uri, EXPERIMENT)
    (folder / STATE_FILE).unlink()
    record.evaluation(evaluation(10, 0.1))
    record.end("finished")
    assert deliver(folder, uri, EXPERIMENT)
    assert deliver(folder, uri, EXPERIMENT)
    (run,) = list_runs(uri)
    assert history(uri, run.id, "m") == [(step, float(step)) for step in range(10)]
    assert history(uri, run.id, "evaluate/kl_nats") == [(10, 0.1)]


def test_a_resumed_run_shows_replayed_steps_once(tmp_path: Path) -> None:
    uri = default_uri(tmp_path)
    record = started(tmp_path, "a")
    for step in range(6):
        record.step(step, {"m": float(step)})
    assert deliver(record.path.parent, uri, EXPERIMENT)
    record.cut_back(4)
    for step in range(4, 8):
        record.step(step, {"m": 100.0 + step})
    record.end("finished")
    assert deliver(record.path.parent, uri, EXPERIMENT)
    (run,) = list_runs(uri)
    assert run.status == "finished"
    assert history(uri, run.id, "m") == [(s, float(s)) for s in range(4)] + [(s, 100.0 + s) for s in range(4, 8)]


def test_a_resumed_sweep_keeps_the_trials_that_were_delivered_before(tmp_path: Path) -> None:
    uri = default_uri(tmp_path)
    with RunRecord(tmp_path / "sweeps" / "rates") as sweep:
        sweep.start(name="rates", config={}, provenance={}, seed=0)
        sweep.end("interrupted")
        with RunRecord(tmp_path / "runs" / "rates-0") as trial:
            parent = require_start(tmp_path / "sweeps" / "rates")["record_id"]
            trial.start(name="rates-0", config={}, provenance={}, seed=0, parent=parent)
            trial.end("finished")
        assert deliver_all(tmp_path)
        before = {run.name: run.id for run in list_runs(uri)}
        sweep.cut_back(0)
        sweep.end("finished")
    assert deliver_all(tmp_path)
    after = {run.name: run for run in list_runs(uri)}
    assert after["rates"].id != before["rates"], "else nothing was replaced"
    assert after["rates-0"].id == before["rates-0"]
    assert after["rates-0"].parent == "rates"


def test_several_first_openings_at_once_and_a_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = default_uri(tmp_path)
    handles = []
    for k, name in enumerate(("a", "b", "c", "d")):
        record = started(tmp_path, name, rate=10.0**-k)
        record.step(0, {"m": float(k)})
        record.evaluation(evaluation(1, 0.1 * (4 - k)))
        record.end("finished")
        handles.append(start_delivery(record.path.parent, uri, EXPERIMENT))
    done = [handle.finish(180) for handle in handles]
    assert done == [True] * 4, [(handle.folder / "delivery.log").read_text() for handle in handles]
    assert [run.name for run in sort_runs(list_runs(uri), "kl")] == ["d", "c", "b", "a"]
    here = ["--output", str(tmp_path)]
    assert results_command([*here, "--where", "learning_rate < 0.5 and tags.owner = me", "--columns", "run"]) == 0
    out = capsys.readouterr().out
    assert [name in out for name in ("│ a ", "│ b ", "│ c ", "│ d ")] == [False, True, True, True]
    assert results_command(["compare", "a", "b", "--json", *here]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"] == {"trainer.learning_rate": {"a": 1.0, "b": 0.1}}
    assert found["metrics"]["evaluate/kl_nats"] == {"a": 0.4, "b": pytest.approx(0.3)}
    assert Path(found["plot"]).read_bytes().startswith(b"\x89PNG")
    assert results_command(["show", "c", *here]) == 0
    assert "finished after 1 of 100 steps" in capsys.readouterr().out


def test_a_store_that_comes_up_late_gets_everything(tmp_path: Path) -> None:
    place = tmp_path / "mounted-later"
    place.write_text("a file where the folder should be: the store cannot open")
    uri = f"sqlite:///{place}/results.db"
    record = started(tmp_path, "a")
    handle = start_delivery(record.path.parent, uri, EXPERIMENT)
    record.step(0, {"m": 1.0})
    _wait_for(lambda: handle.problem is not None)
    place.unlink()
    record.end("finished")
    assert handle.finish(WAIT_S), (record.path.parent / "delivery.log").read_text()
    assert [run.status for run in list_runs(uri)] == ["finished"]
    assert read_state(record.path.parent).problem is None


def test_a_store_that_stays_down_does_not_hold_up_the_driver(tmp_path: Path) -> None:
    record = started(tmp_path, "a")
    handle = start_delivery(record.path.parent, "http://127.0.0.1:9", EXPERIMENT)
    record.end("finished")
    begin = time.monotonic()
    assert not handle.finish(2)
    assert time.monotonic() - begin < 10
    assert handle.process.poll() is not None


def test_a_store_that_does_not_answer_is_one_line_to_its_reader() -> None:
    for uri in ("http://127.0.0.1:9", "foo://here"):
        with pytest.raises(UserError, match=rf"the results store {uri} does not answer \(.*; start it"):
            list_runs(uri)


def test_the_delivery_of_a_killed_driver_ends_by_itself(tmp_path: Path) -> None:
    code = f"""
import os, signal, sys
from pathlib import Path
from raydistill.results.deliver import start_delivery
from raydistill.results.record import RunRecord
from raydistill.results.record_lines import require_start
record = RunRecord(Path({str(tmp_path)!r}) / "runs" / "a")
record.start(name="a", config={{}}, provenance={{}}, seed=0)
handle = start_delivery(record.path.parent, {default_uri(tmp_path)!r}, "raydistill")
print(handle.process.pid, flush=True)
record.step(0, {{"m": 1.0}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    pid = int(done.stdout)
    _wait_for(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    (run,) = list_runs(default_uri(tmp_path))
    assert run.status == "killed"
    assert history(default_uri(tmp_path), run.id, "m") == [(0, 1.0)]


def test_the_password_of_a_store_is_on_no_command_line_and_in_no_file(tmp_path: Path) -> None:
    record = started(tmp_path, "a")
    handle = start_delivery(record.path.parent, "http://me:hunter2@127.0.0.1:9", EXPERIMENT)
    try:
        _wait_for(lambda: handle.problem is not None)
        assert not any("hunter2" in part for part in psutil.Process(handle.process.pid).cmdline())
        for file in record.path.parent.iterdir():
            assert b"hunter2" not in file.read_bytes(), file.name
    finally:
        handle.finish(0.5)


def test_the_page_answers_on_this_machine_and_ctrl_c_ends_all_its_processes(tmp_path: Path) -> None:
    record = started(tmp_path, "a")
    record.end("finished")
    assert deliver(record.path.parent, default_uri(tmp_path), EXPERIMENT)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = "import sys; from raydistill.report.listing import results_command; sys.exit(results_command(sys.argv[1:]))"
    page = subprocess.Popen(
        [sys.executable, "-c", code, "--output", str(tmp_path), "--ui", "--port", str(port)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(lambda: _answers(f"http://127.0.0.1:{port}/health"))
        family = psutil.Process(page.pid).children(recursive=True)
        assert family
        listening = [c for one in family for c in one.net_connections("inet") if c.status == psutil.CONN_LISTEN]
        assert {c.laddr.ip for c in listening} == {"127.0.0.1"}
        page.send_signal(signal.SIGINT)
        assert page.wait(120) == 0
        _, alive = psutil.wait_procs(family, timeout=10)
        assert alive == []
    finally:
        if page.poll() is None:
            page.terminate()
            page.wait(120)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def _wait_for(condition, timeout_s: float = WAIT_S) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.2)


def _files(output: Path) -> list[Path]:
    return [path for path in (output / "artifacts").rglob("*") if path.is_file()]
