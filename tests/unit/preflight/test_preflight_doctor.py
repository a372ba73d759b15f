"""The doctor's report: what is fine, what is not, and a way out for each."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from raydistill.cli import main_with_errors
from raydistill.config import Config
from raydistill.errors import ResourceError
from raydistill.preflight.doctor import doctor_command
from raydistill.preflight.storage import check_room, check_writable


def arguments(tiny_world: Any, output: Path, *more: str) -> list[str]:
    settings = {
        "student.model": tiny_world.teacher_folder,
        "student.dtype": "float32",
        "data.path": tiny_world.train_path,
        "data.eval_path": tiny_world.validation_path,
        "data.max_length": 160,
        "data.min_prompt_room": 4,
        "data.min_completion": 2,
        "rollout.max_new_tokens": 40,
        "run.output": output,
    }
    return [part for field, value in settings.items() for part in (f"--{field}", str(value))] + list(more)


def report(capsys: pytest.CaptureFixture[str], argv: Sequence[str]) -> tuple[int, dict[str, list[dict[str, str]]]]:
    code = main_with_errors(doctor_command, [*argv, "--json"])
    found: dict[str, list[dict[str, str]]] = {}
    for row in json.loads(capsys.readouterr().out):
        found.setdefault(row["check"], []).append(row)
    return code, found


def test_a_config_that_can_run_is_ready(tiny_world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = report(capsys, arguments(tiny_world, tmp_path))
    assert code == 0
    assert {row["status"] for rows in found.values() for row in rows} == {"ok"}
    assert "<|im_end|>" in found["end of sequence"][0]["text"]
    assert "####" in found["template"][0]["text"]
    assert "400 training rows" in found["data"][0]["text"]
    assert found.keys() >= {"storage", "vocabulary", "memory", "disk", "placement"}


def test_every_problem_is_one_line_with_a_way_out(
    tiny_world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = ("--data.path", str(tmp_path / "none.jsonl"), "--teacher.num_gpus", "64")
    code, found = report(capsys, arguments(tiny_world, tmp_path, *missing))
    assert code == 2
    (models,) = found["models and data"]
    assert models["status"] == "problem"
    assert "none.jsonl" in models["text"]
    (placement,) = found["placement"]
    assert "needs 64 GPUs" in placement["text"]
    assert "memory" not in found  # nothing was read that it could be estimated from


def test_an_output_that_cannot_be_written_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = Config.model_validate({"run": {"output": tmp_path / "file" / "outputs"}})
    with pytest.raises(ResourceError, match=r"choose another run\.output"):
        check_writable(config)


def test_checkpoints_that_do_not_fit_the_disk_are_a_problem(tmp_path: Path) -> None:
    config = Config.model_validate({"run": {"output": tmp_path}, "checkpoint": {"keep_last": 1, "keep_best": 1}})
    assert check_room(config, 1000).startswith("4 checkpoints need about 64 KB")
    with pytest.raises(ResourceError, match=r"checkpoint\.keep_last"):
        check_room(config, 10**15)
