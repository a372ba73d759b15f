"""lm-eval's tasks, texts, labels and answers on real models: our numbers are lm-eval's own, and vLLM's are transformers'.

vLLM runs in the process that `evaluate` starts for it, once for this module; engines follow one another there.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from finished_models import write_lora, write_run
from task_rows import write_task_data
from transformers import AutoModelForCausalLM, AutoTokenizer

from raydistill.cli import main_with_errors
from raydistill.config import Config
from raydistill.data.encode import encode_rows
from raydistill.data.rows import Message, Row, read_rows
from raydistill.errors import DataError, UserError
from raydistill.evaluate import vllm_answerer
from raydistill.evaluate.answerers import HfAnswerer
from raydistill.evaluate.classify import Classification
from raydistill.evaluate.command import evaluate_command
from raydistill.evaluate.folders import evaluate_folders
from raydistill.evaluate.harness import HarnessTasks
from raydistill.evaluate.harness_model import HarnessModel
from raydistill.evaluate.harness_tasks import TaskRequest, known_tasks, load_tasks
from raydistill.evaluate.measured import Measured
from raydistill.evaluate.paired import RowValues
from raydistill.evaluate.ptq import export_ptq
from raydistill.evaluate.rows import file_section
from raydistill.evaluate.targets import Target, find_targets
from raydistill.evaluate.text import TextPerplexity, tokenize
from raydistill.ptq.baselines import Baseline
from raydistill.quant.export import export_live
from raydistill.quant.formats import WeightFormat
from raydistill.quant.layouts import write_layout
from raydistill.quant.student import LoraSettings, adapter_state, load_adapter_state, prepare_student
from raydistill.results.tables import SummaryRow
from raydistill.study import measure as measuring
from raydistill.study.decision import compare_rows
from raydistill.study.decision_table import decision_markdown

pytestmark = pytest.mark.engine

TASKS = ("hellaswag", "arc_easy", "arc_challenge", "winogrande", "mmlu_anatomy", "gsm8k", "wikitext")
MAX_LENGTH = 190  # input tokens: shorter than the wikitext pages, so that windows roll
NEW_TOKENS = 40
INT4 = WeightFormat(bits=4, group_size=32, symmetric=False, scale="searched")
GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"
WIKITEXT = Path(__file__).parents[3] / "shared" / "data" / "wikitext-2" / "test.txt"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Data sets that were read are kept here, not in the home folder."""
    import datasets

    before, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task_data(tmp_path_factory.mktemp("tasks"))


def request_of(names: tuple[str, ...], data: Path | None, **settings: Any) -> TaskRequest:
    defaults = {"num_fewshot": None, "limit": None, "max_new_tokens": NEW_TOKENS, "is_chat": False}
    return TaskRequest(names=names, known=known_tasks(names, data), data=data, **(defaults | settings))


def tasks_of(request: TaskRequest, tokenizer: Any, template: Mapping[str, Any] | None = None) -> HarnessTasks:
    settings = (request.num_fewshot, request.limit, request.max_new_tokens)
    return HarnessTasks(load_tasks(request), tokenizer, template, MAX_LENGTH, *settings)


@dataclass(frozen=True, kw_only=True)
class Loaded:
    model: Any
    tokenizer: Any

    @property
    def answerer(self) -> HfAnswerer:
        return HfAnswerer(self.model, self.tokenizer, [self.tokenizer.eos_token_id], 512)


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> Loaded:
    return Loaded(
        model=AutoModelForCausalLM.from_pretrained(tiny_model).eval(),
        tokenizer=AutoTokenizer.from_pretrained(tiny_model),
    )


@pytest.mark.parametrize("is_chat", [False, True], ids=["plain", "chat"])
def test_every_kind_of_task_has_the_numbers_of_lm_evals_own_model(loaded: Loaded, data: Path, is_chat: bool) -> None:
    """Multiple choice, two contexts for one end, greedy answers with stop texts, rolling log-likelihood."""
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    ours = tasks_of(request_of(TASKS, data), loaded.tokenizer, {} if is_chat else None)
    told: list[int] = []
    found = ours.measure(loaded.answerer, told.append)
    assert told == sorted(told) and told[-1] == ours.num_sequences

    stock = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, max_length=MAX_LENGTH, batch_size=1)
    tasks = {name: task for one in load_tasks(request_of(TASKS, data)) for name, task in one.tasks.items()}
    for task in tasks.values():
        task.set_config("num_fewshot", task.get_config("num_fewshot") or 0)
        task.set_fewshot_seed(1234)
    tasks["gsm8k"].set_config("generation_kwargs", {"max_gen_toks": NEW_TOKENS}, update=True)
    theirs = evaluate(lm=stock, task_dict={"tasks": tasks}, apply_chat_template=is_chat, fewshot_as_multiturn=True)

    compared = 0
    for name, results in theirs["results"].items():
        for key, value in results.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            column = f"{name} {metric}" if kind == "none" else f"{name} {metric} ({kind})"
            assert found.measures[column]["value"] == pytest.approx(value, rel=1e-4), column
            error = results[f"{metric}_stderr,{kind}"]
            assert found.measures[column]["se"] is not None
            if error != "N/A":
                assert found.measures[column]["se"] == pytest.approx(error)
            compared += 1
    assert compared == len(found.measures) == 13
    for document, mine in zip(
        theirs["samples"]["wikitext"], found.rows["wikitext bits_per_byte"].values_R, strict=True
    ):
        assert mine == pytest.approx(-document["bits_per_byte"][0], rel=1e-5)


def test_documents_count_row_by_row_and_give_the_numbers_of_the_table(loaded: Loaded, data: Path) -> None:
    found = tasks_of(request_of(("arc_easy", "wikitext"), data), loaded.tokenizer).measure(loaded.answerer)
    accuracy, bits = found.rows["arc_easy acc"], found.rows["wikitext bits_per_byte"]
    assert accuracy.mean == pytest.approx(found.measures["arc_easy acc"]["value"])
    assert accuracy.standard_error == pytest.approx(found.measures["arc_easy acc"]["se"])
    assert bits.mean / math.log(2) == pytest.approx(found.measures["wikitext bits_per_byte"]["value"])
    assert len(set(accuracy.row_ids)) == 8


def test_groups_and_tags_are_summed_up_as_lm_eval_does(loaded: Loaded, data: Path, tmp_path: Path) -> None:
    found = tasks_of(request_of(("ai2_arc",), data), loaded.tokenizer).measure(loaded.answerer)
    assert {name for name in found.measures if name.endswith(" acc")} == {"arc_easy acc", "arc_challenge acc"}
    group = {
        "group": "two_subjects",
        "task": ["mmlu_anatomy", "mmlu_astronomy"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    own = write_task_data(tmp_path / "own")
    (own / "group.yaml").write_text(json.dumps(group))
    found = tasks_of(request_of(("two_subjects",), own), loaded.tokenizer).measure(loaded.answerer)
    assert set(found.measures) == {"two_subjects acc"}
    rows = [found.rows[f"{name} acc"].values_R for name in group["task"]]
    assert found.measures["two_subjects acc"]["value"] == pytest.approx(np.concatenate(rows).mean())


def test_a_task_of_ones_own_runs_from_its_yaml(loaded: Loaded, tmp_path: Path) -> None:
    rows = [{"q": f"{n} + 1 =", "a": str(n + 1)} for n in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "task": "plus_one", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "doc_to_text": "{{q}}", "doc_to_target": "{{a}}", "doc_to_choice": ["1", "2", "3", "4", "5"],
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (tmp_path / "plus_one.yaml").write_text(json.dumps(config))
    found = tasks_of(request_of(("plus_one",), tmp_path, limit=3), loaded.tokenizer).measure(loaded.answerer)
    assert len(found.rows["plus_one acc"].row_ids) == 3


def test_examples_come_from_their_split_and_change_the_prompts(loaded: Loaded, data: Path) -> None:
    (none,) = load_tasks(request_of(("arc_easy",), data))
    prompts = {}
    for shots in (0, 2):
        measurement = tasks_of(request_of(("arc_easy",), data, num_fewshot=shots), loaded.tokenizer)
        measurement.measure(loaded.answerer)
        prompts[shots] = measurement._all["arc_easy"].instances[-1].args[0]
    assert prompts[2].endswith(prompts[0]) and prompts[2].count("Answer:") == prompts[0].count("Answer:") + 2
    assert none.tasks["arc_easy"].get_config("num_fewshot") is None


def test_the_students_template_variables_reach_the_prompts(loaded: Loaded) -> None:
    tokenizer = AutoTokenizer.from_pretrained(loaded.tokenizer.name_or_path)
    tokenizer.chat_template = (
        "{%- if messages[0].role == 'system' -%}{{- raise_exception('no system role') -}}{%- endif -%}"
        "{%- for m in messages -%}{{- m.role + ':' + m.content + '|' -}}{%- endfor -%}"
        "{%- if enable_thinking is defined and not enable_thinking -%}{{- '<think></think>' -}}{%- endif -%}"
    )
    model = HarnessModel(loaded.answerer, tokenizer, {"enable_thinking": False}, MAX_LENGTH)
    chat = [{"role": "user", "content": "q"}]
    assert model.apply_chat_template(chat) == "user:q|<think></think>"
    with_system = [{"role": "system", "content": "be brief"}, *chat]
    assert model.apply_chat_template(with_system) == "user:be brief\n\nq|<think></think>"


def test_what_a_task_lacks_is_one_line_that_names_it(data: Path, tmp_path: Path) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for name in ("arc_easy", "winogrande", "hellaswag"):
        (tmp_path / name).mkdir()
    (tmp_path / "winogrande" / "validation.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "hellaswag" / "test.jsonl").write_text("{}\n")
    (tmp_path / "arc_easy" / "test.jsonl").write_text((data / "arc_easy" / "test.jsonl").read_text())
    cases: dict[str, tuple[Any, ...]] = {
        "task gsm8k needs the data set openai/gsm8k, which is neither cached here nor can be downloaded; give its rows with "
        "--task-data DIR as DIR/gsm8k/test.jsonl": ("gsm8k", None),
        "task mmlu_abstract_algebra needs the data set cais/mmlu": ("mmlu", data),
        "task winogrande: lm-eval cannot use the rows in": ("winogrande", tmp_path),
        "task hellaswag is measured on split 'validation': put its rows into": ("hellaswag", tmp_path),
        "task arc_easy takes its 5 examples from split 'train': put them into": ("arc_easy", tmp_path, 5),
        "task gsm8k_cot_self_consistency samples its answers": ("gsm8k_cot_self_consistency", "cot"),
    }
    for message, (name, folder, *shots) in cases.items():
        if folder == "cot":  # rows that it can be loaded with, so that its settings are seen
            folder = tmp_path / "cot"
            (folder / name).mkdir(parents=True)
            for split in ("train", "test"):
                (folder / name / f"{split}.jsonl").write_text((data / "gsm8k" / f"{split}.jsonl").read_text())
        with pytest.raises((DataError, UserError)) as error:
            load_tasks(request_of((name,), folder, num_fewshot=shots[0] if shots else None))
        assert message in str(error.value) and "\n" not in str(error.value), str(error.value)


def test_offline_and_without_rows_the_command_says_one_line(tiny_model: Path, tmp_path: Path) -> None:
    """In a process of its own, as a user's: whatever a library says while it is imported would be seen."""
    done = subprocess.run(
        [sys.executable, "-m", "raydistill", "evaluate", str(tiny_model), "--tasks", "gsm8k"],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[0] == "loading"
    (line,) = done.stderr.splitlines()[1:]
    assert line.startswith("error: task gsm8k needs the data set openai/gsm8k, which is neither cached here nor can be")


def test_a_study_measures_its_tasks_and_looks_for_their_rows_before_it_starts(
    tiny_world: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one evaluating process is this one; the table's columns and tests come from lm-eval's own numbers."""

    def here(command: list[str], **_: Any) -> SimpleNamespace:
        code = main_with_errors(evaluate_command, command[3:])
        return SimpleNamespace(returncode=code, stdout=capsys.readouterr().out)

    monkeypatch.setattr(measuring, "subprocess", SimpleNamespace(run=here, PIPE=subprocess.PIPE))
    base = tiny_world.teacher_folder
    export_ptq(base, replace(INT4, bits=2), tmp_path / "int2")
    run = write_run(tmp_path / "runs" / "mine", base, tiny_world.train_path, versions=())
    export_ptq(base, INT4, run / "export")
    study = {"tasks": ("arc_easy", "wikitext"), "task_data": data, "task_limit": 6, "test_rows": 4}
    model = {"model": str(base)}
    config = Config.model_validate({"student": model, "teacher": model, "study": study})
    measuring.check_tasks(config.study)
    ptq = Baseline(method="rtn", width="int2", folder=str(tmp_path / "int2"), format="int2", kl_nats={})
    rows, values = measuring.measure(
        config, [ptq], {"mine": run / "export"}, {}, tiny_world.test_path, tmp_path / "rows.jsonl"
    )
    assert [row.name for row in rows] == ["teacher", "rtn-int2", "mine"]
    assert values["mine"]["arc_easy acc_norm"].values_R.size == 6
    table = decision_markdown(compare_rows(rows, values, "rtn-int2", {}, {}, {}), "rtn-int2").splitlines()
    assert "| perplexity | p | arc_easy acc_norm | p | wikitext word_perplexity | p | device-s |" in table[0]
    assert table[4].startswith("| mine |") or table[4].startswith("| **mine**")
    assert [cell.count("±") for cell in table[4].split("|")[-8:-2]] == [1, 0, 1, 0, 1, 0], table[4]

    with pytest.raises(UserError, match=r"study.tasks \(their rows: study.task_data\): task gsm8k needs the data set"):
        measuring.check_tasks(config.study.model_copy(update={"tasks": ("gsm8k",), "task_data": None}))


class SaysItself:
    """A measurement of which continuations are what the model itself would say: its own answers, and others."""

    what, max_tokens = "its own answers", 200

    def __init__(self, prompts: list[Any]) -> None:
        self._prompts, self.num_sequences = prompts, 2 * len(prompts)

    def measure(self, model: Any, on_done: Any = None) -> Measured:
        answers = model.answers(self._prompts, 8)
        changed = [[*answer[:-1], (answer[-1] + 1) % 400] for answer in answers]
        pairs = [
            (prompt, rest) for rests in (answers, changed) for prompt, rest in zip(self._prompts, rests, strict=True)
        ]
        found = np.array([float(one.is_greedy) for one in model.likelihoods(pairs)])
        ids = tuple(str(number) for number in range(len(pairs)))
        return Measured(
            measures={}, rows={"itself": RowValues(row_ids=ids, values_R=found, weights_R=np.ones_like(found))}
        )


@dataclass(frozen=True, kw_only=True)
class Both:
    """The same comparison by transformers and by vLLM."""

    hf: list[SummaryRow]
    vllm: list[SummaryRow]
    hf_rows: dict[str, Any]
    vllm_rows: dict[str, Any]
    num_starts: int


@pytest.fixture(scope="module")
def both(tiny_world: Any, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Both:
    """The teacher, two adapters over it, two checkpoints of a run that started from it, and two exports."""
    root, base = tmp_path_factory.mktemp("both"), tiny_world.teacher_folder
    adapters = [str(write_lora(base, root / name, seed)) for seed, name in enumerate(("first", "second"))]
    run = write_run(root / "runs" / "mine", base, tiny_world.train_path, versions=(1, 3))
    export_ptq(base, INT4, root / "packed")
    student = prepare_student(
        AutoModelForCausalLM.from_pretrained(base), INT4, "served", LoraSettings(rank=2, alpha=4, targets=("q_proj",))
    )
    noise = torch.Generator().manual_seed(0)
    state = {key: 0.1 * torch.randn(value.shape, generator=noise) for key, value in adapter_state(student).items()}
    load_adapter_state(student, state)
    export_live(root / "packed-served", student, base, {})
    write_layout(root / "packed-served", root / "served", "dequantized")
    exports = [Target(name, root / name) for name in ("packed", "served")]
    targets = [
        Target("base", base),
        *find_targets(adapters)[0],
        *find_targets([str(run)], every_checkpoint=True)[0],
        *exports,
    ]
    tokenizer = AutoTokenizer.from_pretrained(base)
    stop_ids, section = [tokenizer.eos_token_id], file_section(256)
    rows = list(islice(read_rows(tiny_world.test_path).rows, 6))
    labels = [Row(f"l{n}", (row.messages[0], Message("assistant", ("yes", "no")[n % 2]))) for n, row in enumerate(rows)]
    text = "\n\n".join(row.messages[0].content for row in rows)
    examples = encode_rows(rows, tokenizer, section)
    tables, row_scores, starts = {}, {}, []

    class Counted(vllm_answerer.VllmProcess):
        def close(self) -> None:
            starts.append(self.num_starts)
            super().close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_answerer, "VllmProcess", Counted)
        for engine in ("hf", "vllm"):
            scores: dict[str, Any] = {}
            tables[engine] = evaluate_folders(
                targets,
                None,
                examples,
                tokenizer,
                "final_number",
                NEW_TOKENS,
                on_rows=scores.__setitem__,
                measurements=[
                    TextPerplexity(tokenize("text", text, tokenizer), "sliding", 64, 32),
                    Classification(labels, tokenizer, section, stop_ids),
                    tasks_of(request_of(TASKS, data), tokenizer),
                    SaysItself([example.prompt_ids for example in examples]),
                ],
                engine=engine,  # type: ignore[arg-type]
            )
            row_scores[engine] = scores
    (num_starts,) = starts
    return Both(
        hf=tables["hf"],
        vllm=tables["vllm"],
        hf_rows=row_scores["hf"],
        vllm_rows=row_scores["vllm"],
        num_starts=num_starts,
    )


def test_one_engine_start_serves_all_that_lies_over_one_base(both: Both) -> None:
    """Base and adapters; the checkpoints, whose weights are rebuilt in place; two exports, one of them with its adapter."""
    assert [row.name for row in both.vllm] == ["base", "first", "second", "step 1", "step 3", "packed", "served"]
    assert both.num_starts == 4


def test_vllm_and_transformers_agree_on_every_measure_of_every_model(both: Both) -> None:
    for hf, vllm in zip(both.hf, both.vllm, strict=True):
        assert hf.measures.keys() == vllm.measures.keys() and len(hf.measures) == 17
        for name, measure in hf.measures.items():
            assert vllm.measures[name]["value"] == pytest.approx(measure["value"], rel=1e-4), (hf.name, name)
        assert hf.exact_match == vllm.exact_match
        for name, rows in both.hf_rows[hf.name].items():
            np.testing.assert_allclose(both.vllm_rows[hf.name][name].values_R, rows.values_R, rtol=1e-4, atol=1e-4)


def test_both_engines_know_what_they_would_have_said(both: Both) -> None:
    for found in (both.hf_rows, both.vllm_rows):
        assert all(rows["itself"].values_R.tolist() == [1.0] * 6 + [0.0] * 6 for rows in found.values())


def test_the_models_are_really_different(both: Both) -> None:
    """Else agreement would prove nothing about which one answered."""
    perplexities = [row.measures["text perplexity"]["value"] for row in both.vllm]
    assert len({round(value, 3) for value in perplexities}) == len(perplexities)


@pytest.mark.skipif(not (GSM8K.exists() and WIKITEXT.exists()), reason=f"needs {GSM8K} and {WIKITEXT}")
def test_real_gsm8k_and_wikitext_by_the_command(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "wiki.txt"
    text.write_text("\n".join(WIKITEXT.read_text().splitlines()[:40]))
    arguments = ["--tasks", "gsm8k", "--task-data", str(GSM8K.parent), "--num-fewshot", "1", "--limit", "4"]
    arguments += ["--max-new-tokens", "16", "--text", str(text), "--window", "128", "--stride", "64", "--json"]
    scores = tmp_path / "scores.parquet"
    code = main_with_errors(evaluate_command, [f"tiny={tiny_model}", *arguments, "--per-row", str(scores)])
    out, err = capsys.readouterr()
    assert code == 0, err
    (row,) = json.loads(out)
    assert (row["name"], row["kl_nats"], row["perplexity"]) == ("tiny", None, None)
    names = {"wiki.txt perplexity", "wiki.txt bits/byte", "gsm8k exact_match (strict-match)"}
    assert names < row["measures"].keys()
    assert row["measures"]["wiki.txt bits/byte"]["se"] > 0
    assert "4 documents of 1 tasks, as plain text, 1 examples, 510 tokens at most" in err
    from pyarrow import parquet

    table = parquet.read_table(scores).to_pylist()
    assert {line["measure"] for line in table} >= {"wiki.txt nats", "gsm8k exact_match (strict-match)"}
    nats = [line for line in table if line["measure"] == "wiki.txt nats"]
    mean = sum(line["value"] for line in nats) / sum(line["tokens"] for line in nats)
    assert math.exp(mean) == pytest.approx(row["measures"]["wiki.txt perplexity"]["value"])
