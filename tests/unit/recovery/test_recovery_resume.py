"""Which run a command is about, and which settings may change on the way."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from raydistill.config import Config
from raydistill.config.fields import config_fields
from raydistill.errors import UserError
from raydistill.recovery.resume import (
    LOCK,
    MAY_CHANGE,
    ResumePoint,
    check_steps,
    find_checkpoint,
    goes_on_with,
    is_listed,
    last_status,
    locked,
    run_folder,
)
from raydistill.results.record import RunRecord

DATA = "data-1"


def make_config(output: Path, **changes: Any) -> Config:
    tree: dict[str, Any] = {"run": {"output": output}}
    for dotted, value in changes.items():
        section, name = dotted.split("__")
        tree.setdefault(section, {})[name] = value
    return Config.model_validate(tree)


def begin(folder: Path, config: Config, end: Any = None) -> None:
    """A run that a driver began, and ended (or not)."""
    with locked(folder), RunRecord(folder) as record:
        settings = json.loads(config.model_dump_json())
        record.start(name=folder.name, config=settings, provenance={}, seed=0, data_fingerprint=DATA)
        if end:
            record.end(end)


def test_a_command_without_a_name_starts_a_run_of_its_own(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    first, second = run_folder(config, DATA), run_folder(config, DATA)
    assert first.parent == tmp_path / "runs"
    assert first != second
    assert not first.exists()


@pytest.mark.parametrize("end", [None, "failed", "interrupted"])
def test_the_same_command_goes_on_with_what_it_left(tmp_path: Path, end: Any) -> None:
    config = make_config(tmp_path)
    folder = run_folder(config, DATA)
    begin(folder, config, end)
    assert run_folder(config, DATA) == folder
    assert run_folder(make_config(tmp_path, run__verbose=True), DATA) == folder


def test_a_command_whose_store_has_a_password_goes_on_too(tmp_path: Path) -> None:
    """The record keeps the address without it."""
    config = make_config(tmp_path, results__uri="postgresql://me:secret@host/db")
    folder = run_folder(config, DATA)
    with locked(folder), RunRecord(folder) as record:
        settings = json.loads(config.model_dump_json())
        record.start(name=folder.name, config=settings, provenance={}, seed=0, data_fingerprint=DATA)
    assert "secret" not in record.path.read_text()
    assert run_folder(config, DATA) == folder


def test_what_a_command_goes_on_with_can_be_asked_beforehand(tmp_path: Path) -> None:
    config, named = make_config(tmp_path), make_config(tmp_path, run__name="a")
    assert goes_on_with(config, DATA) is None
    assert goes_on_with(named, DATA) is None
    begin(tmp_path / "runs" / "old", config, "failed")
    begin(tmp_path / "runs" / "a", named)
    assert goes_on_with(config, DATA) == run_folder(config, DATA)
    assert goes_on_with(named, DATA) == tmp_path / "runs" / "a"
    assert goes_on_with(config, "data-2") is None
    assert goes_on_with(make_config(tmp_path, run__name="a", run__resume="never"), DATA) is None
    assert (tmp_path / "runs" / "a").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"rollout__timeout_s": 1200},
        {"trainer__timeout_s": 60},
        {"rollout__num_actors": 2, "rollout__num_gpus": 1, "teacher__num_actors": 3},
        {"checkpoint__keep_last": 1},
        {"results__uri": "http://mlflow:5000"},
        {"sync__max_policy_gap_nats": 0.5},
        {"study__tasks": ["arc_easy"]},
    ],
    ids=str,
)
def test_a_command_goes_on_with_other_limits_devices_and_places(tmp_path: Path, changes: dict[str, Any]) -> None:
    """As our error lines advise: change this, and start the same command again."""
    config, said = make_config(tmp_path), list[str]()
    folder = run_folder(config, DATA)
    begin(folder, config, "failed")
    changed = make_config(tmp_path, **changes)
    assert run_folder(changed, DATA, said.append) == folder == goes_on_with(changed, DATA)
    assert said == []


def test_what_may_change_is_listed_once_and_exists() -> None:
    assert len(set(MAY_CHANGE)) == len(MAY_CHANGE)
    names = config_fields()
    for listed in MAY_CHANGE:
        assert any(is_listed(name, (listed,)) for name in names), listed
        assert listed.endswith(".") or f"{listed.partition('.')[0]}." not in MAY_CHANGE, listed


def test_an_unfinished_run_that_differs_in_what_may_change_is_named_where_another_begins(tmp_path: Path) -> None:
    config, said = make_config(tmp_path), list[str]()
    for name in ("older", "newer"):
        begin(tmp_path / "runs" / name, config, "interrupted")
        stamp = 1e9 + (name == "newer")
        os.utime(tmp_path / "runs" / name / LOCK, (stamp, stamp))
    changed = make_config(tmp_path, trainer__learning_rate=1e-3, trainer__num_steps=7, rollout__timeout_s=5)
    folder = run_folder(changed, DATA, said.append)
    assert not folder.exists()
    assert goes_on_with(changed, DATA) is None
    fields = "trainer.learning_rate, trainer.num_steps"
    assert said == [f"runs/newer is unfinished and differs in {fields} only; --run.name newer goes on with it"]
    for other in (
        make_config(tmp_path, trainer__learning_rate=1e-3, run__resume="never"),
        make_config(tmp_path, trainer__learning_rate=1e-3, run__name="own"),
        make_config(tmp_path, trainer__learning_rate=1e-3, run__seed=3),
    ):
        run_folder(other, DATA, said.append)
    run_folder(changed, "data-2", said.append)
    assert len(said) == 1


def test_a_folder_that_was_set_aside_is_not_gone_on_with(tmp_path: Path) -> None:
    named = make_config(tmp_path, run__name="a")
    begin(tmp_path / "runs" / "a", named, "failed")
    run_folder(make_config(tmp_path, run__name="a", run__resume="never"), DATA)
    assert not run_folder(make_config(tmp_path), DATA).exists()
    assert goes_on_with(make_config(tmp_path), DATA) is None


@pytest.mark.parametrize(
    "changes", [{"run__resume": "never"}, {"trainer__num_steps": 7}, {"trainer__learning_rate": 1e-3}], ids=str
)
def test_another_command_starts_a_run_of_its_own(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = make_config(tmp_path)
    folder = run_folder(config, DATA)
    begin(folder, config)
    assert run_folder(make_config(tmp_path, **changes), DATA) != folder
    assert run_folder(config, "data-2") != folder


def test_a_finished_run_and_one_at_work_are_left_alone(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    finished = run_folder(config, DATA)
    begin(finished, config, "finished")
    working = run_folder(config, DATA)
    begin(working, config)
    with locked(working):
        assert run_folder(config, DATA) not in (finished, working)
    assert run_folder(config, DATA) == working


def test_a_named_run_goes_on_with_settings_that_may_change(tmp_path: Path) -> None:
    config = make_config(tmp_path, run__name="a")
    begin(tmp_path / "runs" / "a", config, "interrupted")
    changed = make_config(tmp_path, run__name="a", trainer__num_steps=7, trainer__learning_rate=1e-3, run__verbose=True)
    assert run_folder(changed, DATA) == tmp_path / "runs" / "a"


def test_settings_that_may_not_change_are_all_listed(tmp_path: Path) -> None:
    begin(tmp_path / "runs" / "a", make_config(tmp_path, run__name="a"))
    changed = make_config(tmp_path, run__name="a", quant__format="int2", run__seed=3)
    with pytest.raises(UserError) as caught:
        run_folder(changed, "data-2")
    for part in ("quant.format was 'int4', is 'int2'", "run.seed was 0, is 3", "data fingerprint was 'data-1'"):
        assert part in str(caught.value)


def test_a_finished_named_run_is_not_overwritten(tmp_path: Path) -> None:
    config = make_config(tmp_path, run__name="a")
    folder = tmp_path / "runs" / "a"
    begin(folder, config, "finished")
    with pytest.raises(UserError, match="has finished"):
        run_folder(config, DATA)
    assert run_folder(make_config(tmp_path, run__name="a", run__resume="never"), DATA) == folder
    (aside,) = (tmp_path / "runs").glob("a.before-*")
    assert last_status(aside) == "finished"
    assert not folder.exists()


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "runs" / "a").mkdir(parents=True)
    with pytest.raises(UserError, match="is no run"):
        run_folder(make_config(tmp_path, run__name="a"), DATA)


def test_a_run_that_died_before_its_first_line_starts_again(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    with locked(folder):
        pass
    assert (folder / LOCK).exists()
    assert run_folder(make_config(tmp_path, run__name="a"), DATA) == folder


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    with locked(folder), pytest.raises(UserError, match="at work in another process"), locked(folder):
        pass
    with locked(folder):
        pass


def test_a_run_does_not_go_back_behind_what_it_has_trained(tmp_path: Path) -> None:
    point = ResumePoint(folder=tmp_path / "checkpoints" / "step-000500", version=500, skipped=0, steps={})
    check_steps(tmp_path, point, 500)
    with pytest.raises(UserError) as wrong:
        check_steps(tmp_path, point, 300)
    for part in ("trainer.num_steps=300", "500 steps", "at least 500", "--resume never", "--checkpoint 500"):
        assert part in str(wrong.value)


def test_without_a_checkpoint_a_run_starts_at_its_beginning(tmp_path: Path) -> None:
    point = find_checkpoint(tmp_path)
    assert (point.folder, point.version, point.skipped) == (None, 0, 0)
