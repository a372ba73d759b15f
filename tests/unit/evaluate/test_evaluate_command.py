import json
import math
import shutil
import subprocess
import sys

import pytest

from raydistill.cli import main_with_errors
from raydistill.config import Config, DataSection
from raydistill.data.dataset import fingerprint_of
from raydistill.data.encode import encode_rows
from raydistill.errors import UserError
from raydistill.evaluate.arguments import parser
from raydistill.evaluate.command import evaluate_command
from raydistill.evaluate.paired import read_row_values
from raydistill.evaluate.plan import make_plan
from raydistill.evaluate.ptq import export_ptq
from raydistill.evaluate.rows import rows_of_file, rows_of_run
from raydistill.evaluate.run_defaults import source_of
from raydistill.quant.formats import WeightFormat
from raydistill.results.record import RunRecord
from raydistill.results.record_lines import require_start

INT4 = WeightFormat(bits=4, group_size=32, symmetric=False, scale="absmax")


@pytest.fixture(scope="module")
def export(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports") / "int4"
    export_ptq(world.teacher, INT4, folder)
    return folder


@pytest.fixture
def make_run(world, export, tmp_path):
    """A run's folder as a finished run leaves it."""

    def make(name="first", has_export=True, **data):
        folder = tmp_path / "runs" / name
        section = {
            "path": str(world.rows),
            "eval_rows": 6,
            "min_completion": 1,
            "min_prompt_room": 1,
            "max_length": 256,
        }
        config = Config.model_validate(
            {
                "student": {"model": str(world.teacher)},
                "data": section | data,
                "evaluation": {"exact_match": "final_number", "max_new_tokens": 4},
                "adapter": {"mode": "merged"},
            }
        )
        with RunRecord(folder) as record:
            record.start(name=name, config=config.model_dump(mode="json"), provenance={}, seed=0)
        if has_export:
            shutil.copytree(export, folder / "export")
        return folder

    return make


def run(capsys, *argv):
    code = main_with_errors(evaluate_command, [str(arg) for arg in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_per_row_scores_go_to_a_file_and_give_the_tables_numbers(capsys, world, export, tmp_path):
    file = tmp_path / "rows.jsonl"
    arguments = ["--teacher", world.teacher, "--data", world.rows, "--rows", 5, "--exact-match", "final_number"]
    arguments += ["--max-new-tokens", 4, "--json", "--per-row", file]
    code, out, _ = run(capsys, f"student={export}", *arguments)
    assert code == 0
    teacher, student = json.loads(out)
    values = read_row_values(file)
    assert list(values) == ["teacher", "student"]
    names = {"kl_nats", "cross_entropy_nats", "exact_match", "exact_match_last_number"}
    assert values["student"].keys() == names
    assert values["student"]["kl_nats"].mean == pytest.approx(student["kl_nats"])
    assert values["student"]["kl_nats"].standard_error == pytest.approx(student["kl_se"])
    assert math.exp(values["teacher"]["cross_entropy_nats"].mean) == pytest.approx(teacher["perplexity"])
    assert values["student"]["exact_match"].mean == student["exact_match"]


def test_a_folder_for_per_row_scores_is_refused_before_anything_is_loaded(capsys, world, export, tmp_path):
    code, _, err = run(capsys, export, "--teacher", world.teacher, "--data", world.rows, "--per-row", tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert "is a folder; name a file" in err


def test_json_is_one_pure_list_on_stdout(capsys, world, export):
    code, out, err = run(
        capsys,
        f"student={export}",
        world.other,
        "--teacher",
        world.teacher,
        "--data",
        world.rows,
        "--rows",
        5,
        "--json",
    )
    assert code == 0
    rows = json.loads(out)
    assert [row["name"] for row in rows] == ["teacher", "student", "other"]
    assert rows[0]["kl_nats"] == pytest.approx(0, abs=1e-7)
    assert rows[1]["extras"] == {"format": INT4.name}
    assert "5 of 5 rows kept; 24 are there" in err


def test_a_run_brings_its_teacher_its_rows_and_its_way_of_measuring(capsys, make_run):
    folder = make_run()
    code, out, err = run(capsys, folder, "--json")
    assert code == 0
    rows = json.loads(out)
    assert [(row["name"], row["num_rows"]) for row in rows] == [("teacher", 6), ("first", 6)]
    assert "6 of 6 rows kept" in err
    code, out, _ = run(capsys, folder / "export", "--exact-match", "off", "--rows", 4)
    assert code == 0
    assert "first" in out
    assert "KL (nats/token)" in out


@pytest.fixture
def alone(make_run, world, tmp_path):
    """An export far from its run's folder, as `raydistill export` leaves it; its rows and teacher are copies."""
    teacher, rows = tmp_path / "teacher", tmp_path / "rows.jsonl"
    shutil.copytree(world.teacher, teacher)
    shutil.copyfile(world.rows, rows)
    run = make_run("source", path=str(rows))
    start = require_start(run)
    start["config"]["student"]["model"] = str(teacher)
    held_out = rows_of_run(DataSection.model_validate(start["config"]["data"]), None)
    section = DataSection.model_validate(start["config"]["data"])
    start["held_out_fingerprint"] = fingerprint_of(encode_rows(held_out.rows, world.tokenizer, section))
    folder = tmp_path / "exports" / "student"
    shutil.copytree(run / "export", folder)
    (folder / "raydistill-source.json").write_text(json.dumps(source_of(start)))
    shutil.rmtree(run)
    return folder


def test_an_export_alone_brings_its_teacher_and_rows(capsys, alone):
    code, out, err = run(capsys, alone, "--json")
    assert code == 0
    rows = json.loads(out)
    assert [(row["name"], row["num_rows"]) for row in rows] == [("teacher", 6), ("student", 6)]
    assert "6 of 6 rows kept, those of the run (fingerprint " in err


def test_what_an_export_no_longer_finds_is_one_line(capsys, alone, world, tmp_path):
    rows, teacher = tmp_path / "rows.jsonl", tmp_path / "teacher"
    text = rows.read_text()
    rows.write_text(text.replace("####", "###"))
    code, out, err = run(capsys, alone)
    assert (code, out) == (2, "") and "no longer holds the rows that the run measured on" in err.splitlines()[-1]
    code, out, _ = run(capsys, alone, "--data", rows, "--exact-match", "off")
    assert code == 0 and "student" in out
    rows.unlink()
    code, _, err = run(capsys, alone)
    assert code == 2
    assert err == f"error: the held-out rows of run source were in {rows}, which is not there; give --data FILE\n"
    rows.write_text(text)
    shutil.rmtree(teacher)
    code, _, err = run(capsys, alone)
    assert code == 2
    assert err == f"error: the teacher of run source was {teacher}, which is not there; give --teacher MODEL\n"
    assert run(capsys, alone, "--teacher", world.teacher)[0] == 0


def test_the_rows_of_a_file_are_the_same_whatever_its_order(world, tmp_path):
    turned = tmp_path / "turned.jsonl"
    turned.write_text("".join(reversed(world.rows.read_text().splitlines(keepends=True))))
    assert [r.row_id for r in rows_of_file(turned, 5).rows] == [r.row_id for r in rows_of_file(world.rows, 5).rows]


def test_each_mistake_is_one_clear_line(capsys, world, export, make_run, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    teacher, data = ["--teacher", world.teacher], ["--data", world.rows]
    run_a, run_b = make_run("a"), make_run("b", eval_rows=3)
    cases = {
        "exports/none does not exist": ["exports/none", *teacher, *data],
        "did you mean": [export.parent / "int5", *teacher, *data],
        "is not a model: it holds no config.json": [empty, *teacher, *data],
        "nothing to measure on: give rows with --data FILE": [export, *teacher],
        "no teacher to compare with: give --teacher MODEL": [export, *data],
        "missing.jsonl does not exist": [export, *teacher, "--data", tmp_path / "missing.jsonl"],
        "has no export/ folder": [make_run("open", has_export=False)],
        "the run held out 6 rows": [run_a, "--rows", 7],
        "runs a and b have different held-out rows": [run_a, run_b],
        "two targets are called 'int4'": [export, export, *teacher, *data],
        "no/such-model does not exist here": [export, "--teacher", "no/such-model", *data],
    }
    for message, argv in cases.items():
        code, out, err = run(capsys, *argv)
        errors = [line for line in err.splitlines() if line.startswith("error:")]
        assert (code, out, len(errors)) == (2, "", 1), (message, err)
        assert message in errors[0], (message, errors)


def test_help_teaches_with_examples(capsys):
    with pytest.raises(SystemExit) as end:
        evaluate_command(["--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert "examples:" in out
    assert "raydistill evaluate outputs/runs/int2" in out


def test_wrong_switches_exit_with_2():
    for argv in ([], ["x", "--rows", "0"], ["x", "--exact-match", "maybe"]):
        with pytest.raises(SystemExit) as end:
            evaluate_command(argv)
        assert end.value.code == 2


def test_a_fresh_process_refuses_a_wrong_path_without_importing_torch(tmp_path):
    code = (
        "import sys; from raydistill.cli import main_with_errors;"
        "from raydistill.evaluate.command import evaluate_command;"
        f"code = main_with_errors(evaluate_command, [{str(tmp_path / 'x')!r}]);"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "does not exist" in done.stderr


def test_the_module_is_a_command_of_its_own():
    done = subprocess.run(
        [sys.executable, "-m", "raydistill.evaluate", "--help"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0
    assert "raydistill evaluate" in done.stdout


def test_rows_of_a_file_are_rendered_as_in_training(make_run, world, tmp_path):
    """Whatever the targets say about the template: a run by its record, an export by its raydistill.json."""
    variables = {"enable_thinking": True}
    folder = make_run("thinking", template=variables)
    switches = parser().parse_args([str(folder), "--data", str(world.rows)])
    assert make_plan(switches).template == variables
    alone = tmp_path / "alone"
    shutil.copytree(folder / "export", alone)
    manifest = json.loads((alone / "raydistill.json").read_text())
    arguments = [str(alone), "--data", str(world.rows), "--teacher", str(world.teacher)]
    assert make_plan(parser().parse_args(arguments)).template is None
    (alone / "raydistill.json").write_text(json.dumps({**manifest, "extra": {"template": {"enable_thinking": False}}}))
    assert make_plan(parser().parse_args(arguments)).template == {"enable_thinking": False}
    with pytest.raises(UserError, match=r"thinking was trained with .*true.*, alone with .*false.*one after the other"):
        make_plan(parser().parse_args([str(folder), str(alone), "--data", str(world.rows)]))


def test_prompts_are_those_of_the_student_whatever_the_teachers_template_says(capsys, world, export, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(world.teacher, teacher)
    (teacher / "chat_template.jinja").write_text("{{- raise_exception('the teacher speaks otherwise') -}}")
    table = {}
    for name, folder in (("own", world.teacher), ("other", teacher)):
        code, out, err = run(capsys, export, "--teacher", folder, "--data", world.rows, "--rows", 4, "--json")
        assert code == 0, err
        table[name] = [row["kl_nats"] for row in json.loads(out)]
    assert table["own"] == table["other"]
