from pathlib import Path

import pytest

from raydistill.cli import main_with_errors
from raydistill.config.load import load_config
from raydistill.errors import ConfigError
from raydistill.ptq import overlay
from raydistill.study.command import COMPARED_ARMS, COMPARED_METHODS, compare_command, compare_config, demo_command
from raydistill.study.material import check_unseen
from raydistill.study.study import Study


@pytest.fixture
def toml(tmp_path):
    def write(text):
        path = tmp_path / "mine.toml"
        path.write_text(text)
        return f"@{path}"

    return write


def test_a_comparison_has_every_arm_and_method_unless_somebody_says_otherwise(toml):
    study = compare_config([toml('[world]\nname = "stories"\n')]).study
    assert (study.arms, study.ptq_methods, study.seeds) == (COMPARED_ARMS, COMPARED_METHODS, 1)
    kept = compare_config([toml('[study]\narms = ["mixed"]\nptq_methods = ["rtn"]\nseeds = 2\n')]).study
    assert (kept.arms, kept.ptq_methods, kept.seeds) == (("mixed",), ("rtn",), 2)
    switches = compare_config(
        [toml('[study]\narms = ["mixed"]\n')], arms="gold-ce,off-policy", methods="rtn,awq", seeds="3"
    )
    assert switches.study.arms == ("gold-ce", "off-policy")
    assert (switches.study.ptq_methods, switches.study.seeds) == (("rtn", "awq"), 3)


@pytest.mark.parametrize("name", ["demo", "gsm8k", "wikitext"])
def test_the_shipped_worlds_are_compared_whole_and_shown_in_short(name):
    config = f"@{Path(__file__).parents[3] / 'configs' / name}.toml"
    compared = compare_config([config]).study
    assert (compared.arms, compared.ptq_methods) == (COMPARED_ARMS, COMPARED_METHODS)
    assert load_config([config]).config.study.arms == ("student", "gold-ce")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('arms = ["mixed", "mixed"]', "study.arms names 'mixed' twice"),
        ("arms = []", "study.arms is empty"),
        ('ptq_methods = ["gptq"]', "leaves out 'rtn'"),
        ("seeds = 0", "study.seeds=0 is not allowed"),
        ('tasks = ["gsm8k", "gsm8k"]', "study.tasks names 'gsm8k' twice"),
        ("task_limit = 5", "study.task_limit='5' has no effect without study.tasks"),
    ],
)
def test_what_cannot_be_compared_is_refused_when_the_config_is_read(toml, text, said):
    with pytest.raises(ConfigError, match=said):
        load_config([toml(f"[study]\n{text}\n")])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "study.test_path is not set; name a JSONL file of rows for the final table"),
        ('[study]\ntest_path = "gone.jsonl"', "study.test_path='gone.jsonl' is not a file"),
        (
            '[world]\nname = "stories"\n[quant]\nformat = "nf4"\nsymmetric = true\nscale = "absmax"',
            "leaves out quant.format='nf4'",
        ),
        ('[world]\nname = "stories"\n[study]\nptq_methods = ["rtn", "gptq"]', "make ptq"),
        (
            '[world]\nname = "stories"\n[study]\ntasks = ["helaswag"]',
            "study.tasks (their rows: study.task_data): lm-eval has no task 'helaswag'; did you mean hellaswag?",
        ),
    ],
)
def test_a_study_that_cannot_work_is_refused_before_anything_starts(toml, capsys, monkeypatch, tmp_path, text, said):
    def missing():
        raise ConfigError("set it up with `make ptq`")

    monkeypatch.setattr(overlay, "find_interpreter", missing)
    arguments = [toml(text), "--run.output", str(tmp_path), *(() if "gptq" in text else ("--ptq", "rtn"))]
    assert main_with_errors(compare_command, arguments) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "compare").exists()


def test_compare_wants_a_config_and_demo_a_world(capsys, toml):
    assert main_with_errors(compare_command, ["--seeds", "2"]) == 2
    assert "raydistill compare @configs/demo.toml" in capsys.readouterr().err
    assert main_with_errors(demo_command, [toml("[trainer]\nnum_steps = 3\n")]) == 2
    assert "a demo runs on an embedded world" in capsys.readouterr().err


def test_test_rows_that_were_trained_on_are_refused(tmp_path):
    from rich.console import Console

    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_text("".join(f'{{"question": "What is {n}?", "answer": "{n}"}}\n' for n in range(20)))
    test.write_text("".join(f'{{"question": "What is {n}?", "answer": "x"}}\n' for n in (40, 3, 41)))
    settings = ["--data.path", str(train), "--data.eval_rows", "4", "--study.test_path", str(test)]
    config = load_config(["--student.model", "x", "--quant.format", "int4", *settings]).config
    Study(config, Console(quiet=True), tmp_path)
    from raydistill.errors import DataError

    with pytest.raises(DataError, match=r"1 of 3 rows have a prompt that is in data.path"):
        check_unseen(config, test)
    test.write_text('{"question": "What is 50?", "answer": "x"}\n')
    check_unseen(config, test)
