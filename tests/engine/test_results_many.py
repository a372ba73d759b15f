"""One delivery process for the runs of a sweep, on real MLflow stores: SQLite, and PostgreSQL where it is installed.

Writers and the deliverer are killed in the middle of their work, and the server is stopped: every point arrives once.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from postgres import PASSWORD, Postgres, binaries, postgres

from raydistill.report.listing import results_command
from raydistill.results.deliver import deliver, main, start_delivery
from raydistill.results.query import list_runs
from raydistill.results.record import RunRecord, read_record
from raydistill.results.record_lines import start_of
from raydistill.results.store import PARENT_TAG, ResultsStore, default_uri

pytestmark = pytest.mark.engine

EXPERIMENT = "raydistill"
NUM_WRITERS, NUM_STEPS = 8, 60
WRITER = """
import sys, time
from pathlib import Path
from raydistill.results.record import RunRecord
folder, parent, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
record = RunRecord(folder)
record.start(name=folder.name, config={"trainer": {"num_steps": steps}}, provenance={}, seed=0, parent=parent)
for step in range(steps):
    record.step(step, {"m": float(step), "n": -float(step)})
    while step == steps // 2 and not (folder.parents[1] / "go-on").exists():
        time.sleep(0.05)
    time.sleep(0.02)
record.end("finished")
"""
"""Waits in the middle of its steps, so that what is to happen by then does, however slow the machine is."""


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    programs = binaries()
    if programs is None:
        pytest.skip("no PostgreSQL server here: apt-get install postgresql")
    pytest.importorskip("psycopg", reason="no driver: pip install 'psycopg[binary]'")
    with postgres(programs) as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return default_uri(tmp_path)
    address: str = request.getfixturevalue("server").uri
    return address


def write(folder: Path, parent: str, num_steps: int = NUM_STEPS) -> "subprocess.Popen[bytes]":
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen([sys.executable, "-c", WRITER, str(folder), parent, str(num_steps)], env=environment)


def wait_for(condition: Callable[[], Any], timeout_s: float = 300) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.1)


def steps_in(folder: Path) -> list[int]:
    return [line["step"] for line in read_record(folder) if line["kind"] == "step"]


def history(uri: str, experiment: str, run_id: str, key: str) -> list[tuple[int, float]]:
    """Every point that the store holds, as often as it holds it."""
    points = ResultsStore(uri, experiment).client.get_metric_history(run_id, key)
    return sorted((point.step, point.value) for point in points)


def test_eight_writers_and_a_deliverer_killed_on_the_way_lose_and_double_nothing(tmp_path: Path, uri: str) -> None:
    runs = tmp_path / "runs"
    sweep = RunRecord(runs / "sweep")
    sweep.start(name="sweep", config={}, provenance={}, seed=0)
    start = start_of(runs / "sweep")
    assert start is not None
    folders = [runs / f"trial-{k}" for k in range(NUM_WRITERS)]
    first = start_delivery(runs, uri, EXPERIMENT, under=True)
    writers = [write(folder, start["record_id"]) for folder in folders]
    wait_for(lambda: all(len(steps_in(folder)) > 10 for folder in folders))
    wait_for(lambda: (folders[0] / "delivered.json").exists())
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    os.kill(writers[3].pid, signal.SIGKILL)
    (tmp_path / "go-on").touch()
    second = start_delivery(runs, uri, EXPERIMENT, under=True)
    assert [writer.wait(600) for writer in writers] == [0, 0, 0, -signal.SIGKILL, 0, 0, 0, 0]
    sweep.end("finished")
    assert second.finish(120), (runs / "delivery.log").read_text()
    assert second.problem is None

    found = {run.name: run for run in list_runs(uri, EXPERIMENT)}
    assert sorted(found) == sorted([*(folder.name for folder in folders), "sweep"]), "each record is one run"
    assert 10 < len(steps_in(folders[3])) < NUM_STEPS
    client = ResultsStore(uri, EXPERIMENT).client
    for place, folder in enumerate(folders):
        run, steps = found[folder.name], steps_in(folder)
        assert run.status == ("killed" if place == 3 else "finished")
        assert history(uri, EXPERIMENT, run.id, "m") == [(step, float(step)) for step in steps]
        assert history(uri, EXPERIMENT, run.id, "n") == [(step, -float(step)) for step in steps]
        assert client.get_run(run.id).data.tags[PARENT_TAG] == found["sweep"].id
        assert run.parent == "sweep"
        assert run.folder == folder


def test_a_server_that_is_stopped_and_started_again_gets_every_point_once(tmp_path: Path, server: Postgres) -> None:
    experiment = "stopped-and-started"
    record = RunRecord(tmp_path / "runs" / "a")
    config = {"results": {"uri": server.uri, "experiment": experiment}}
    record.start(name="a", config=config, provenance={}, seed=0)
    handle = start_delivery(record.path.parent, server.uri, experiment)
    for step in range(5):
        record.step(step, {"m": float(step)})
    wait_for(lambda: (record.path.parent / "delivered.json").exists() and handle.problem is None)
    server.stop()
    try:
        for step in range(5, 10):
            record.step(step, {"m": float(step)})
        wait_for(lambda: handle.problem is not None)
        assert PASSWORD not in str(handle.problem)
    finally:
        server.start()
    record.step(10, {"m": 10.0})
    wait_for(lambda: handle.problem is None)
    server.stop()
    try:
        record.step(11, {"m": 11.0})
        record.end("finished")
        begin = time.monotonic()
        assert not handle.finish(3)
        assert time.monotonic() - begin < 30, "a run does not wait long for its store"
    finally:
        server.start()
    assert main([str(record.path.parent)]) == 2, "the record does not keep the password"
    assert main([str(record.path.parent), "--uri", server.uri]) == 0
    (run,) = list_runs(server.uri, experiment)
    assert run.status == "finished"
    assert history(server.uri, experiment, run.id, "m") == [(step, float(step)) for step in range(12)]
    for file in record.path.parent.iterdir():
        assert PASSWORD.encode() not in file.read_bytes(), file.name


def test_files_of_a_plain_database_lie_beside_the_runs_and_show_finds_a_record_there(
    tmp_path: Path, server: Postgres, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    with RunRecord(tmp_path / "runs" / "b") as record:
        record.start(name="b", config={}, provenance={}, seed=0)
        record.step(0, {"m": 1.0})
        record.end("failed", "out of luck")
    assert deliver(tmp_path / "runs" / "b", server.uri, "files")
    assert list((tmp_path / "artifacts").rglob("record.jsonl"))
    assert list(elsewhere.iterdir()) == []
    (tmp_path / "runs" / "b").rename(tmp_path / "runs" / "gone")
    assert results_command(["show", "b", "--uri", server.uri, "--experiment", "files"]) == 0
    assert "out of luck" in capsys.readouterr().out
