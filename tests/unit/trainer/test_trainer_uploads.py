"""Ranks on one disk or on several write one checkpoint, bring it to the storage, and get it back whole on empty disks.

The ranks are threads here: each sees its own node's folder, and what they tell each other goes through a barrier.
"""

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raydistill.errors import RunError
from raydistill.messages import StudentWeights
from raydistill.recovery import storage as storage_module
from raydistill.recovery.checkpoint import checkpoint_folder, damage, load_checkpoint
from raydistill.recovery.ledger import Ledger, ledger_path
from raydistill.recovery.storage import Storage
from raydistill.recovery.stored import StoredCheckpoints
from raydistill.trainer import save, uploads
from raydistill.trainer.save import load_rank, save_rank
from raydistill.trainer.uploads import RankUploads

NUM_RANKS = 3


class Engine:
    """Writes and reads what DeepSpeed would."""

    def __init__(self, rank: int) -> None:
        self.rank, self.loaded = rank, ""

    def save_state(self, folder: Path) -> None:
        (folder / "state" / f"optimizer-{self.rank}").write_text(f"of rank {self.rank}")

    def load_state(self, folder: Path) -> None:
        self.loaded = "".join((folder / "state" / f"optimizer-{rank}").read_text() for rank in range(NUM_RANKS))


class Ranks:
    """Calls a function as each rank, in a thread of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._barrier, self._local = threading.Barrier(NUM_RANKS, timeout=20), threading.local()
        self._facts: list[Any] = [None] * NUM_RANKS
        for module in (save, uploads):
            monkeypatch.setattr(module, "from_all", self._from_all)
            monkeypatch.setattr(module, "from_first", lambda fact: self._from_all(fact)[0])

    def _from_all(self, fact: Any) -> Sequence[Any]:
        self._facts[self._local.rank] = fact
        self._barrier.wait()
        facts = list(self._facts)
        self._barrier.wait()
        return facts

    def __call__(self, work: Callable[[int], Any]) -> list[Any]:
        def as_rank(rank: int) -> Any:
            self._local.rank = rank
            try:
                return work(rank)
            except BaseException:
                self._barrier.abort()  # the others' calls end too, as when a process dies
                raise

        self._barrier.reset()
        with ThreadPoolExecutor(NUM_RANKS) as pool:
            futures = [pool.submit(as_rank, rank) for rank in range(NUM_RANKS)]
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in errors:
            if not isinstance(error.__cause__ or error, threading.BrokenBarrierError):
                raise error
        return [future.result() for future in futures]


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    monkeypatch.setattr(storage_module, "PAUSES_S", ())
    return Ranks(monkeypatch)


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    return Storage(f"file://{tmp_path}/remote/runs/a")


class Trainer:
    """The part of a worker that saves, for all ranks; `disks[rank]` is the run's folder as that rank's node sees it."""

    def __init__(self, ranks: Ranks, disks: Sequence[Path], run: Storage | None) -> None:
        self.ranks, self.disks, self.run = ranks, disks, run
        self.ledgers = [Ledger(disk, rank) for rank, disk in enumerate(disks)]
        self.uploads = [RankUploads(disk, rank, run, limit_s=30) for rank, disk in enumerate(disks) if run is not None]

    def save(self, version: int) -> list[Any]:
        def work(rank: int) -> Any:
            self.ledgers[rank]._file.write(b"line\n")
            self.ledgers[rank]._digest.update(b"line\n")
            tensors = {"q.lora_A": np.full((2, 4), version, np.float32)}
            weights = StudentWeights(version=version, tensors=tensors, probe=None) if rank == 0 else None
            root, engine = self.disks[rank] / "checkpoints", Engine(rank)
            save_rank(
                root,
                version,
                rank,
                engine,
                self.ledgers[rank],
                weights,
                {"skipped_steps": 0},
                self.run is not None,  # type: ignore[arg-type]
            )
            return self.uploads[rank].bring(version) if self.run is not None else None

        return self.ranks(work)

    def load(self, version: int) -> list[Any]:
        def work(rank: int) -> str:
            engine, folder = Engine(rank), checkpoint_folder(self.disks[rank] / "checkpoints", version)
            self.ledgers[rank] = load_rank(folder, self.disks[rank], rank, engine, self.run)  # type: ignore[arg-type]
            return engine.loaded

        return self.ranks(work)


def layouts(tmp_path: Path) -> dict[str, list[Path]]:
    return {
        "one shared disk": [tmp_path / "shared" / "a"] * NUM_RANKS,
        "a disk for each": [tmp_path / f"node-{rank}" / "a" for rank in range(NUM_RANKS)],
        "two nodes": [tmp_path / "node-0" / "a", tmp_path / "node-1" / "a", tmp_path / "node-1" / "a"],
    }


LAYOUTS = ("one shared disk", "a disk for each", "two nodes")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_is_whole_in_the_storage_and_comes_back_on_empty_disks(
    ranks: Ranks, run: Storage, tmp_path: Path, layout: str
) -> None:
    trainer = Trainer(ranks, layouts(tmp_path)[layout], run)
    assert trainer.save(2) == [((2,), None)] * NUM_RANKS
    files = set(json.loads(StoredCheckpoints(run).description(2) or b"")["files"])
    assert files == {
        "weights.safetensors",
        *(f"optimizer/state/optimizer-{rank}" for rank in range(NUM_RANKS)),
        *(f"random-{rank}.safetensors" for rank in range(NUM_RANKS)),
    }
    assert {name for name in run.list() if name.startswith("ledger")} == {f"ledger/rank-{r}.jsonl" for r in range(3)}
    empty = [tmp_path / "empty" / disk.relative_to(tmp_path) for disk in trainer.disks]
    again = Trainer(ranks, empty, run)
    assert again.load(2) == ["of rank 0of rank 1of rank 2"] * NUM_RANKS
    for rank, disk in enumerate(empty):
        assert damage(checkpoint_folder(disk / "checkpoints", 2)) is None
        assert ledger_path(disk, rank).read_bytes() == b"line\n"
    assert load_checkpoint(checkpoint_folder(empty[1] / "checkpoints", 2)).tensors["q.lora_A"][0, 0] == 2


def test_what_an_earlier_life_left_on_a_disk_is_not_taken(ranks: Ranks, run: Storage, tmp_path: Path) -> None:
    disks = layouts(tmp_path)["a disk for each"]
    trainer = Trainer(ranks, disks, run)
    left_over = disks[1] / "checkpoints" / ".writing-step-000002"
    left_over.mkdir(parents=True)
    (left_over / "random-0.safetensors").write_bytes(b"of an attempt that died")
    assert trainer.save(2)[0] == ((2,), None)
    assert not left_over.exists()
    (checkpoint_folder(disks[2] / "checkpoints", 2) / "checkpoint.json").write_text("{}")  # and of another version
    assert trainer.load(2)[2] == "of rank 0of rank 1of rank 2"


def test_without_storage_separate_disks_are_refused_with_a_way_out(ranks: Ranks, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"do not see one another's files .* set run.storage"):
        Trainer(ranks, layouts(tmp_path)["two nodes"], None).save(2)
    trainer = Trainer(ranks, layouts(tmp_path)["one shared disk"], None)
    trainer.save(2)
    assert damage(checkpoint_folder(trainer.disks[0] / "checkpoints", 2)) is None
    assert trainer.load(2)[1] == "of rank 0of rank 1of rank 2"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_version_that_the_storage_did_not_take_goes_with_the_next(
    ranks: Ranks, run: Storage, tmp_path: Path, layout: str
) -> None:
    trainer = Trainer(ranks, layouts(tmp_path)[layout], run)
    (tmp_path / "remote").write_text("a file where a folder should be: the storage is away")
    for taken, problem in trainer.save(2):
        assert taken == ()
        assert "run.storage='file://" in problem
    assert all(uploads.waits for uploads in trainer.uploads)
    assert all(checkpoint_folder(disk / "checkpoints", 2).exists() for disk in trainer.disks)
    (tmp_path / "remote").unlink()
    assert trainer.save(4) == [((2, 4), None)] * NUM_RANKS
    assert StoredCheckpoints(run).versions() == {2, 4}
    assert not any(uploads.waits for uploads in trainer.uploads)
    empty = Trainer(ranks, [tmp_path / "empty" / disk.relative_to(tmp_path) for disk in trainer.disks], run)
    assert empty.load(2) == ["of rank 0of rank 1of rank 2"] * NUM_RANKS


def test_the_description_is_absent_if_one_node_cannot_bring_its_part(
    ranks: Ranks, run: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = Storage.put

    def put(self: Storage, path: Path, name: str) -> None:
        if path.name == "optimizer-2":
            raise storage_module.StorageError("run.storage='...' does not answer")
        usual(self, path, name)

    monkeypatch.setattr(Storage, "put", put)
    trainer = Trainer(ranks, layouts(tmp_path)["a disk for each"], run)
    assert trainer.save(2) == [((), "run.storage='...' does not answer")] * NUM_RANKS
    assert StoredCheckpoints(run).versions() == set()


def test_other_disks_follow_what_is_removed_in_the_storage(ranks: Ranks, run: Storage, tmp_path: Path) -> None:
    trainer = Trainer(ranks, layouts(tmp_path)["two nodes"], run)
    trainer.save(2)
    trainer.save(4)
    StoredCheckpoints(run).remove(2)  # by the driver's keeper
    trainer.save(6)
    left = [sorted(path.name for path in (disk / "checkpoints").glob("step-*")) for disk in trainer.disks]
    assert left == [["step-000004", "step-000006"]] * NUM_RANKS
