"""Shared command-line behaviour: exit codes, where text goes, help that answers without heavy imports."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from raydistill.cli import config_command, main_with_errors, print_table
from raydistill.errors import ConfigError, RunError

ROOT = Path(__file__).parents[3]
HEAVY = ("torch", "ray", "vllm", "transformers", "deepspeed", "mlflow", "numpy", "peft")


def loaded_after(code: str) -> str:
    """Run code in a fresh interpreter; its output and then, in the last line, the heavy libraries it imported."""
    code += f"\nimport sys; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", ["errors", "config", "config.load", "config.help", "cli"])
def test_the_module_imports_no_heavy_library(module):
    assert loaded_after(f"import raydistill.{module}") == "[]\n"


def test_help_teaches_and_imports_no_heavy_library():
    run = "from raydistill.cli import config_command\ntry:\n    config_command(['--help'])\nexcept SystemExit: pass"
    text = loaded_after(run)
    assert text.endswith("[]\n")
    for words in ("@configs/demo.toml", "--trainer.learning_rate 1e-4", "--schema", "--fields", "examples:"):
        assert words in text


def test_a_bad_config_answers_without_heavy_libraries():
    run = "from raydistill.cli import *\nassert main_with_errors(config_command, ['@configs/demo.toml', '--lr=1']) == 2"
    assert loaded_after(run) == "[]\n"


def test_config_prints_toml_json_schema_and_fields(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert config_command(["@configs/demo.toml", "--run.verbose", "false"]) == 0
    assert "# configs/demo.toml:" in capsys.readouterr().out
    assert config_command(["--json", "@configs/demo.toml", "--trainer.num_steps", "9"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["config"]["trainer"]["num_steps"] == 9
    assert printed["sources"]["trainer.num_steps"] == "command line"
    assert config_command(["--schema"]) == 0
    assert "$schema" in json.loads(capsys.readouterr().out)
    assert config_command(["--fields=quant"]) == 0
    assert "quant.group_size = 32" in capsys.readouterr().out


def test_each_problem_of_a_user_error_is_one_line_on_stderr(capsys):
    def command(argv):
        raise ConfigError("first\nsecond")

    assert main_with_errors(command, []) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: first\nerror: second\n"
    assert captured.out == ""


def test_a_remote_error_is_told_without_its_traceback(capsys):
    class RemoteConfigError(ConfigError):
        cause = ConfigError("the file is empty")

    def command(argv):
        raise RemoteConfigError("Traceback\n  many lines")

    assert main_with_errors(command, []) == 2
    assert capsys.readouterr().err == "error: the file is empty\n"


def test_an_interrupt_is_one_line_and_130(capsys):
    def command(argv):
        raise KeyboardInterrupt

    assert main_with_errors(command, []) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_run_that_cannot_go_on_is_one_line_and_exit_code_1(capsys):
    def command(argv):
        raise RunError("rollout-0 died again after 20 replacements")

    assert main_with_errors(command, []) == 1
    assert capsys.readouterr().err == "error: rollout-0 died again after 20 replacements\n"


def test_other_errors_keep_their_traceback():
    def command(argv):
        raise AssertionError("a bug")

    with pytest.raises(AssertionError):
        main_with_errors(command, [])


@pytest.mark.parametrize(
    ("number", "code", "way_out"),
    [
        (errno.EACCES, 2, "Permission denied; change its permissions, or name another place"),
        (errno.EISDIR, 2, "Is a directory; name a file"),
        (errno.ENOSPC, 1, "No space left on device; make room there"),
    ],
)
def test_a_file_that_the_system_refuses_is_one_line(capsys, number, code, way_out):
    def command(argv):
        raise OSError(number, os.strerror(number), "/data/table.csv")

    assert main_with_errors(command, []) == code
    assert capsys.readouterr().err == f"error: /data/table.csv: {way_out}\n"
    for asked in (["--verbose"], ["--run.verbose", "true"]):
        with pytest.raises(OSError):
            main_with_errors(command, asked)


def test_a_file_of_ours_that_is_missing_and_an_error_without_a_file_keep_their_traceback():
    for error in (FileNotFoundError(errno.ENOENT, "gone", "ours.json"), OSError(errno.ENOSPC, "full"), OSError("odd")):

        def command(argv, error=error):
            raise error

        with pytest.raises(OSError):
            main_with_errors(command, [])


def test_a_command_gives_the_exit_code_and_nothing_counts_as_done():
    assert main_with_errors(lambda argv: None, []) == 0
    assert main_with_errors(lambda argv: len(argv), ["a", "b", "c"]) == 3


ROWS = [{"run": "[a]", "kl": 0.12345678, "steps": 3}, {"run": "b", "kl": float("nan"), "ok": True}]


def test_a_table_as_json_is_pure_json_with_the_columns_asked_for(capsys):
    print_table(ROWS, ["run", "kl", "steps"], json=True)
    assert json.loads(capsys.readouterr().out) == [
        {"run": "[a]", "kl": 0.12345678, "steps": 3},
        {"run": "b", "kl": None, "steps": None},
    ]


def test_a_table_shows_text_as_it_is_and_numbers_short(capsys):
    print_table(ROWS, ["run", "kl", "steps", "ok"])
    text = capsys.readouterr().out
    for words in ("[a]", "0.1235", "nan", "yes", "-"):
        assert words in text
