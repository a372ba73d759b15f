"""Many records on their way: parents before children, one lock for each run, runs that appear, sinks beside the store."""

import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_store import FakeStore, StoreDownError
from filelock import FileLock

from raydistill.config import ResultsSection
from raydistill.errors import UserError
from raydistill.results import courier, sinks
from raydistill.results.courier import LOCK_FILE
from raydistill.results.deliver import deliver, deliver_all, destination_in_record, main
from raydistill.results.delivery import read_state
from raydistill.results.record import RunRecord
from raydistill.results.record_lines import start_of
from raydistill.results.run_folders import LOCK, is_at_work, record_folders, run_folders
from raydistill.results.sinks import SINKS, Sink, check_results
from raydistill.results.store import PARENT_TAG, ResultsStore, default_uri
from raydistill.results.translate import Parcel


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("POLL_S", "FIRST_PAUSE_S", "LONGEST_PAUSE_S"):
        monkeypatch.setattr(courier, name, 0.01)
    monkeypatch.setattr(courier, "_PATIENCE_S", 0.1)


def started(folder: Path, parent: str | None = None, **results: Any) -> RunRecord:
    record = RunRecord(folder)
    record.start(name=folder.name, config={"results": results}, provenance={}, seed=0, parent=parent)
    return record


def finished(folder: Path, num_steps: int = 2, **more: Any) -> str:
    """The record id of a run that has ended."""
    with started(folder, **more) as record:
        for step in range(num_steps):
            record.step(step, {"m": float(step)})
        record.end("finished")
    return record_id(folder)


def record_id(folder: Path) -> str:
    start = start_of(folder)
    assert start is not None
    return str(start["record_id"])


def names(store: FakeStore) -> list[str]:
    return [str(run["name"]) for run in store.runs.values()]


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.01)


def test_run_folders_are_found_in_runs_and_in_an_output_folder_but_not_among_artifacts(tmp_path: Path) -> None:
    finished(tmp_path / "runs" / "b")
    finished(tmp_path / "runs" / "a")
    finished(tmp_path / "artifacts" / "0" / "artifacts")
    assert [folder.name for folder in run_folders(tmp_path)] == ["a", "b"]
    assert run_folders(tmp_path) == run_folders(tmp_path / "runs")
    assert run_folders(tmp_path / "nowhere") == []
    finished(tmp_path / "sweeps" / "rates")
    assert [folder.name for folder in run_folders(tmp_path)] == ["a", "b"], "a sweep is no run"
    assert [folder.name for folder in record_folders(tmp_path)] == ["a", "b", "rates"]


def test_all_of_an_output_folder_is_its_runs_and_its_sweeps(tmp_path: Path) -> None:
    sweep = finished(tmp_path / "sweeps" / "rates")
    finished(tmp_path / "runs" / "rates-000", parent=sweep)
    store = FakeStore()
    assert deliver_all(tmp_path, "fake://", open_store=lambda _: store)
    assert names(store) == ["rates", "rates-000"]
    assert [run.get("parent") for run in store.runs.values()] == [None, "run0"]


def test_every_run_below_a_folder_is_delivered_once_and_parents_come_first(tmp_path: Path) -> None:
    sweep = finished(tmp_path / "z-sweep")
    for name in ("a", "b"):
        finished(tmp_path / name, parent=sweep)
    store, openings = FakeStore(), []
    assert deliver_all(tmp_path, "fake://", open_store=lambda to: openings.append(to.uri) or store)  # type: ignore[func-returns-value]
    assert names(store) == ["z-sweep", "a", "b"]
    assert [run.get("parent") for run in store.runs.values()] == [None, "run0", "run0"]
    assert openings == ["fake://"], "one opening for all of them"
    assert deliver_all(tmp_path, "fake://", open_store=lambda _: store)
    assert [sum(points.values()) for points in store.points.values()] == [2, 2, 2]


def test_runs_are_taken_up_as_they_appear_and_those_left_open_were_killed(tmp_path: Path) -> None:
    store, gone, results = FakeStore(), threading.Event(), []
    worker = threading.Thread(
        target=lambda: results.append(
            deliver_all(tmp_path, "fake://", follow=True, writer_gone=gone, open_store=lambda _: store)
        )
    )
    worker.start()
    finished(tmp_path / "a")
    wait_for(lambda: names(store) == ["a"])
    open_record = started(tmp_path / "b")
    wait_for(lambda: names(store) == ["a", "b"])
    open_record.step(0, {"m": 0.0})
    wait_for(lambda: store.steps("run1") == [0])
    gone.set()
    worker.join(20)
    assert results == [True]
    assert [run["status"] for run in store.runs.values()] == ["FINISHED", "KILLED"]


def test_a_run_that_goes_on_after_its_end_is_taken_up_again(tmp_path: Path) -> None:
    store, gone = FakeStore(), threading.Event()
    finished(tmp_path / "a", num_steps=4)
    worker = threading.Thread(
        target=lambda: deliver_all(tmp_path, "fake://", follow=True, writer_gone=gone, open_store=lambda _: store)
    )
    worker.start()
    wait_for(lambda: (tmp_path / "a" / "delivered.json").exists() and store.runs["run0"]["status"] == "FINISHED")
    with RunRecord(tmp_path / "a") as record:
        record.cut_back(2)
        record.step(2, {"m": 20.0})
        record.end("finished")
    wait_for(lambda: store.runs.get("run1", {}).get("status") == "FINISHED")
    assert store.deleted == ["run0"]
    gone.set()
    worker.join(20)
    assert sorted((s, v) for _, s, v, _ in store.points["run1"]) == [(0, 0.0), (1, 1.0), (2, 20.0)]


def test_a_run_at_work_in_another_process_is_not_called_killed(tmp_path: Path) -> None:
    store, gone = FakeStore(), threading.Event()
    gone.set()
    started(tmp_path / "a")
    with FileLock(tmp_path / "a" / LOCK):
        assert is_at_work(tmp_path / "a")
        assert not deliver(
            tmp_path / "a", "fake://", "e", True, open_store=lambda: store, writer_gone=gone, give_up_s=0.05
        )
    assert store.runs["run0"]["status"] is None
    assert deliver(tmp_path / "a", "fake://", "e", True, open_store=lambda: store, writer_gone=gone)
    assert store.runs["run0"]["status"] == "KILLED"


def test_a_run_that_another_process_delivers_is_left_to_it_among_many_and_waited_for_alone(tmp_path: Path) -> None:
    store = FakeStore()
    finished(tmp_path / "a")
    finished(tmp_path / "b")
    with FileLock(tmp_path / "a" / LOCK_FILE):
        assert deliver_all(tmp_path, "fake://", open_store=lambda _: store)
        assert not deliver(tmp_path / "a", "fake://", "e", open_store=lambda: store, give_up_s=0.02)
    assert names(store) == ["b"]


def test_a_child_whose_parent_comes_later_is_delivered_at_once_and_linked_then(tmp_path: Path) -> None:
    store = FakeStore()
    with started(tmp_path / "sweep") as sweep:
        finished(tmp_path / "trial", parent=record_id(tmp_path / "sweep"))
        assert not deliver(tmp_path / "trial", "fake://", "e", True, open_store=lambda: store, give_up_s=0.05)
        assert store.steps("run0") == [0, 1]
        assert store.runs["run0"]["parent"] is None
        assert read_state(tmp_path / "trial").waits_for == record_id(tmp_path / "sweep")
        sweep.end("finished")
    assert deliver_all(tmp_path, "fake://", open_store=lambda _: store)
    assert names(store) == ["trial", "sweep"]
    assert store.runs["run0"]["parent"] == "run1"
    assert read_state(tmp_path / "trial").waits_for is None


def sweep_with_a_trial(output: Path, store: FakeStore) -> RunRecord:
    """A sweep that was delivered (run0) with its only trial (run1), and was then cut back, as its resume does."""
    with started(output / "sweep") as sweep:
        sweep.table("trials", [])
        sweep.end("interrupted")
    finished(output / "trial", parent=record_id(output / "sweep"))
    assert deliver_all(output, "fake://", open_store=lambda _: store)
    assert store.runs["run1"]["parent"] == "run0"
    sweep = RunRecord(output / "sweep")
    sweep.cut_back(0)
    return sweep


def test_a_resumed_sweep_keeps_the_trials_that_were_delivered_before(tmp_path: Path) -> None:
    store = FakeStore()
    sweep_with_a_trial(tmp_path, store).end("finished")
    assert deliver_all(tmp_path, "fake://", open_store=lambda _: store)
    assert store.deleted == ["run0"]
    assert store.runs["run1"]["parent"] == "run2"
    assert store.runs["run2"]["name"] == "sweep"
    assert read_state(tmp_path / "sweep").replaced == []


def test_trials_find_their_resumed_sweep_also_if_the_store_went_down_meanwhile(tmp_path: Path) -> None:
    store = FakeStore()
    sweep = sweep_with_a_trial(tmp_path, store)
    down = [StoreDownError("down")] * 1000
    store.fail_before = down.copy()
    assert not deliver(tmp_path / "sweep", "fake://", "raydistill", open_store=lambda: store, give_up_s=0.05)
    assert store.deleted == ["run0"]
    sweep.table("trials", [])
    store.fail_before, store.fail_adopting = [], down.copy()
    assert not deliver(tmp_path / "sweep", "fake://", "raydistill", open_store=lambda: store, give_up_s=0.05)
    sweep.cut_back(0)  # once more, before anybody could be told
    store.fail_adopting = []
    assert deliver(tmp_path / "sweep", "fake://", "raydistill", open_store=lambda: store)
    assert store.deleted == ["run0", "run2"]
    assert store.runs["run1"]["parent"] == "run3"


def test_the_store_moves_runs_to_another_parent_page_by_page() -> None:
    parents = {f"trial{n}": "old" for n in range(5)} | {"other": "else"}

    class Client:
        def search_runs(self, experiments: list[str], text: str) -> list[Any]:
            below = [one for one, parent in parents.items() if text == f"tags.`{PARENT_TAG}` = '{parent}'"]
            return [SimpleNamespace(info=SimpleNamespace(run_id=one)) for one in below[:2]]

        def set_tag(self, run_id: str, key: str, value: str) -> None:
            assert key == PARENT_TAG
            parents[run_id] = value

    store: Any = ResultsStore.__new__(ResultsStore)
    store.client, store.experiment_id = Client(), "0"
    store.adopt("new", "old")
    assert parents == {f"trial{n}": "new" for n in range(5)} | {"other": "else"}


def test_one_run_that_cannot_be_delivered_holds_up_no_other(tmp_path: Path) -> None:
    store = FakeStore()
    finished(tmp_path / "a")
    with (tmp_path / "a" / "record.jsonl").open("ab") as file:
        file.write(b"{ not json }\n")
    finished(tmp_path / "b")
    assert not deliver_all(tmp_path, "fake://", open_store=lambda _: store, give_up_s=0.05)
    assert names(store) == ["b"]
    assert store.runs["run0"]["status"] == "FINISHED"


def test_a_record_says_where_it_goes_and_only_the_password_is_taken_from_outside(tmp_path: Path) -> None:
    secret = "postgresql://me:pw@db/x"
    finished(tmp_path / "plain" / "runs" / "a", sinks=["tensorboard"])
    finished(tmp_path / "b", uri=secret, experiment="mine")
    plain, named = (
        destination_in_record(tmp_path / "plain" / "runs" / "a"),
        destination_in_record(tmp_path / "b", secret),
    )
    assert plain is not None
    assert named is not None
    assert (plain.uri, plain.experiment, plain.sinks) == (
        default_uri(tmp_path / "plain"),
        "raydistill",
        ("tensorboard",),
    )
    assert (named.uri, named.experiment) == (secret, "mine")
    with pytest.raises(ValueError, match="--uri"):
        destination_in_record(tmp_path / "b", "postgresql://me:pw@elsewhere/x")
    assert destination_in_record(tmp_path / "no-run") is None


def test_the_command_line_wants_one_run_or_a_folder_of_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main([str(tmp_path), "--under", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("--under") == 2


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    """Every scalar in the event files of a folder, read without TensorBoard: records are length, crc, data, crc."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events.out.tfevents*")):
        raw, place = path.read_bytes(), 0
        while place < len(raw):
            (length,) = struct.unpack_from("<Q", raw, place)
            event = Event.FromString(raw[place + 12 : place + 12 + length])
            place += 12 + length + 4
            found += [
                (value.tag, event.step, value.simple_value)
                for value in event.summary.value
                if value.HasField("simple_value")
            ]
    return sorted(found)


def test_tensorboard_holds_every_point_once_after_restarts_and_cuts(tmp_path: Path) -> None:
    def to_both() -> bool:
        return deliver(tmp_path, "fake://", "e", sinks=["tensorboard"], open_store=lambda: store)

    store = FakeStore()
    record = started(tmp_path)
    record.step(0, {"trainer/loss": 0.5})
    assert to_both()
    record.step(1, {"trainer/loss": 0.25})
    record.warning("careful")
    record.samples(1, [{"row_id": "r", "prompt": "p", "reference": "q", "teacher": "q", "student": "s"}])
    assert to_both()
    assert scalars(tmp_path / "tensorboard") == [("trainer/loss", 0, 0.5), ("trainer/loss", 1, 0.25)]
    record.cut_back(1)
    record.step(1, {"trainer/loss": 0.125})
    record.end("finished")
    assert to_both()
    wanted = [("trainer/loss", 0, 0.5), ("trainer/loss", 1, 0.125)]
    assert scalars(tmp_path / "tensorboard") == wanted
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "tensorboard").iterdir()}
    assert to_both()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "tensorboard").iterdir()} == files
    assert scalars(tmp_path / "tensorboard") == wanted


def test_a_sink_that_fails_does_not_hold_up_the_store_and_gets_everything_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(sinks.TensorBoard):
        attempts = 0

        def write(self, parcel: Parcel) -> None:
            Broken.attempts += 1
            if Broken.attempts < 3:
                raise StoreDownError("disk quota")
            super().write(parcel)

    monkeypatch.setattr(sinks, "SINKS", {**SINKS, "tensorboard": Broken})
    store = FakeStore()
    finished(tmp_path)
    assert deliver(tmp_path, "fake://", "e", sinks=["tensorboard"], open_store=lambda: store, give_up_s=10)
    assert Broken.attempts == 3
    assert store.runs["run0"]["status"] == "FINISHED"
    assert scalars(tmp_path / "tensorboard") == [("m", 0, 0.0), ("m", 1, 1.0)]
    assert capsys.readouterr().err.count("tensorboard does not answer") == 1


def test_sinks_are_those_of_the_config() -> None:
    assert ResultsSection(sinks=tuple(SINKS)).sinks == tuple(SINKS)  # type: ignore[arg-type]
    assert all(issubclass(sink, Sink) for sink in SINKS.values())
    assert check_results(ResultsSection(sinks=("tensorboard",))) == "go to results.db under run.output, tensorboard"


def test_a_sink_that_is_not_installed_is_one_line_that_names_the_pip_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="pip install wandb") as raised:
        check_results(ResultsSection(sinks=("wandb",)))
    assert "\n" not in str(raised.value)
