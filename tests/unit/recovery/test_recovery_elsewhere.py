"""A run that another machine began goes on here by the same command; runs go from storage to disk and back whole."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raydistill.config import Config
from raydistill.errors import UserError
from raydistill.messages import StudentWeights
from raydistill.recovery.bring import bring_record
from raydistill.recovery.checkpoint import checkpoint_folder, digests, save_checkpoint
from raydistill.recovery.resume import find_checkpoint, last_status, locked, run_folder, run_storage
from raydistill.recovery.runs import runs_command
from raydistill.recovery.storage import Storage
from raydistill.recovery.stored import StoredCheckpoints
from raydistill.results.record import RunRecord
from raydistill.results.run_folders import refuse_url

DATA = "data-1"


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/remote"


def config_of(output: Path, url: str | None, **run: Any) -> Config:
    return Config.model_validate({"run": {"output": output, "storage": url, **run}})


def live(folder: Path, config: Config, steps: int = 3, end: Any = None) -> None:
    """A life of a run whose record and checkpoint are in the storage at its end."""
    storage = run_storage(config, folder)
    with locked(folder), RunRecord(folder) as record:
        if not record.is_started:
            settings = json.loads(config.model_dump_json())
            record.start(name=folder.name, config=settings, provenance={}, seed=0, data_fingerprint=DATA)
        for step in range((record.last_step if record.last_step is not None else -1) + 1, steps):
            record.step(step, {"trainer/loss": 1.0})
        if end:
            record.end(end)
    tensors = {"q.lora_A": np.full((2, 4), steps, np.float32)}
    weights = StudentWeights(version=steps, tensors=tensors, probe=None)
    saved = save_checkpoint(folder / "checkpoints", weights, {"skipped_steps": 0})
    if storage is not None:
        storage.put(folder / "record.jsonl", "record.jsonl")
        StoredCheckpoints(storage).put(saved)


@pytest.mark.parametrize("name", [None, "a"])
def test_the_same_command_goes_on_with_an_empty_disk(tmp_path: Path, url: str, name: str | None) -> None:
    first = config_of(tmp_path / "one", url, name=name)
    folder = run_folder(first, DATA)
    live(folder, first)
    second = config_of(tmp_path / "two", url, name=name)
    found = run_folder(second, DATA)
    assert found == tmp_path / "two" / "runs" / folder.name
    assert last_status(found) == "unfinished"
    storage = run_storage(second, found)
    point = find_checkpoint(found, storage)
    assert (point.folder, point.version) == (checkpoint_folder(found / "checkpoints", 3), 3)


@pytest.mark.parametrize("changes", [{"resume": "never"}, {"seed": 3}], ids=str)  # or a finished one, below
def test_another_command_without_a_name_starts_a_run_of_its_own(tmp_path: Path, url: str, changes: Any) -> None:
    first = config_of(tmp_path / "one", url)
    folder = run_folder(first, DATA)
    live(folder, first)
    assert run_folder(config_of(tmp_path / "two", url, **changes), DATA).name != folder.name
    assert run_folder(config_of(tmp_path / "two", url), "data-2").name != folder.name


def test_an_unfinished_run_in_the_storage_is_named_where_another_begins(tmp_path: Path, url: str) -> None:
    first, said = config_of(tmp_path / "one", url), list[str]()
    folder = run_folder(first, DATA)
    live(folder, first)
    second = config_of(tmp_path / "two", url)
    changed = second.model_copy(update={"trainer": second.trainer.model_copy(update={"learning_rate": 1e-3})})
    other = run_folder(changed, DATA, said.append)
    assert other.name != folder.name
    assert said == [
        f"runs/{folder.name} is unfinished and differs in trainer.learning_rate only; --run.name {folder.name} goes on with it"
    ]
    assert not (tmp_path / "two" / "runs" / folder.name).exists(), "nothing was brought for it"
    live(folder, first, steps=5, end="finished")
    run_folder(changed, DATA, said.append)
    assert len(said) == 1


def test_a_run_that_finished_elsewhere_is_over_here(tmp_path: Path, url: str) -> None:
    """Also on the machine that began it, whose own record knows nothing of the end."""
    first, second = config_of(tmp_path / "one", url), config_of(tmp_path / "two", url)
    folder = run_folder(first, DATA)
    live(folder, first)
    other = run_folder(second, DATA)
    bring_record(other, run_storage(second, other))  # type: ignore[arg-type]
    live(other, second, steps=5, end="finished")
    assert run_folder(first, DATA).name != folder.name
    assert last_status(folder) == "finished"
    assert run_folder(config_of(tmp_path / "three", url), DATA).name != folder.name
    with pytest.raises(UserError, match="has finished"):
        run_folder(config_of(tmp_path / "three", url, name=folder.name), DATA)


def test_settings_are_compared_with_those_of_the_other_machine(tmp_path: Path, url: str) -> None:
    first = config_of(tmp_path / "one", url, name="a")
    live(run_folder(first, DATA), first)
    with pytest.raises(UserError, match=r"run\.seed was 0, is 3"):
        run_folder(config_of(tmp_path / "two", url, name="a", seed=3), DATA)


def test_a_record_that_is_ahead_here_stays(tmp_path: Path, url: str) -> None:
    config = config_of(tmp_path / "one", url, name="a")
    folder = run_folder(config, DATA)
    live(folder, config)
    with RunRecord(folder) as record:
        record.step(3, {"trainer/loss": 1.0})
    before = (folder / "record.jsonl").read_bytes()
    assert run_folder(config, DATA) == folder
    assert (folder / "record.jsonl").read_bytes() == before


def test_two_runs_of_one_name_are_refused(tmp_path: Path, url: str) -> None:
    first, second = config_of(tmp_path / "one", url, name="a"), config_of(tmp_path / "two", None, name="a")
    live(run_folder(first, DATA), first)
    live(run_folder(second, DATA), second)
    with pytest.raises(UserError, match="are two runs of one name"):
        run_folder(config_of(tmp_path / "two", url, name="a"), DATA)


def test_starting_anew_sets_the_one_there_aside(tmp_path: Path, url: str) -> None:
    first = config_of(tmp_path / "one", url, name="a")
    live(run_folder(first, DATA), first, end="finished")
    second = config_of(tmp_path / "two", url, name="a", resume="never")
    folder = run_folder(second, DATA)
    assert not folder.exists()
    names = {name.partition("/")[0] for name in Storage(url).below("runs").list()}
    assert len(names) == 1 and names.pop().startswith("a.before-")
    assert find_checkpoint(folder, run_storage(second, folder)).version == 0


def test_pull_brings_all_of_a_run_and_push_takes_it_back(
    tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path / "one", url, name="a")
    folder = run_folder(config, DATA)
    live(folder, config, end="finished")
    (folder / "export").mkdir()
    (folder / "export" / "config.json").write_text("{}")
    assert runs_command(["push", "a", "--output", str(tmp_path / "one"), "--storage", url]) == 0
    assert runs_command(["pull", "a", "--output", str(tmp_path / "two"), "--storage", url]) == 0
    assert runs_command(["pull", "a", "--output", str(tmp_path / "two"), "--storage", url]) == 0  # harmless
    pulled = {k: v for k, v in digests(tmp_path / "two" / "runs" / "a").items() if not k.endswith(".lock")}
    assert pulled == {k: v for k, v in digests(folder).items() if not k.endswith(".lock")}
    shutil.rmtree(tmp_path / "remote")
    assert runs_command(["push", "a", "--output", str(tmp_path / "two"), "--storage", url]) == 0
    capsys.readouterr()
    assert runs_command(["--storage", url, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["run"], row["status"], row["steps"], row["checkpoints"]) == ("a", "finished", 3, 1)
    assert row["bytes"] == sum(size for size, _ in pulled.values())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["pull", "a"], "needs --storage URL"),
        (["pull", "--storage", "{url}"], "needs the names of runs"),
        (["pull", "b", "--storage", "{url}"], "has no run 'b'; there are: a"),
        (["push", "b", "--storage", "{url}"], "there is no run 'b'"),
        (["prune", "--storage", "{url}"], "leave --storage out"),
        (["list", "--storage", "bucket/prefix"], "is no URL"),
        (["list", "--storage", "nope://bucket"], "cannot be opened"),
    ],
)
def test_wrong_transfers_are_refused_in_one_line(
    tmp_path: Path, url: str, arguments: list[str], complaint: str
) -> None:
    config = config_of(tmp_path / "one", url, name="a")
    live(run_folder(config, DATA), config)
    with pytest.raises(UserError) as wrong:
        runs_command([argument.format(url=url) for argument in arguments] + ["--output", str(tmp_path / "two")])
    assert complaint in str(wrong.value) and "\n" not in str(wrong.value)


@pytest.mark.parametrize(
    "given", ["s3://bucket/prefix/runs/a", Path("s3://bucket/prefix/runs/a"), "s3://bucket/prefix/runs/a/export"]
)
def test_a_url_in_place_of_a_folder_leads_to_pull(given: Any) -> None:
    with pytest.raises(
        UserError, match=r"`raydistill runs pull a --storage s3://bucket/prefix` and name outputs/runs/a"
    ):
        refuse_url(given)


@pytest.mark.parametrize("given", ["outputs/runs/a", "ME/student", "/absolute/a", "a"])
def test_what_is_no_url_passes(given: str) -> None:
    refuse_url(given)
