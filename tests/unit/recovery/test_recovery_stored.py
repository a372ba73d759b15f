"""Checkpoints in `run.storage`: there with their description or not at all; the newest whole one comes back."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from raydistill.errors import RunError, StorageError
from raydistill.messages import StudentWeights
from raydistill.recovery.bring import bring_folder, newest_of_both, put_folder
from raydistill.recovery.checkpoint import checkpoint_folder, damage, digests, load_checkpoint, save_checkpoint
from raydistill.recovery.keeper import CheckpointKeeper
from raydistill.recovery.ledger import ledger_path
from raydistill.recovery.resume import find_checkpoint
from raydistill.recovery.run_storage import RunStorage
from raydistill.recovery.sampled import SampledTokens
from raydistill.recovery.storage import Storage
from raydistill.recovery.stored import StoredCheckpoints, make_whole

KL = "evaluate/kl_nats"


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    return Storage(f"file://{tmp_path}/remote/runs/a")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "here" / "checkpoints"


def save(root: Path, version: int, value: float = 0.0, **facts: object) -> Path:
    tensors = {"q.lora_A": np.full((2, 4), version + value, np.float32)}
    return save_checkpoint(root, StudentWeights(version=version, tensors=tensors, probe=None), facts)


def save_with_ledger(root: Path, version: int) -> Path:
    """Two ranks, ten bytes of ledger for each version."""
    sizes, digests = [], []
    for rank in range(2):
        path = ledger_path(root.parent, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([48 + rank]) * 10 * version)
        sizes.append(10 * version)
        digests.append(hashlib.sha256(path.read_bytes()).hexdigest())
    return save(root, version, ledger_bytes=sizes, ledger_sha256=digests)


def remote_file(tmp_path: Path, version: int, name: str) -> Path:
    return checkpoint_folder(tmp_path / "remote" / "runs" / "a" / "checkpoints", version) / name


def test_a_checkpoint_comes_back_whole_on_an_empty_disk(root: Path, run: Storage, tmp_path: Path) -> None:
    StoredCheckpoints(run).put(save(root, 7))
    assert StoredCheckpoints(run).versions() == {7}
    elsewhere = tmp_path / "other" / "checkpoints"
    assert StoredCheckpoints(run).bring(elsewhere, 7) is None
    assert load_checkpoint(checkpoint_folder(elsewhere, 7)).tensors["q.lora_A"][0, 0] == 7
    left = sorted(path.name for path in elsewhere.iterdir() if path.name != ".fetching.lock")
    assert left == ["step-000007"]


def test_an_upload_that_was_torn_is_not_there(root: Path, run: Storage) -> None:
    """The description goes last: without it nothing counts, and a version that is brought anew is gone until then."""
    folder, stored = save(root, 3), StoredCheckpoints(run)
    stored.put_files(folder, ["weights.safetensors"])
    assert stored.versions() == set()
    assert stored.bring(root, 3) == "it is not there"
    stored.commit(folder)
    assert stored.versions() == {3}
    stored.withdraw(3)
    assert stored.versions() == set()


def test_removing_leaves_nothing(root: Path, run: Storage) -> None:
    stored = StoredCheckpoints(run)
    stored.put(save(root, 3))
    stored.remove(3)
    assert run.list() == {}
    stored.remove(3)


@pytest.mark.parametrize("harm", ["cut", "missing", "torn description"])
def test_the_one_before_a_damaged_one_is_used(root: Path, run: Storage, tmp_path: Path, harm: str) -> None:
    for version in (2, 4):
        StoredCheckpoints(run).put(save(root, version))
    weights, description = (remote_file(tmp_path, 4, name) for name in ("weights.safetensors", "checkpoint.json"))
    if harm == "missing":
        weights.unlink()
    elif harm == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    else:
        description.write_text("{")
    elsewhere = tmp_path / "other" / "checkpoints"
    folder, (complaint,) = newest_of_both(elsewhere.parent, run)
    assert folder == checkpoint_folder(elsewhere, 2)
    assert damage(folder) is None
    assert "step-000004" in complaint and run.url in complaint and "the one before it is used" in complaint


def test_a_damaged_copy_there_does_not_count_where_the_disk_has_a_whole_one(
    root: Path, run: Storage, tmp_path: Path
) -> None:
    StoredCheckpoints(run).put(save(root, 4))
    remote_file(tmp_path, 4, "weights.safetensors").write_bytes(b"")
    remote_file(tmp_path, 4, "checkpoint.json").write_text("{")
    assert newest_of_both(root.parent, run) == (checkpoint_folder(root, 4), [])
    assert StoredCheckpoints(run).bring(tmp_path / "other", 4) is None  # it was mended


def test_the_disk_is_ahead_where_the_storage_was_away(root: Path, run: Storage) -> None:
    StoredCheckpoints(run).put(save(root, 2))
    newest = save(root, 4)
    assert newest_of_both(root.parent, run) == (newest, [])
    assert StoredCheckpoints(run).versions() == {2, 4}


def test_a_version_whose_ledger_is_nowhere_is_none(root: Path, run: Storage, tmp_path: Path) -> None:
    """A rank that outlives its run for a moment may write one into a folder that was removed under it."""
    for version in (2, 4):
        folder = save_with_ledger(root, version)
    assert newest_of_both(root.parent, run) == (folder, [])
    assert {name: size for name, size in run.list().items() if name.startswith("ledger")} == {
        "ledger/rank-0.jsonl": 40,
        "ledger/rank-1.jsonl": 40,
    }, "with the version, for ranks on other disks"
    save_with_ledger(root, 6)
    shutil.rmtree(root.parent / "ledger")
    found, (complaint,) = newest_of_both(root.parent, run)
    assert found == checkpoint_folder(root, 4)
    assert "step-000006" in complaint and "ledger/rank-0.jsonl is not the ledger that it knows" in complaint
    assert StoredCheckpoints(run).versions() == {4}


def test_without_a_storage_a_ledger_that_is_too_short_is_found_too(root: Path) -> None:
    for version in (2, 4):
        save_with_ledger(root, version)
    path = ledger_path(root.parent, 1)
    path.write_bytes(path.read_bytes()[:-1])
    point = find_checkpoint(root.parent)
    assert point.version == 2
    assert "rank-1.jsonl" in point.complaints[0]
    path.unlink()
    assert find_checkpoint(root.parent).folder is None


def test_a_lost_trainer_goes_on_from_the_disk_while_the_storage_is_away(
    root: Path, run: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = save(root, 4)

    def away(self: Storage, below: str = "") -> dict[str, int]:
        raise StorageError("run.storage='...' does not answer")

    monkeypatch.setattr(Storage, "list", away)
    assert newest_of_both(root.parent, run) == (newest, ["run.storage='...' does not answer"])


def away(*_: object, **__: object) -> None:
    raise StorageError("run.storage='...' does not answer")


@pytest.mark.parametrize("method", ["read", "get"])
@pytest.mark.parametrize("harm", [None, "cut", "ledger"])
def test_a_storage_that_goes_away_in_the_midst_leaves_what_the_disk_has(
    root: Path, run: Storage, monkeypatch: pytest.MonkeyPatch, harm: str | None, method: str
) -> None:
    """It has listed its versions, and then does not give them; the newest one never was on this disk."""
    for version in (2, 4, 6):
        StoredCheckpoints(run).put(save_with_ledger(root, version))
    put_folder(root.parent / "ledger", run.below("ledger"))
    shutil.rmtree(checkpoint_folder(root, 6))
    if harm == "cut":
        (checkpoint_folder(root, 4) / "weights.safetensors").write_bytes(b"")
    elif harm == "ledger":
        ledger_path(root.parent, 1).write_bytes(b"1" * 30)
    monkeypatch.setattr(Storage, method, away)
    found, (complaint, *further) = newest_of_both(root.parent, run)
    assert found == checkpoint_folder(root, 2 if harm else 4)
    assert complaint == "run.storage='...' does not answer"
    assert [("step-000004" in line, "is damaged" in line) for line in further] == ([(True, True)] if harm else [])


def test_a_ledger_that_cannot_be_asked_for_leaves_the_version_before_it(
    root: Path, run: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both versions are on this disk alone, the newer one's ledger is not."""
    for version in (2, 4):
        save_with_ledger(root, version)
    ledger_path(root.parent, 1).write_bytes(b"1" * 30)
    monkeypatch.setattr(Storage, "read", away)
    found, complaints = newest_of_both(root.parent, run)
    assert found == checkpoint_folder(root, 2)
    assert len(complaints) == 2


def test_a_storage_that_goes_away_with_all_there_is_ends_the_run(
    root: Path, run: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    StoredCheckpoints(run).put(save(root, 4))
    (checkpoint_folder(root, 4) / "weights.safetensors").unlink()
    monkeypatch.setattr(Storage, "get", away)
    with pytest.raises(StorageError, match="does not answer"):
        newest_of_both(root.parent, run)


def test_a_version_of_another_life_gives_way_to_the_one_there(root: Path, run: Storage) -> None:
    StoredCheckpoints(run).put(save(root, 4, value=0.25))
    folder = save(root, 4, value=0.5)
    make_whole(folder, run)
    assert load_checkpoint(folder).tensors["q.lora_A"][0, 0] == 4.25


def test_part_of_a_checkpoint_becomes_whole_before_it_is_read(root: Path, run: Storage) -> None:
    """As on a node whose ranks wrote their own files only."""
    folder = save(root, 4)
    StoredCheckpoints(run).put(folder)
    (folder / "weights.safetensors").unlink()
    make_whole(folder, run)
    assert damage(folder) is None


def test_a_checkpoint_that_is_nowhere_whole_is_a_run_error(root: Path, run: Storage) -> None:
    folder = save(root, 4)
    make_whole(folder, run)  # not there, but whole here
    (folder / "weights.safetensors").unlink()
    with pytest.raises(RunError, match="does not lie whole on this node"):
        make_whole(folder, run)


def test_an_export_arrives_as_it_was_written(tmp_path: Path) -> None:
    there, export = Storage(f"file://{tmp_path}/remote/export"), tmp_path / "node" / "export"
    export.mkdir(parents=True)
    (export / "weights").write_bytes(b"new")
    there.write(b"of an earlier life", "shard-2")
    put_folder(export, there)
    here = tmp_path / "driver" / "export"
    here.mkdir(parents=True)
    (here / "weights").write_bytes(b"old")
    bring_folder(here, there, digests(export))
    assert digests(here) == digests(export)
    assert there.list() == {"weights": 3}
    with pytest.raises(StorageError, match="is not what was written"):
        bring_folder(here, there, {"weights": [3, "another"]})
    with pytest.raises(StorageError, match="has no config"):
        bring_folder(here, there, {"config": [3, "another"]})


def test_newest_and_best_stay_on_each_side(root: Path, run: Storage) -> None:
    """Versions 6 and 8 did not get there: what the storage has newest stays, although the disk has newer ones."""
    storage = RunStorage(root.parent, run)
    keeper = CheckpointKeeper(root, storage=storage)
    for version, kl in ((0, 0.9), (2, 0.5), (4, 0.7), (6, 0.1), (8, 0.6)):
        folder = save(root, version)
        if version < 6:
            StoredCheckpoints(run).put(folder)
            storage.took([version])
        keeper.evaluated(version, {KL: kl})
    assert storage.mirror.finish(20) == []
    assert StoredCheckpoints(run).versions() == {2, 4}
    assert {int(path.name[5:]) for path in root.glob("step-*")} == {2, 4, 6, 8}
    assert keeper.best_version == 6
    assert json.loads(run.read("checkpoints/best.json") or b"")["version"] == 6
    assert storage.settle(20, {6, 8}) == []
    assert StoredCheckpoints(run).versions() == {2, 4, 6, 8}


def test_a_driver_without_the_ranks_disk_knows_the_best_by_the_storage(
    root: Path, run: Storage, tmp_path: Path
) -> None:
    storage = RunStorage(root.parent, run)
    keeper = CheckpointKeeper(root, storage=storage)
    for version, kl in ((0, 0.9), (2, 0.5), (4, 0.7)):
        StoredCheckpoints(run).put(save(tmp_path / "node", version))
        keeper.evaluated(version, {KL: kl})  # the evaluation may be faster than the outcome
        storage.took([version])
        keeper.remove_the_rest()
    assert storage.mirror.finish(20) == []
    assert keeper.best_version == 2
    assert StoredCheckpoints(run).versions() == {2, 4}
    assert json.loads((root / "best.json").read_text())["version"] == 2


def test_what_does_not_get_there_is_named(
    root: Path, run: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raydistill.recovery import storage as storage_module

    monkeypatch.setattr(storage_module, "PAUSES_S", ())
    (tmp_path / "remote").write_text("a file where a folder should be")
    storage = RunStorage(root.parent, run)
    save(root, 4)
    (root.parent / "record.jsonl").write_text("{}\n")
    left = storage.settle(1, {4})
    assert left == ["record.jsonl", "checkpoints/step-000004"]
    line = storage.what_is_left(left)
    assert "record.jsonl" in line and run.url in line and "\n" not in line
    assert storage.push_command.endswith(f"push here --output {tmp_path.parent} --storage file://{tmp_path}/remote")


def test_kept_tokens_are_forgotten_there_too(run: Storage) -> None:
    for step in (3, 4, 12):
        run.write(b"npz", f"sampled/step-{step:06d}-rank-0.npz")
    SampledTokens.forget_stored(run, 4)
    assert sorted(run.list()) == ["sampled/step-000004-rank-0.npz", "sampled/step-000012-rank-0.npz"]
