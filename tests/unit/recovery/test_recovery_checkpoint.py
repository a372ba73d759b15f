"""A checkpoint folder is whole or absent, damage is recognised, and best, last and waiting ones are kept."""

import errno
import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raydistill.errors import RunError
from raydistill.messages import StudentWeights
from raydistill.quant.hashing import hash_tensors
from raydistill.recovery import checkpoint
from raydistill.recovery.checkpoint import (
    checkpoint_folder,
    damage,
    load_checkpoint,
    newest_checkpoint,
    partial_folder,
    read_description,
    remove_checkpoint,
    save_checkpoint,
    writing,
)
from raydistill.recovery.keeper import CheckpointKeeper, read_best

KL = "evaluate/kl_nats"
GLOO = "[/__w/pytorch/third_party/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1"


def weights(version: int, size: int = 8) -> StudentWeights:
    tensors = {
        "q_proj.lora_A": np.full((2, size), version + 0.5, np.float32),
        "q_proj.lora_B": np.eye(3, dtype=np.float32),
    }
    return StudentWeights(version=version, tensors=tensors, probe=None)


def save(root: Path, version: int, **description: object) -> Path:
    return save_checkpoint(root, weights(version), description)


def versions(root: Path) -> list[int]:
    return sorted(int(folder.name.removeprefix("step-")) for folder in root.glob("step-*"))


@contextmanager
def file_size_limit(size_bytes: int) -> Iterator[None]:
    """The kernel refuses to write longer files, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    folder = save(tmp_path, 150, codes_hash="abc")
    assert folder == tmp_path / "step-000150" == checkpoint_folder(tmp_path, 150)
    loaded = load_checkpoint(folder)
    assert loaded.version == 150
    assert loaded.probe is None
    assert hash_tensors(loaded.tensors) == hash_tensors(weights(150).tensors)
    description = read_description(folder)
    assert list(description.pop("files")) == ["weights.safetensors"]
    assert description == {"version": 150, "codes_hash": "abc"}
    assert damage(folder) is None


def test_saving_a_version_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 3, codes_hash="old")
    save(tmp_path, 3, codes_hash="new")
    assert read_description(checkpoint_folder(tmp_path, 3))["codes_hash"] == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]


@pytest.mark.parametrize("broken_call", ["save_file", "json.dumps", "os.rename"])
def test_a_folder_that_is_written_half_never_has_the_final_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken_call: str
) -> None:
    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt  # the process ends here

    owner, _, name = broken_call.rpartition(".")
    monkeypatch.setattr(getattr(checkpoint, owner) if owner else checkpoint, name, die)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 7)
    monkeypatch.undo()
    assert versions(tmp_path) == []
    assert load_checkpoint(save(tmp_path, 7)).version == 7  # what was left over is no obstacle
    assert [path.name for path in tmp_path.iterdir()] == ["step-000007"]


def test_a_full_disk_is_a_run_error_and_the_earlier_checkpoint_stands(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with file_size_limit(4096), pytest.raises(RunError, match=r"step-000002 could not be written .*earlier ones stand"):
        save_checkpoint(tmp_path, weights(2, size=100_000), {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert load_checkpoint(checkpoint_folder(tmp_path, 1)).version == 1


def test_a_full_disk_at_the_description_is_a_run_error_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", no_space)
    with pytest.raises(RunError, match="No space left on device"):
        save(tmp_path, 2)


@pytest.mark.parametrize("size", [1, 100_000], ids=["small", "large"])  # torch words them differently
def test_a_file_that_torch_cannot_write_is_a_run_error_and_nothing_is_left(tmp_path: Path, size: int) -> None:
    partial = partial_folder(tmp_path, 2, "attempt")
    with (
        pytest.raises(RunError, match=r"step-000002 could not be written .*earlier ones stand"),
        writing(tmp_path, 2),
        file_size_limit(1000),
    ):
        torch.save(torch.zeros(size), partial / "optimizer.pt")
    assert list(tmp_path.iterdir()) == []


def test_what_a_neighbours_death_raises_stays_what_it_is_and_takes_no_folder_from_those_who_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meet() -> None:
        with writing(tmp_path, 2):
            partial_folder(tmp_path, 2, "attempt")
            raise RuntimeError(GLOO)

    with pytest.raises(RuntimeError, match="Connection closed by peer") as met:
        meet()
    assert not isinstance(met.value, RunError)
    assert [path.name for path in tmp_path.iterdir()] == [".writing-step-000002.attempt"]
    save(tmp_path, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000004"]

    monkeypatch.setattr(checkpoint, "FULL_BYTES", float("inf"))  # with a full disk, the neighbour met that
    with pytest.raises(RunError, match="No space left on device"):
        meet()


def truncate_weights(folder: Path) -> None:
    data = (folder / "weights.safetensors").read_bytes()
    (folder / "weights.safetensors").write_bytes(data[:-10])


def flip_a_byte(folder: Path) -> None:
    data = bytearray((folder / "weights.safetensors").read_bytes())
    data[-3] ^= 1
    (folder / "weights.safetensors").write_bytes(data)


def write_description(text: str) -> Any:
    return lambda folder: (folder / "checkpoint.json").write_text(text)


@pytest.mark.parametrize(
    "harm",
    [
        truncate_weights,
        flip_a_byte,
        lambda folder: (folder / "weights.safetensors").write_bytes(b""),
        lambda folder: (folder / "weights.safetensors").unlink(),
        lambda folder: (folder / "checkpoint.json").unlink(),
        write_description("{"),
        write_description("{}"),
        write_description("[]"),
    ],
    ids=["cut", "one bit", "empty", "no weights", "no description", "torn json", "no version", "a list"],
)
def test_damage_is_recognised(tmp_path: Path, harm: Any) -> None:
    folder = save(tmp_path, 4, weights_hash=hash_tensors(weights(4).tensors))
    assert load_checkpoint(folder).version == 4
    harm(folder)
    with pytest.raises(RunError, match=r"step-000004 is damaged"):
        load_checkpoint(folder)


@pytest.mark.parametrize("harm", [truncate_weights, flip_a_byte, write_description("{"), write_description("[]")])
def test_the_newest_whole_checkpoint_is_used_and_damage_is_told(tmp_path: Path, harm: Any) -> None:
    assert newest_checkpoint(tmp_path) == (None, [])
    save(tmp_path, 5)
    save(tmp_path, 10)
    assert newest_checkpoint(tmp_path) == (checkpoint_folder(tmp_path, 10), [])
    harm(checkpoint_folder(tmp_path, 10))
    (tmp_path / ".writing-step-000015").mkdir()  # a crash while writing
    folder, (complaint,) = newest_checkpoint(tmp_path)
    assert folder == checkpoint_folder(tmp_path, 5)
    assert "step-000010 is damaged" in complaint


def test_a_folder_under_another_versions_name_is_damaged(tmp_path: Path) -> None:
    save(tmp_path, 5).rename(tmp_path / "step-000007")
    assert "version 5" in (damage(tmp_path / "step-000007") or "")


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path, 5)
    (folder / "weights.safetensors").unlink()
    assert damage(folder) == "weights.safetensors is missing"


def test_removing_a_checkpoint_that_is_gone_is_harmless(tmp_path: Path) -> None:
    remove_checkpoint(save(tmp_path, 5))
    remove_checkpoint(checkpoint_folder(tmp_path, 5))
    assert list(tmp_path.iterdir()) == []


def test_so_many_newest_and_best_are_kept(tmp_path: Path) -> None:
    keeper = CheckpointKeeper(tmp_path, keep_last=2, keep_best=2, is_evaluated=lambda version: version % 10 == 0)
    for version in range(0, 35, 5):
        save(tmp_path, version)
        if version % 10 == 0:
            keeper.evaluated(version, {KL: {0: 0.4, 10: 0.1, 20: 0.2, 30: 0.3}[version]})
        keeper.remove_the_rest()
    assert versions(tmp_path) == [10, 20, 25, 30]


def test_an_earlier_lifes_evaluations_decide_what_is_best(tmp_path: Path) -> None:
    for version in (0, 5, 10):
        save(tmp_path, version)
    keeper = CheckpointKeeper(tmp_path)
    keeper.restore({0: {KL: 0.5}, 5: {KL: 0.1}, 7: {KL: 0.0}})  # 7 was removed
    assert keeper.best_version == 5
    assert not keeper.evaluated(10, {KL: 0.2})
    assert versions(tmp_path) == [5, 10]


def test_the_name_of_the_best_is_written_whole_or_stays_and_a_full_disk_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = CheckpointKeeper(tmp_path)
    save(tmp_path, 0)
    keeper.evaluated(0, {KL: 0.5})
    save(tmp_path, 5)

    def full(path: Path, text: str) -> None:
        path.open("w").close()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(RunError, match=r"cannot write the name of the best .*best.json: No space left") as error:
            keeper.evaluated(5, {KL: 0.1})
    assert "\n" not in str(error.value)
    assert read_best(tmp_path) == 0
    keeper.remove_the_rest()
    assert read_best(tmp_path) == 5


def test_best_and_last_are_kept(tmp_path: Path) -> None:
    keeper = CheckpointKeeper(tmp_path)
    assert keeper.best_version is None
    kept = []
    for version, kl in [(0, 0.9), (5, 0.3), (10, 0.5), (15, 0.4), (20, 0.2)]:
        save(tmp_path, version)
        assert keeper.evaluated(version, {KL: kl}) is (version in (0, 5, 20))
        kept.append(versions(tmp_path))
    assert kept == [[0], [5], [5, 10], [5, 15], [20]]
    assert keeper.best_version == 20
    assert json.loads((tmp_path / "best.json").read_text()) == {"version": 20, "folder": "step-000020", KL: 0.2}


def test_a_version_that_waits_for_its_evaluation_is_kept_until_then(tmp_path: Path) -> None:
    keeper = CheckpointKeeper(tmp_path)
    for version in (0, 5, 10, 15):  # the trainer is three evaluations ahead
        save(tmp_path, version)
    keeper.evaluated(0, {KL: 0.5})
    keeper.evaluated(5, {KL: 0.6})
    assert versions(tmp_path) == [0, 10, 15]
    assert keeper.evaluated(10, {KL: 0.1})
    assert versions(tmp_path) == [10, 15]
    keeper.evaluated(15, {KL: 0.2})
    assert versions(tmp_path) == [10, 15]


def test_evaluations_that_measure_nothing_keep_no_checkpoint(tmp_path: Path) -> None:
    """Rows without references, on-policy: exact match is off, and there is nothing else to say."""
    keeper = CheckpointKeeper(tmp_path, keep_last=2)
    for version in (0, 5, 10, 15):
        save(tmp_path, version)
        assert not keeper.evaluated(version, {})
    assert versions(tmp_path) == [10, 15]
    assert keeper.best_version is None


def test_what_an_earlier_life_did_not_evaluate_any_more_waits_for_nothing(tmp_path: Path) -> None:
    for version in (0, 5, 10, 15):
        save(tmp_path, version)
    keeper = CheckpointKeeper(tmp_path)
    keeper.restore({0: {KL: 0.5}}, first=10)
    save(tmp_path, 20)
    keeper.remove_the_rest()
    assert versions(tmp_path) == [0, 10, 15, 20]


def test_an_evaluation_that_is_not_a_number_is_never_the_best(tmp_path: Path) -> None:
    keeper = CheckpointKeeper(tmp_path)
    for version, kl in [(0, float("nan")), (5, 0.3), (10, float("nan"))]:
        save(tmp_path, version)
        keeper.evaluated(version, {KL: kl})
    assert keeper.best_version == 5
    assert versions(tmp_path) == [5, 10]


def test_without_a_teacher_the_lowest_perplexity_is_the_best(tmp_path: Path) -> None:
    keeper = CheckpointKeeper(tmp_path)
    for version, perplexity in [(0, 9.0), (5, 4.0)]:
        save(tmp_path, version)
        keeper.evaluated(version, {"evaluate/perplexity": perplexity})
    assert keeper.best_version == 5
    assert json.loads((tmp_path / "best.json").read_text())["evaluate/perplexity"] == 4.0


def test_a_version_without_a_checkpoint_or_a_measure_is_not_the_best(tmp_path: Path) -> None:
    keeper = CheckpointKeeper(tmp_path)
    save(tmp_path, 0)
    assert not keeper.evaluated(0, {"evaluate/exact_match": 1.0})
    assert not keeper.evaluated(5, {KL: 0.1})
    assert keeper.best_version is None
