"""One process at a time drives a run in `run.storage`: others are refused while it lives, and go on soon after it died."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from test_recovery_elsewhere import DATA, config_of, live

from raydistill.errors import UserError
from raydistill.recovery import lease
from raydistill.recovery.bring import set_aside
from raydistill.recovery.lease import Driver, held, living_driver
from raydistill.recovery.resume import run_folder
from raydistill.recovery.storage import Storage

ELSEWHERE = Driver(host="far-away/1/2", pid=77, started_s=1.0)


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.05)
    monkeypatch.setattr(lease, "WATCH_S", 0.5)


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    return Storage(f"file://{tmp_path}/remote/runs/a")


def lease_file(tmp_path: Path, run: str = "a") -> Path:
    return tmp_path / "remote" / "drivers" / "runs" / f"{run}.json"


def write(path: Path, driver: Driver, age_s: float = 0.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".partial")
    unfinished.write_text(json.dumps({**asdict(driver), "time_s": time.time() - age_s}))
    unfinished.replace(path)


@contextmanager
def driven_elsewhere(path: Path) -> Iterator[None]:
    """Another machine renews its lease all the time."""
    is_over = threading.Event()

    def renew() -> None:
        while not is_over.wait(0.02):
            write(path, ELSEWHERE)

    write(path, ELSEWHERE)
    thread = threading.Thread(target=renew)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def test_a_run_that_another_machine_drives_is_refused(run: Storage, tmp_path: Path) -> None:
    with (
        driven_elsewhere(lease_file(tmp_path)),
        pytest.raises(UserError, match=r"process 77 on far-away drives it; wait for it, stop it, or choose another"),
        held(run),
    ):
        raise AssertionError("entered")
    assert json.loads(lease_file(tmp_path).read_text())["token"] == ELSEWHERE.token, "its own is left alone"


def test_a_driver_that_no_longer_renews_is_waited_for_and_followed(run: Storage, tmp_path: Path) -> None:
    write(lease_file(tmp_path), ELSEWHERE)
    said: list[str] = []
    with held(run, said.append):
        assert json.loads(lease_file(tmp_path).read_text())["pid"] == os.getpid()
    assert len(said) == 1 and "waiting up to" in said[0]
    assert not lease_file(tmp_path).exists()


def test_a_run_that_was_stopped_gives_its_object_back_in_what_time_is_left(
    run: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []
    with held(run, limit=lambda wanted_s: min(wanted_s, 0.7)):
        monkeypatch.setattr(lease, "_read", lambda run, limit_s=lease.WATCH_S: limits.append(limit_s))
    assert limits[-1] == 0.7


def test_one_that_died_on_this_machine_or_long_ago_is_not_waited_for(run: Storage, tmp_path: Path) -> None:
    said: list[str] = []
    died = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    )
    for driver, age_s in ((replace(Driver.here(), pid=int(died.stdout)), 0.0), (ELSEWHERE, 700.0)):
        write(lease_file(tmp_path), driver, age_s)
        assert living_driver(run, said.append) is None
    assert said == []


def test_a_living_process_of_this_machine_is_a_driver(run: Storage, tmp_path: Path) -> None:
    script = f"""
import time
from raydistill.recovery import lease
from raydistill.recovery.storage import Storage
lease.RENEW_S = 0.05
with lease.held(Storage({run.url!r})):
    print("held", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        found = living_driver(run)
        process.kill()
        process.wait()
    assert found is not None
    assert found.pid == process.pid
    assert living_driver(run) is None, "killed, and known to be dead at once"


def test_who_finds_another_driver_beside_itself_says_so_once(run: Storage, tmp_path: Path) -> None:
    said: list[str] = []
    with held(run, said.append):
        write(lease_file(tmp_path), ELSEWHERE)
        deadline = time.monotonic() + 10
        while not said and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
    assert len(said) == 1 and "drives" in said[0] and "as well" in said[0]
    assert lease_file(tmp_path).exists(), "it is the other one's"


def test_a_driven_run_is_neither_set_aside_nor_gone_on_with(tmp_path: Path) -> None:
    """The second machine gives the same command: with a name it is refused at the run itself, without one it starts a run of
    its own."""
    url, said = f"file://{tmp_path}/remote", list[str]()
    first, second = (config_of(tmp_path / disk, url) for disk in ("one", "two"))
    folder = run_folder(first, DATA)
    live(folder, first)
    stored = Storage(url).below("runs", folder.name)
    with held(stored):
        assert run_folder(second, DATA).name == folder.name, "this process drives it, no other one"
    third = config_of(tmp_path / "three", url)
    with driven_elsewhere(lease_file(tmp_path, folder.name)):
        assert run_folder(third, DATA).name != folder.name
        changed = third.model_copy(update={"trainer": third.trainer.model_copy(update={"num_steps": 7})})
        run_folder(changed, DATA, said.append)
        assert said == [], "it is no unfinished run that waits for anybody"
        with pytest.raises(UserError, match="drives it"):
            set_aside(stored)
    assert run_folder(third, DATA).name == folder.name


def test_a_machine_without_proc_has_a_name_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_proc(_: str) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(lease.os, "readlink", no_proc)
    assert Driver.here().is_this_process
