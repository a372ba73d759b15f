"""What the switches ask for, and every mistake in them as one clear line before anything heavy is imported."""

import json
from bisect import bisect_left
from pathlib import Path

import pytest
from finished_models import write_lora, write_run

from raydistill.cli import main_with_errors
from raydistill.data.rows import Message, Row
from raydistill.errors import UserError
from raydistill.evaluate.arguments import parser
from raydistill.evaluate.classify import Classification
from raydistill.evaluate.command import evaluate_command
from raydistill.evaluate.plan import make_plan
from raydistill.evaluate.recording import metrics_of
from raydistill.evaluate.rows import file_section
from raydistill.evaluate.task_names import _names_in, bundled_names, names_under
from raydistill.results.query import higher_is_better
from raydistill.results.tables import SHARES, Measure, SummaryRow
from raydistill.results.translate import clean_key


def plan_of(*argv):
    return make_plan(parser().parse_args([str(argument) for argument in argv]))


def run(capsys, *argv):
    code = main_with_errors(evaluate_command, [str(arg) for arg in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "wiki.txt"
    path.write_text("1 and 2 make 3.\n" * 40)
    return path


def test_texts_and_tasks_need_neither_rows_nor_a_teacher(world, text):
    plan = plan_of(world.other, "--text", text)
    assert (plan.rows, plan.teacher, plan.exact_match) == (None, None, "off")
    assert plan.texts is not None
    assert (plan.texts.convention, plan.texts.window, plan.texts.stride) == ("sliding", 1024, 512)
    blocks = plan_of(world.other, "--text", text, "--blocks").texts
    assert blocks is not None and (blocks.convention, blocks.window) == ("blocks", 2048)
    narrow = plan_of(world.other, "--text", text, "--window", 100).texts
    assert narrow is not None and (narrow.window, narrow.stride) == (100, 50)
    tasks = plan_of(world.other, "--tasks", "hellaswag, mmlu,hellaswag", "--limit", 5, "--max-new-tokens", 7).tasks
    assert tasks is not None and (tasks.names, tasks.limit, tasks.max_new_tokens) == (("hellaswag", "mmlu"), 5, 7)


def test_labels_take_the_place_of_the_runs_own_exact_match(world, tmp_path):
    folder = write_run(tmp_path / "runs" / "mine", world.teacher, world.rows)
    record = folder / "record.jsonl"
    record.write_text(record.read_text().replace('"exact_match":"off"', '"exact_match":"final_number"'))
    assert plan_of(folder, "--every-checkpoint").exact_match == "final_number"
    plan = plan_of(folder, "--every-checkpoint", "--classify")
    assert (plan.exact_match, plan.is_classification) == ("off", True)


def test_each_mistake_is_one_clear_line(capsys, world, text, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.touch()
    model = [world.other]
    cases = {
        "lm-eval has no task 'helaswag'; did you mean hellaswag?": [*model, "--tasks", "helaswag"],
        "--tasks names no task": [*model, "--tasks", ","],
        "is no folder; give one that holds TASK/SPLIT.jsonl": [*model, "--tasks", "arc_easy", "--task-data", text],
        "--limit has no effect without --tasks": [*model, "--text", text, "--limit", "3"],
        "--window has no effect without --text": [*model, "--tasks", "arc_easy", "--window", "8"],
        "--plot has no effect without --every-checkpoint": [*model, "--text", text, "-o", "x.png"],
        "--output has no effect without --record": [*model, "--text", text, "--output", "x"],
        "--stride has no effect with --blocks": [*model, "--text", text, "--blocks", "--stride", "4"],
        "--window 64 with --stride 64 leaves tokens without context": [
            *model, "--text", text, "--window", "64", "--stride", "64",
        ],
        "is no file; give a text file": [*model, "--text", tmp_path / "none.txt"],
        "two --text files are called wiki.txt": [*model, "--text", text, "--text", text],
        "empty.txt holds no text": [*model, "--text", empty],
        "--window 1024 does not fit the 256 positions": [*model, "--text", text],
        "--max-length 300 does not fit the 256 positions": [*model, "--tasks", "arc_easy", "--max-length", "300"],
        "--per-row": [*model, "--text", text, "--per-row", tmp_path],
        "--rows chooses among rows, and there are none": [*model, "--text", text, "--rows", "3"],
        "--classify and --exact-match are measured on rows: give --data FILE": [*model, "--text", text, "--classify"],
        "so they are no labels": [*model, "--data", world.rows, "--classify"],
        "nothing to measure on": model,
        "--every-checkpoint follows one run": [*model, "--every-checkpoint"],
    }  # fmt: skip
    for message, argv in cases.items():
        code, out, err = run(capsys, *argv)
        errors = [line for line in err.splitlines() if line.startswith("error:")]
        assert (code, out, len(errors)) == (2, "", 1), (message, err)
        assert message in errors[0], (message, errors)


@pytest.fixture
def nothing_measured(monkeypatch):
    monkeypatch.setattr("raydistill.evaluate.folders.evaluate_folders", lambda *_, **__: [])


@pytest.mark.usefixtures("nothing_measured")
@pytest.mark.parametrize("blocks", [[], ["--blocks"]])
@pytest.mark.parametrize(("engine", "longest"), [("hf", 256), ("vllm", 255)])
def test_windows_leave_room_for_the_token_that_vllm_adds(capsys, world, text, engine, longest, blocks):
    model = [world.other, "--text", text, "--engine", engine, *blocks, "--json", "--window"]
    assert run(capsys, *model, longest)[0] == 0
    code, _, err = run(capsys, *model, longest + 1)
    assert code == 2
    assert f"--window {longest + 1} does not fit the 256 positions that all of these models know" in err
    assert f"lower it to {longest} or less" in err


@pytest.mark.usefixtures("nothing_measured")
@pytest.mark.parametrize(("engine", "longest"), [("hf", 256), ("vllm", 255)])
def test_labels_leave_room_for_the_token_that_vllm_adds(capsys, world, tmp_path, engine, longest):
    def classify(num_tokens):
        rows = [(words(num_tokens), "yes"), ("1", "no")]
        data = tmp_path / "labels.jsonl"
        data.write_text("".join(json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in rows))
        return run(capsys, world.other, "--data", data, "--classify", "--engine", engine, "--json")

    def words(num_tokens):
        """A prompt that has so many tokens with the longer label."""
        text = "1" * bisect_left(range(400), num_tokens, key=lambda n: size("1" * n))
        assert size(text) == num_tokens
        return text

    def size(text):
        rows = [Row(str(n), (Message("user", text), Message("assistant", ("yes", "no")[n]))) for n in range(2)]
        return Classification(rows, world.tokenizer, file_section(256), [world.tokenizer.eos_token_id]).max_tokens

    assert classify(longest)[0] == 0
    code, _, err = classify(longest + 1)
    assert code == 2
    assert f"--classify: a row with a label has {longest + 1} tokens, which do not fit the 256 positions" in err
    assert f"leave out rows that have more than {longest} with any of the labels" in err


def test_text_labels_and_adapters_come_out_of_the_command(capsys, world, text, tmp_path):
    rows = [json.loads(line) for line in world.rows.read_text().splitlines()[:6]]
    data = tmp_path / "labels.jsonl"
    lines = [{"prompt": row["messages"][0]["content"], "answer": ("yes", "no")[n % 2]} for n, row in enumerate(rows)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    adapter = write_lora(world.teacher, tmp_path / "mine", 0)
    arguments = ["--data", data, "--classify", "--text", text, "--window", "64", "--per-row", tmp_path / "rows.jsonl"]
    code, out, err = run(capsys, adapter, world.other, *arguments, "--json")
    assert code == 0, err
    table = {row["name"]: row for row in json.loads(out)}
    assert list(table) == ["mine", "other"]
    assert table["mine"]["extras"] == {"format": "none + r4"}
    for row in table.values():
        assert row["kl_nats"] is None and row["perplexity"] > 1
        assert set(row["measures"]) == {"accuracy", "wiki.txt perplexity", "wiki.txt bits/byte"}
        assert row["measures"]["accuracy"]["is_share"]
    assert table["mine"]["measures"] != table["other"]["measures"]
    assert "no teacher; " in err and "6 rows, labels 'no', 'yes'" in err
    measures = {json.loads(line)["measure"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()}
    assert measures == {"cross_entropy_nats", "accuracy", "wiki.txt nats"}


def test_the_checkpoints_of_a_run_are_a_table_and_a_picture(capsys, world, tmp_path):
    folder = write_run(tmp_path / "runs" / "mine", world.teacher, world.rows)
    code, out, err = run(capsys, folder, "--every-checkpoint", "--json")
    assert code == 0, err
    rows = json.loads(out)
    assert [row["name"] for row in rows] == ["teacher", "step 0", "step 2", "step 4"]
    kls = [row["kl_nats"] for row in rows]
    assert kls[0] == pytest.approx(0, abs=1e-7) and kls[1] < kls[2] < kls[3], "noise grows with the version"
    assert rows[1]["kl_se"] > 0
    assert (folder / "plots" / "checkpoints.png").read_bytes().startswith(b"\x89PNG")
    assert f"plot: {folder / 'plots' / 'checkpoints.png'}" in err
    assert run(capsys, folder, "--every-checkpoint", "-o", tmp_path / "c.png")[0] == 0
    assert (tmp_path / "c.png").exists()


def test_names_are_read_from_yaml_of_every_form(tmp_path):
    (tmp_path / "a.yaml").write_text("group: g\ntask:\n  - one\n  - two\n")
    (tmp_path / "b.yaml").write_text('"task": "one"\n"tag": "t1"\n')
    (tmp_path / "c.yaml").write_text("task: two\ntag:\n  - t1\n  - t2\nprocess_docs: !function utils.f\n")
    found = names_under(tmp_path)
    assert {name: [path.name for path in paths] for name, paths in found.items()} == {
        "g": ["a.yaml"], "one": ["b.yaml"], "t1": ["b.yaml", "c.yaml"], "two": ["c.yaml"], "t2": ["c.yaml"],
    }  # fmt: skip
    for path in tmp_path.glob("*.yaml"):  # lm-eval's own files are read without a parser, to the same end
        assert set(_names_in(path.read_text())) == {name for name, paths in found.items() if path in paths}
    (tmp_path / "d.yaml").write_text("task: [")
    with pytest.raises(UserError, match=r"d\.yaml is no YAML: while parsing"):
        names_under(tmp_path)


def test_lm_evals_common_tasks_are_known():
    known = bundled_names()
    for name in ("hellaswag", "arc_easy", "winogrande", "mmlu", "mmlu_anatomy", "gsm8k", "wikitext", "ai2_arc"):
        assert all(name in path.read_text() for path in known[name])


def test_metrics_of_a_recorded_row_have_the_names_of_a_runs_and_none_that_the_store_refuses():
    share, number = (Measure(value=0.5, se=0.1, is_share=True), Measure(value=2.0, se=None, is_share=False))
    measures = {"gsm8k exact_match (strict-match)": share, "wiki.txt bits/byte": number}
    row = SummaryRow(name="s", role="student", kl_nats=0.1, bytes=7, exact_match=0.9, measures=measures)
    assert metrics_of(row, "s/") == {
        "evaluate/s/kl_nats": 0.1,
        "evaluate/s/exact_match": 0.9,
        "evaluate/s/bytes": 7.0,
        "evaluate/s/gsm8k_exact_match.strict-match": 0.5,
        "evaluate/s/gsm8k_exact_match.strict-match_se": 0.1,
        "evaluate/s/wiki.txt_bits_per_byte": 2.0,
    }
    assert all(clean_key(name) == name for name in metrics_of(row, "s/"))
    assert higher_is_better("evaluate/gsm8k_exact_match.strict-match")
    assert not higher_is_better("evaluate/wiki.txt_bits_per_byte")


def test_every_share_that_a_task_measures_is_better_the_higher_it_is():
    for metric in (*SHARES, "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match (flexible-extract)", "f1 (own)"):
        row = SummaryRow(
            name="s", role="student", kl_nats=None, bytes=7,
            measures={f"a.task {metric}": Measure(value=0.5, se=0.1, is_share=True)},
        )  # fmt: skip
        share, error = sorted(metrics_of(row).keys() - {"evaluate/bytes"}, key=len)
        assert higher_is_better(share), share
        assert not higher_is_better(error), "a spread is no merit"
    for name in ("evaluate/mc2_perplexity", "trainer/kl_nats", "evaluate/em_word_perplexity", "rollout/problem"):
        assert not higher_is_better(name), name
    assert higher_is_better("rollout/tokens_per_s") and higher_is_better("evaluate/accuracy")
