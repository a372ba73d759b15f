"""Delivery: nothing twice, nothing lost, whatever store, driver or record do. The store is a fake; MLflow is tested
in tests/engine."""

import errno
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_store import FakeStore, StoreDownError
from filelock import FileLock

from raydistill.messages import EvalReport, Span
from raydistill.results import courier
from raydistill.results.deliver import DeliveryHandle, deliver, main
from raydistill.results.delivery import STATE_FILE, Delivery, read_state
from raydistill.results.record import RunRecord
from raydistill.results.store import default_uri, sqlite_path
from raydistill.results.translate import MAX_PARAM_CHARACTERS, Parcel, clean_key, flatten


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("POLL_S", "FIRST_PAUSE_S", "LONGEST_PAUSE_S"):
        monkeypatch.setattr(courier, name, 0.01)


def started(folder: Path, num_steps: int = 3) -> RunRecord:
    record = RunRecord(folder)
    record.start(name="demo", config={"trainer": {"num_steps": 3}}, provenance={"git": None}, seed=7)
    for step in range(num_steps):
        record.step(step, {"m": float(step)})
    return record


def deliver_to(store: FakeStore, folder: Path, **more: object) -> bool:
    return deliver(folder, "fake://", "e", open_store=store.open, **{"give_up_s": 0.1, **more})  # type: ignore[arg-type]


def test_a_finished_run_arrives_whole(tmp_path: Path, store: FakeStore) -> None:
    record = started(tmp_path)
    record.end("finished")
    assert deliver_to(store, tmp_path, follow=True)
    run = store.runs["run0"]
    assert store.steps("run0") == [0, 1, 2]
    assert run["status"] == "FINISHED"
    assert run["name"] == "demo"
    assert run["params"] == {"trainer.num_steps": "3"}
    assert run["tags"]["seed"] == "7"
    assert run["files"] == {"record": tmp_path / "record.jsonl"}


def test_a_second_delivery_continues_where_the_first_stopped(tmp_path: Path, store: FakeStore) -> None:
    record = started(tmp_path)
    assert deliver_to(store, tmp_path)
    offset = read_state(tmp_path).offset
    assert offset == record.path.stat().st_size
    record.step(3, {"m": 3.0})
    assert deliver_to(store, tmp_path)
    assert store.steps("run0") == [0, 1, 2, 3]
    assert len(store.runs) == 1
    assert read_state(tmp_path).num_points == 4


@pytest.mark.parametrize("when", ["fail_before", "fail_after"])
def test_a_store_that_fails_once_gets_everything_once(tmp_path: Path, store: FakeStore, when: str) -> None:
    record = started(tmp_path)
    record.end("finished")
    setattr(store, when, [StoreDownError("connection refused"), StoreDownError("connection refused")])
    assert deliver_to(store, tmp_path, follow=True, give_up_s=10)
    assert store.steps("run0") == [0, 1, 2]
    assert len(store.runs) == 1
    assert store.num_openings == 3, "a failing store is opened anew"
    assert read_state(tmp_path).problem is None


def test_a_store_that_stays_down_leaves_the_record_and_says_why(
    tmp_path: Path, store: FakeStore, capsys: pytest.CaptureFixture[str]
) -> None:
    started(tmp_path).end("finished")

    def down() -> FakeStore:
        raise StoreDownError("no route to postgresql://me:hunter2@db")

    assert not deliver(tmp_path, "fake://", "e", open_store=down, give_up_s=0.05)
    problem, printed = read_state(tmp_path).problem, capsys.readouterr().err
    assert problem is not None
    assert "no route" in problem
    assert "hunter2" not in problem + printed
    assert printed.count("no route") == 1, "said once, not at every attempt"
    assert "python -m raydistill.results.deliver" in printed
    assert deliver_to(store, tmp_path)
    assert store.steps("run0") == [0, 1, 2]
    assert read_state(tmp_path).problem is None


class FullDisk:
    """Takes neither the file that says how far a delivery came nor a line of its log, so many times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
        self.left, self._replace = times, os.replace
        monkeypatch.setattr(os, "replace", self.replace)
        monkeypatch.setattr(sys, "stderr", self)

    def _fails(self) -> None:
        if self.left:
            self.left -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def replace(self, one: Path, other: Path) -> None:
        self._fails()
        self._replace(one, other)

    def write(self, text: str) -> int:
        self._fails()
        return len(text)

    def flush(self) -> None:
        self._fails()


def test_a_full_disk_delays_a_delivery_and_does_not_end_it(
    tmp_path: Path, store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    started(tmp_path).end("finished")
    disk = FullDisk(monkeypatch, times=9)
    store.fail_before = [StoreDownError("connection refused")]
    assert deliver_to(store, tmp_path, follow=True, give_up_s=10)
    assert disk.left == 0
    assert store.steps("run0") == [0, 1, 2]
    assert len(store.runs) == 1
    assert read_state(tmp_path).problem is None
    assert read_state(tmp_path).num_points == 3


def test_a_disk_that_takes_no_lock_yet_delays_a_delivery(
    tmp_path: Path, store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    started(tmp_path).end("finished")
    disk = FullDisk(monkeypatch, times=3)

    class Lock(FileLock):
        def acquire(self, *arguments: Any, **more: Any) -> Any:
            disk._fails()
            return super().acquire(*arguments, **more)

    monkeypatch.setattr(courier, "FileLock", Lock)
    assert deliver_to(store, tmp_path, follow=True)
    assert store.steps("run0") == [0, 1, 2]
    disk.left = 3
    assert not deliver_to(store, tmp_path), "asked for once, and not done"


def test_a_delivery_that_ended_without_a_word_says_where_to_look(tmp_path: Path) -> None:
    process: Any = SimpleNamespace(poll=lambda: 1)
    handle = DeliveryHandle(tmp_path, process)
    assert handle.problem == f"its process ended with exit code 1, see {tmp_path / 'delivery.log'}"
    handle.is_late = True
    assert handle.problem == "not all was there in time"
    process.poll = lambda: None
    assert DeliveryHandle(tmp_path, process).problem is None


def test_a_run_that_had_ended_when_it_was_delivered_stays_as_it_ended(tmp_path: Path, store: FakeStore) -> None:
    """As a resumed sweep's process finds its finished trials, whose writer is gone."""
    started(tmp_path).end("finished")
    assert deliver_to(store, tmp_path, follow=True)
    writer_gone = threading.Event()
    writer_gone.set()
    assert deliver_to(store, tmp_path, follow=True, writer_gone=writer_gone)
    assert store.runs["run0"]["status"] == "FINISHED"
    assert Delivery(tmp_path, read_state(tmp_path).store, store.open).advance(), "else following it never ends"


def test_an_end_that_the_store_took_before_it_failed_is_still_the_end(tmp_path: Path, store: FakeStore) -> None:
    record = RunRecord(tmp_path)
    record.start(name="n", config={}, provenance={}, seed=0, parent="of-nobody")
    record.end("finished")
    links: list[Exception] = [StoreDownError("down")]
    original = store.link

    def link(run_id: str, parent: str) -> bool:
        if links:
            raise links.pop()
        return original(run_id, parent)

    store.link = link  # type: ignore[method-assign]
    delivery = Delivery(tmp_path, "d", store.open)
    with pytest.raises(StoreDownError):
        delivery.advance()
    delivery.failed(StoreDownError("down"))
    assert delivery.advance()


def test_lines_after_an_end_open_the_run_again(tmp_path: Path, store: FakeStore) -> None:
    record = started(tmp_path, num_steps=1)
    record.end("finished")
    delivery = Delivery(tmp_path, "d", store.open)
    assert delivery.advance()
    record.step(1, {f"m{i}": 1.0 for i in range(1000)})  # a whole batch: no line is left for the last one
    assert not delivery.advance()


def test_a_lost_state_file_delivers_nothing_twice(tmp_path: Path, store: FakeStore) -> None:
    started(tmp_path)
    deliver_to(store, tmp_path)
    (tmp_path / STATE_FILE).write_text("{ torn")
    deliver_to(store, tmp_path)
    assert len(store.runs) == 1
    assert sum(store.points["run0"].values()) == 3


def test_another_store_gets_everything_from_the_beginning(tmp_path: Path, store: FakeStore) -> None:
    started(tmp_path)
    deliver_to(store, tmp_path)
    other = FakeStore()
    assert deliver(tmp_path, "other://", "e", open_store=other.open)
    assert other.steps("run0") == [0, 1, 2]


def test_a_store_that_was_wiped_is_filled_again(tmp_path: Path, store: FakeStore) -> None:
    started(tmp_path)
    deliver_to(store, tmp_path)
    wiped = FakeStore()
    assert deliver_to(wiped, tmp_path)
    assert wiped.steps("run0") == [0, 1, 2]


def test_a_record_cut_below_what_was_delivered_replaces_the_run(tmp_path: Path, store: FakeStore) -> None:
    record = started(tmp_path)
    delivery = Delivery(tmp_path, "d", store.open)
    assert not delivery.advance()
    record.cut_back(1)
    record.step(1, {"m": 10.0})
    record.end("finished")
    assert delivery.advance()
    assert store.deleted == ["run0"]
    assert sorted((s, v) for _, s, v, _ in store.points["run1"]) == [(0, 0.0), (1, 10.0)]
    assert store.runs["run1"]["status"] == "FINISHED"


def test_a_record_cut_above_what_was_delivered_goes_on(tmp_path: Path, store: FakeStore) -> None:
    record = started(tmp_path, num_steps=2)
    deliver_to(store, tmp_path)
    record.step(2, {"m": 2.0})
    record.cut_back(2)
    record.step(2, {"m": 20.0})
    deliver_to(store, tmp_path)
    assert store.deleted == []
    assert len(store.runs) == 1
    assert sorted((s, v) for _, s, v, _ in store.points["run0"]) == [(0, 0.0), (1, 1.0), (2, 20.0)]


def test_a_line_that_the_store_refuses_costs_that_line_only(tmp_path: Path, store: FakeStore) -> None:
    record = started(tmp_path)
    record.step(3, {"bad": 1.0})
    record.step(4, {"m": 4.0})
    store.refused_metric = "bad"
    assert deliver_to(store, tmp_path)
    assert store.steps("run0") == [0, 1, 2, 4]


def test_a_torn_last_line_waits_for_its_end(tmp_path: Path, store: FakeStore) -> None:
    record = started(tmp_path)
    raw = b'{"kind":"step","time_s":1.0,"step":3,"metrics":{"m":3.0}}\n'
    delivery = Delivery(tmp_path, "d", store.open)
    with record.path.open("ab") as file:
        file.write(raw[:20])
        file.flush()
        delivery.advance()
        assert store.steps("run0") == [0, 1, 2]
        file.write(raw[20:])
    delivery.advance()
    assert store.steps("run0") == [0, 1, 2, 3]


def test_following_takes_lines_as_they_come_and_a_dead_driver_marks_the_run_killed(
    tmp_path: Path, store: FakeStore
) -> None:
    writer_gone = threading.Event()
    results: list[bool] = []
    worker = threading.Thread(
        target=lambda: results.append(deliver_to(store, tmp_path, follow=True, writer_gone=writer_gone))
    )
    worker.start()
    record = started(tmp_path, num_steps=50)
    writer_gone.set()
    worker.join(10)
    assert results == [True]
    assert store.steps("run0") == list(range(50))
    assert store.runs["run0"]["status"] == "KILLED"
    record.cut_back(50)
    deliver_to(store, tmp_path)
    assert store.runs["run0"]["status"] == "RUNNING"
    assert len(store.runs) == 1


def test_many_points_go_in_pieces_and_the_place_moves_with_each(tmp_path: Path, store: FakeStore) -> None:
    record = RunRecord(tmp_path)
    record.start(name="n", config={}, provenance={}, seed=0)
    for step in range(5):
        record.step(step, {f"m{i}": 1.0 for i in range(600)})
    store.fail_before = []
    original, calls = store.put, []

    def put(run_id: str, parcel: Parcel, end_ms: int | None = None) -> None:
        calls.append(len(parcel.points))
        if len(calls) == 2:
            raise StoreDownError("down")
        original(run_id, parcel, end_ms)

    store.put = put  # type: ignore[method-assign]
    delivery = Delivery(tmp_path, "d", store.open)
    with pytest.raises(StoreDownError):
        delivery.advance()
    assert 0 < delivery.state.offset < record.path.stat().st_size
    delivery.failed(StoreDownError("down"))
    delivery.advance()
    assert calls == [1200, 1200, 1200, 600]
    assert sum(store.points["run0"].values()) == 3000


def test_a_record_without_file_yet_is_waited_for(tmp_path: Path, store: FakeStore) -> None:
    assert not Delivery(tmp_path, "d", store.open).advance()


def test_an_unknown_kind_of_line_is_left_out() -> None:
    parcel = Parcel()
    parcel.add({"kind": "of a later version", "time_s": 1.0})
    assert parcel == Parcel()


def test_lines_become_points_tags_and_files(tmp_path: Path) -> None:
    (tmp_path / "plot.png").write_bytes(b"")
    record = RunRecord(tmp_path)
    record.start(
        name="n",
        config={"results": {"tags": {"owner": "me"}}},
        provenance={"git": {"revision": "abc", "is_dirty": True}},
        seed=0,
        data_fingerprint="f",
    )
    record.evaluation(
        EvalReport(
            version=5,
            metrics={"evaluate/kl_nats": 0.5},
            span=Span(stage="evaluate", actor="e", step=5, start_s=0, end_s=1),
        )
    )
    record.table("summary", [{"a": 1}], "| a |")
    record.artifact("plot", tmp_path / "plot.png")
    record.artifact("checkpoint", tmp_path)
    record.warning("w1")
    record.warning("w2")
    record.end("failed", "it broke")
    from raydistill.results.record import read_record

    parcel = Parcel()
    for line in read_record(tmp_path):
        parcel.add(line)
    assert [(p.key, p.value, p.step) for p in parcel.points] == [("evaluate/kl_nats", 0.5, 5)]
    assert parcel.tags["owner"] == "me"
    assert parcel.tags["mlflow.source.git.commit"] == "abc"
    assert parcel.tags["data_fingerprint"] == "f"
    assert parcel.tags["end_message"] == "it broke"
    assert parcel.files == {"plot": tmp_path / "plot.png"}
    assert parcel.tags["path.checkpoint"] == str(tmp_path)
    assert set(parcel.texts) == {"tables/summary.json", "tables/summary.md"}
    assert parcel.status == "FAILED"
    assert parcel.num_warnings == 2
    assert parcel.tags["last_warning"] == "w2"


def test_flatten_and_clean_key_give_what_mlflow_takes() -> None:
    tree = {"a": {"b": 1, "c": None, "d": {}}, "e": ["x"], "f": "y" * 10_000, "g": True}
    flat = flatten(tree)
    assert flat["a.b"] == "1"
    assert flat["a.c"] == ""
    assert flat["a.d"] == "{}"
    assert flat["e"] == '["x"]'
    assert len(flat["f"]) == MAX_PARAM_CHARACTERS
    assert flat["g"] == "true"
    assert clean_key("sync/rollout#0/gap") == "sync/rollout_0/gap"
    assert clean_key("/../x//y/") == "_/x/y"
    assert clean_key("") == "_"
    assert len(clean_key("k" * 300)) == 250


def test_default_uri_is_an_absolute_sqlite_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    uri = default_uri(Path("outputs"))
    assert uri == f"sqlite:///{tmp_path}/outputs/results.db"
    assert sqlite_path(uri) == tmp_path / "outputs/results.db"
    assert sqlite_path("http://host:5000") is None


def test_the_command_line_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "holds no record.jsonl" in capsys.readouterr().err
    with RunRecord(tmp_path) as record:
        uri = "postgresql://me:pw@db/x"
        record.start(name="n", config={"results": {"uri": uri}}, provenance={}, seed=0)
    assert main([str(tmp_path)]) == 2
    assert "--uri" in capsys.readouterr().err
