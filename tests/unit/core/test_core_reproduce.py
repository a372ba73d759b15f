"""Comparing a run with its reproduction: what is listed, and how large the difference is."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from raydistill.config import Config
from raydistill.errors import UserError
from raydistill.messages import EvalReport, Span
from raydistill.reproduce import (
    again,
    earlier_settings,
    provenance_differences,
    refuse_hidden,
    reproduce_command,
    result_differences,
    values_of,
)
from raydistill.results.record import RunRecord
from raydistill.results.record_lines import require_start

LOSSES = {"a": [0.5, math.nan, math.inf], "b": [0.5, math.nan, math.inf], "c": [0.5, 0.25, math.inf]}


def record(folder: Path, losses: list[float], kl: float = 0.5, data: str = "d1", **config: Any) -> Path:
    settings = json.loads(Config.model_validate(config).model_dump_json())
    with RunRecord(folder) as lines:
        lines.start(name=folder.name, config=settings, provenance={}, seed=0, data_fingerprint=data)
        for step, loss in enumerate(losses):
            lines.step(step, {"trainer/loss": loss})
        span = Span(stage="evaluate", actor="e", step=2, start_s=0.0, end_s=1.0)
        lines.evaluation(EvalReport(version=2, metrics={"evaluate/kl_nats": kl}, span=span))
    return folder


def test_equal_runs_have_no_difference(tmp_path: Path) -> None:
    runs = [record(tmp_path / name, [0.5, 0.25]) for name in "ab"]
    assert result_differences(*runs) == ([], 0.0)


def test_the_first_loss_that_differs_is_named_with_the_largest_difference(tmp_path: Path) -> None:
    runs = [record(tmp_path / "a", [0.5, 0.25, 0.125]), record(tmp_path / "b", [0.5, 0.375, 0.625], kl=0.75, data="d2")]
    found, largest = result_differences(*runs)
    assert largest == 0.5
    assert [(d.what, d.recorded, d.now) for d in found] == [
        ("loss, from step 1", "0.25", "0.375"),
        ("data fingerprint", "d1", "d2"),
        ("evaluate/kl_nats of version 2", "0.5", "0.75"),
    ]


def test_a_loss_that_is_no_number_equals_its_like_and_nothing_else(tmp_path: Path) -> None:
    """Steps are skipped where the loss is NaN, and that may happen."""
    skipped, again_, other = (record(tmp_path / name, losses) for name, losses in LOSSES.items())
    assert result_differences(skipped, again_) == ([], 0.0)
    for runs in ((skipped, other), (other, skipped)):
        found, largest = result_differences(*runs)
        assert largest == float("inf")
        assert [d.what for d in found] == ["loss, from step 1"]


def test_a_run_that_ended_early_is_no_reproduction(tmp_path: Path) -> None:
    runs = [record(tmp_path / "a", [0.5, 0.25]), record(tmp_path / "b", [0.5])]
    found, largest = result_differences(*runs)
    assert largest == float("inf")
    assert found[0].what == "steps"


def test_other_versions_and_code_are_listed() -> None:
    then = {"versions": {"torch": "2.12", "ray": "2.60"}, "git": {"revision": "a"}, "machine": None}
    now = {"versions": {"torch": "2.13", "ray": "2.60"}, "git": None, "machine": None}
    found = {d.what: (d.recorded, d.now) for d in provenance_differences(then, now)}
    assert found["versions.torch"] == ("2.12", "2.13")
    assert "versions.ray" not in found
    assert found["git.revision"] == ("a", "-")


def test_the_recorded_settings_run_under_a_new_name(tmp_path: Path) -> None:
    folder = record(
        tmp_path / "out" / "runs" / "first", [0.5], quant={"format": "int2"}, run={"name": "first", "seed": 7}
    )
    config = again(require_start(folder), folder)
    assert (config.run.name, config.run.seed, config.quant.format) == ("first-reproduced", 7, "int2")
    assert config.run.output == tmp_path / "out"
    assert config.run.resume == "never"


def test_fields_that_do_not_change_the_result_may_be_set_anew(tmp_path: Path) -> None:
    folder = record(
        tmp_path / "out" / "runs" / "first",
        [0.5],
        cluster={"address": "ray://gone:10001"},
        results={"uri": "postgresql://me:secret@host/db"},
    )
    with pytest.raises(UserError, match=r"results\.uri=.*without its password; give it whole with --results\.uri"):
        refuse_hidden(again(require_start(folder), folder))
    store = f"sqlite:///{tmp_path}/here.db"
    given = ["--cluster.address", "none", f"--results.uri={store}", "--run.output", str(tmp_path / "other")]
    config = again(require_start(folder), folder, values_of([*given, "--run.name", "second"]))
    refuse_hidden(config)
    assert (config.cluster.address, config.results.uri) == (None, store)
    assert (config.run.output, config.run.name) == (tmp_path / "other", "second")
    assert (config.run.resume, config.world.name) == ("never", "none")


@pytest.mark.parametrize("setting", ["--trainer.learning_rate=1e-3", "--run.seed=4", "--run.resume=auto"])
def test_a_field_that_changes_the_result_is_refused(tmp_path: Path, setting: str) -> None:
    folder = record(tmp_path / "runs" / "first", [0.5])
    with pytest.raises(UserError, match=f"^{setting.partition('=')[0]} would make another run of it"):
        reproduce_command([str(folder), "--check", setting])


def test_settings_that_changed_on_the_way_are_listed(tmp_path: Path) -> None:
    folder = record(tmp_path / "runs" / "first", [0.5, 0.25], trainer={"num_steps": 2, "learning_rate": 1e-3})
    now = Config.model_validate({"trainer": {"num_steps": 4, "learning_rate": 1e-4}, "run": {"verbose": True}})
    with RunRecord(folder) as lines:
        lines.cut_back(1, json.loads(now.model_dump_json()))
    config = again(require_start(folder), folder)
    assert config.trainer.learning_rate == 1e-4
    assert [(d.what, d.recorded, d.now) for d in earlier_settings(folder, config)] == [
        ("trainer.learning_rate until step 1", "0.001", "0.0001"),
        ("trainer.num_steps until step 1", "2", "4"),
    ]


def test_settings_of_another_version_are_refused_with_the_field(tmp_path: Path) -> None:
    start = {"config": {"run": {}, "quant": {"shape": "round"}}}
    with pytest.raises(UserError, match=r"quant\.shape"):
        again(start, tmp_path / "runs" / "a")


def test_a_folder_without_a_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run's record"):
        require_start(tmp_path)
