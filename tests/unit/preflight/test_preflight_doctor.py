"""The doctor's report: what is fine, what is not, and a way out for each."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from raydistill.cli import main_with_errors
from raydistill.config import Config
from raydistill.errors import ResourceError, UserError
from raydistill.preflight.doctor import doctor_command
from raydistill.preflight.findings import check_ports, template_warnings
from raydistill.preflight.storage import check_room, check_storage, check_writable


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
    assert "data.template: enable_thinking=False" in found["template"][0]["text"]
    assert "400 training rows" in found["data"][0]["text"]
    assert found.keys() >= {"storage", "vocabulary", "memory", "disk", "ports", "placement"}


@pytest.mark.parametrize(("thinking", "block"), [("false", "<think></think>\\n"), ("true", "")])
def test_the_example_shows_the_prompt_with_the_templates_variables(
    tiny_world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], thinking: str, block: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_world.teacher_folder, model)
    template = (model / "chat_template.jinja").read_text()
    switch = "{%- if add_generation_prompt and enable_thinking is false -%}{{- '<think></think>\\n' -}}{%- endif -%}"
    (model / "chat_template.jinja").write_text(template + switch)
    settings = ("--student.model", str(model), "--data.template.enable_thinking", thinking)
    code, found = report(capsys, arguments(tiny_world, tmp_path, *settings))
    assert code == 0
    example, *others = found["template"]
    assert others == []
    assert f"assistant\\n{block}' -> '" in example["text"]
    assert f"enable_thinking={thinking.title()}" in example["text"]


def test_what_a_template_does_not_read_and_a_date_of_its_own_are_warnings() -> None:
    (unread,) = template_warnings("{{ messages }}", {"enable_thinking": False, "reasoning_effort": "low"})
    assert unread.status == "warning"
    assert "data.template.reasoning_effort is not read" in unread.text
    dated = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b') %}{% endif %}"
    (date,) = template_warnings(dated, {"enable_thinking": False})
    assert "set data.template.date_string" in date.text
    assert template_warnings(dated, {"date_string": "26 Jul 2024"}) == []


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


def test_a_storage_is_written_and_read_back(
    tiny_world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"file://{tmp_path}/remote"
    code, found = report(capsys, arguments(tiny_world, tmp_path, "--run.storage", url))
    assert code == 0
    assert found["run.storage"] == [
        {"check": "run.storage", "status": "ok", "text": f"{url} was written and read back"}
    ]
    assert list((tmp_path / "remote").iterdir()) == []


@pytest.mark.parametrize(
    ("url", "said"), [("nope://bucket/x", "cannot be opened"), ("file:///proc/nobody/x", "does not exist; create")]
)
def test_a_storage_that_cannot_be_used_is_a_problem(monkeypatch: pytest.MonkeyPatch, url: str, said: str) -> None:
    monkeypatch.setattr("raydistill.recovery.storage.PAUSES_S", ())
    config = Config.model_validate({"run": {"storage": url}})
    with pytest.raises(UserError, match=f"run.storage='{url}'.*{said}") as wrong:
        check_storage(config)
    assert "\n" not in str(wrong.value)


def test_checkpoints_that_do_not_fit_the_disk_are_a_problem(tmp_path: Path) -> None:
    config = Config.model_validate({"run": {"output": tmp_path}, "checkpoint": {"keep_last": 1, "keep_best": 1}})
    assert check_room(config, 1000).startswith("4 checkpoints need about 64 KB")
    with pytest.raises(ResourceError, match=r"checkpoint\.keep_last"):
        check_room(config, 10**15)


def test_checkpoints_of_a_run_that_goes_on_have_their_room_already(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config.model_validate({"run": {"output": tmp_path}, "checkpoint": {"keep_last": 1, "keep_best": 1}})
    usage = shutil.disk_usage(tmp_path)._replace(free=40_000)
    monkeypatch.setattr("raydistill.preflight.storage.shutil.disk_usage", lambda _: usage)
    with pytest.raises(ResourceError, match="4 checkpoints need about 64 KB"):
        check_room(config, 1000)
    for version in (2, 4):
        folder = tmp_path / "runs" / "one" / "checkpoints" / f"step-{version:06d}" / "optimizer"
        folder.mkdir(parents=True)
        (folder / "state.pt").write_bytes(bytes(16_000))
    text = check_room(config, 1000, tmp_path / "runs" / "one")
    assert text == "4 checkpoints need about 64 KB, 40 KB are free, 32 KB lie there already"


def test_a_machine_that_cannot_reach_itself_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "reach each other at" in check_ports()
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "203.0.113.7")  # of nobody: reserved for documentation
    with pytest.raises(ResourceError, match=r"cannot connect to each other at 203\.0\.113\.7 .* firewall"):
        check_ports()


def test_a_job_makes_the_same_checks_before_anything_starts(
    tiny_world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    from raydistill.config.load import load_config
    from raydistill.launch import run

    monkeypatch.setattr("raydistill.launch.start_cluster", lambda config: pytest.fail("a problem was not noticed"))
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "203.0.113.7")
    config = load_config(arguments(tiny_world, tmp_path)).config
    with pytest.raises(ResourceError, match="cannot connect to each other"):
        run(config, console=Console(quiet=True))
    assert not (tmp_path / "runs").exists()
