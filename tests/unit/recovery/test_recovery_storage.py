"""`run.storage`: what goes there comes back, an object is whole or absent, and every failure is one clear line."""

import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from s3 import BUCKET, S3, s3_server

from raydistill.errors import StorageError, UserError
from raydistill.recovery import storage as storage_module
from raydistill.recovery.mirror import Mirror
from raydistill.recovery.storage import Storage


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with s3_server() as server:
        yield server


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "PAUSES_S", (0.0, 0.0))


@pytest.fixture(params=["file", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty folder in each kind of storage."""
    if request.param == "s3":
        request.getfixturevalue("server")
        return Storage(f"s3://{BUCKET}/{uuid.uuid4().hex}")
    return Storage(f"file://{tmp_path}/remote" if request.param == "file" else f"memory://{uuid.uuid4().hex}")


def test_what_was_put_comes_back(place: Storage, tmp_path: Path) -> None:
    assert place.list() == {}
    assert place.read("a/b.bin") is None
    assert not place.get("a/b.bin", tmp_path / "new" / "b.bin")
    (tmp_path / "b.bin").write_bytes(b"\0" * 1000)
    place.put(tmp_path / "b.bin", "a/b.bin")
    place.write(b"text", "c.txt")
    assert place.list() == {"a/b.bin": 1000, "c.txt": 4}
    assert place.list("a") == {"a/b.bin": 1000}
    assert place.read("c.txt") == b"text"
    assert place.read("c.txt", end=2) == b"te"
    assert place.get("a/b.bin", tmp_path / "new" / "b.bin", 1000)
    assert (tmp_path / "new" / "b.bin").read_bytes() == b"\0" * 1000
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["b.bin"]


def test_an_object_is_replaced_removed_and_moved(place: Storage) -> None:
    run = place.below("runs", "x")
    run.write(b"1", "record.jsonl")
    run.write(b"22", "record.jsonl")
    run.write(b"3", "checkpoints/step-000001/w")
    assert run.read("record.jsonl") == b"22"
    run.move_to(place.below("runs", "y"))
    assert place.list() == {"runs/y/record.jsonl": 2, "runs/y/checkpoints/step-000001/w": 1}
    place.below("runs", "y").remove_folder("checkpoints")
    place.remove("runs/y/record.jsonl")
    place.remove("runs/y/record.jsonl")  # gone already
    place.remove_folder("runs/y/nothing")
    assert place.list() == {}


def test_the_check_leaves_nothing_behind(place: Storage) -> None:
    place.check()
    assert place.list() == {}


def test_a_file_system_never_shows_half_an_upload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.local import LocalFileSystem

    def half(self: Any, path: str, value: bytes, **_: Any) -> None:
        Path(path).write_bytes(value[:2])
        raise ValueError("no more")

    place = Storage(f"file://{tmp_path}/remote")
    place.write(b"old content", "x")
    monkeypatch.setattr(LocalFileSystem, "pipe_file", half)
    with pytest.raises(StorageError, match="no more"):
        place.write(b"new content", "x")
    assert place.list() == {"x": 11}
    assert place.read("x") == b"old content"


def test_a_bucket_that_does_not_exist_is_named(server: S3) -> None:
    with pytest.raises(StorageError, match=r"run.storage='s3://nobody-made-this/x' does not exist; create the bucket"):
        Storage("s3://nobody-made-this/x").check()


def test_a_server_that_is_away_is_an_error_and_answers_again_when_it_is_back(server: S3, impatient: None) -> None:
    place = Storage(f"s3://{BUCKET}/{uuid.uuid4().hex}")
    place.write(b"1", "x")
    server.stop()
    try:
        with pytest.raises(StorageError, match=r"run.storage='s3://.*does not answer") as down:
            place.write(b"2", "x")
        assert "\n" not in str(down.value)
    finally:
        server.start()
    assert place.read("x") == b"1"
    place.write(b"2", "x")
    assert place.read("x") == b"2"


def test_missing_credentials_are_said(server: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    with pytest.raises(StorageError, match="finds no credentials on this node; set AWS_ACCESS_KEY_ID"):
        Storage(f"s3://{BUCKET}/no-credentials").check()


@pytest.mark.parametrize(
    ("url", "way_out"),
    [
        ("nope://bucket/x", "cannot be opened"),
        ("gs://bucket/x", "`pip install gcsfs`"),
        ("abfs://c/x", "`pip install adlfs`"),
    ],
)
def test_a_scheme_without_its_package_is_the_users_to_mend(url: str, way_out: str) -> None:
    if url.startswith(("gs", "abfs")):
        try:
            __import__("gcsfs" if url.startswith("gs") else "adlfs")
            pytest.skip("its package is installed here")
        except ImportError:
            pass
    with pytest.raises(UserError, match=r"run.storage=") as wrong:
        Storage(url).check()
    assert way_out in str(wrong.value)


def failing(times: int, error: Exception) -> Any:
    """A file system whose first calls fail."""

    class Failing:
        calls = 0

        def cat_file(self, path: str, end: int | None = None) -> bytes:
            self.calls += 1
            if self.calls <= times:
                raise error
            return b"found"

    return Failing()


def with_system(monkeypatch: pytest.MonkeyPatch, system: Any) -> Storage:
    monkeypatch.setattr(storage_module, "_open", lambda url: (system, "root"))
    return Storage("s3://bucket/x")


def test_what_may_pass_is_tried_three_times(monkeypatch: pytest.MonkeyPatch, impatient: None) -> None:
    assert with_system(monkeypatch, failing(2, OSError("slow down"))).read("x") == b"found"
    with pytest.raises(StorageError, match="failed: slow down"):
        with_system(monkeypatch, failing(3, OSError("slow down"))).read("x")


def test_no_password_of_the_url_is_shown(monkeypatch: pytest.MonkeyPatch, impatient: None) -> None:
    system = failing(9, PermissionError("sftp://me:hunter2@host says no"))
    monkeypatch.setattr(storage_module, "_open", lambda url: (system, "root"))
    place = Storage("sftp://me:hunter2@host/place").below("runs", "a")
    with pytest.raises(StorageError) as wrong:
        place.read("x")
    assert "hunter2" not in str(wrong.value) and "sftp://***@host/place/runs/a" in str(wrong.value)
    assert f"{place}" == "sftp://***@host/place/runs/a"


def test_a_refusal_is_not_tried_again(monkeypatch: pytest.MonkeyPatch, impatient: None) -> None:
    system = failing(9, PermissionError("Forbidden"))
    with pytest.raises(StorageError, match=r"refuses access \(Forbidden\)"):
        with_system(monkeypatch, system).read("x")
    assert system.calls == 1


def test_a_call_that_hangs_is_left_behind(monkeypatch: pytest.MonkeyPatch, impatient: None) -> None:
    import threading

    never = threading.Event()

    class Hanging:
        def cat_file(self, path: str, end: int | None = None) -> bytes:
            never.wait()
            return b""

    with pytest.raises(StorageError, match="does not answer"):
        with_system(monkeypatch, Hanging()).within(0.05).read("x")
    never.set()


def wait_until_idle(mirror: Mirror) -> None:
    with mirror._changed:
        assert mirror._changed.wait_for(lambda: not mirror._jobs and not mirror._at_work, 10)


def test_a_mirror_brings_the_newest_content(tmp_path: Path) -> None:
    place, folder = Storage(f"file://{tmp_path}/remote"), tmp_path / "here"
    (folder / "deep").mkdir(parents=True)
    mirror = Mirror(folder, place)
    for number in range(5):
        (folder / "record.jsonl").write_text(str(number))
        mirror.push("record.jsonl")
    (folder / "deep" / "a").write_text("a")
    (folder / "run.lock").touch()
    mirror.push_tree()
    mirror.push("gone")
    assert mirror.finish(10) == []
    assert place.read("record.jsonl") == b"4"
    assert sorted(place.list()) == ["deep/a", "record.jsonl"]
    place.remove("deep/a")
    mirror.push_tree()
    assert mirror.finish(10) == []
    assert sorted(place.list()) == ["record.jsonl"]  # what has not changed does not go again


def test_a_storage_that_hangs_holds_up_the_end_of_a_mirror_no_longer_than_it_may(tmp_path: Path) -> None:
    """However many things wait for it: a run that was stopped has seconds."""
    mirror, hangs = Mirror(tmp_path, Storage(f"file://{tmp_path}/remote")), threading.Event()

    def job(storage: Storage) -> None:
        left_s = None if storage.deadline is None else max(storage.deadline - time.monotonic(), 0.0)
        hangs.wait(left_s)
        raise StorageError("does not answer")

    for key in "abcde":
        mirror.do(key, job)
    start = time.monotonic()
    assert mirror.finish(0.5) == list("abcde")
    assert time.monotonic() - start < 2.0
    hangs.set()


def test_a_mirror_tells_once_that_the_storage_is_away_and_brings_all_when_it_is_back(
    tmp_path: Path, impatient: None
) -> None:
    place, folder = Storage(f"file://{tmp_path}/remote"), tmp_path / "here"
    folder.mkdir()
    for name in "ab":
        (folder / name).write_text(name)
    mirror = Mirror(folder, place)
    (tmp_path / "remote").write_text("a file where a folder should be")
    mirror.push("a")
    wait_until_idle(mirror)
    assert "failed" in (mirror.new_problem() or "")
    assert mirror.new_problem() is None
    assert mirror.finish(0.1) == ["a"]
    mirror.push("a")
    mirror.push("b")
    wait_until_idle(mirror)
    assert mirror.new_problem() is None  # of the same outage
    (tmp_path / "remote").unlink()
    assert mirror.finish(30) == []
    assert sorted(place.list()) == ["a", "b"]
