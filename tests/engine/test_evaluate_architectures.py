"""An export of each tested architecture, evaluated from its folder, has the KL that its live student had."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import ARCHITECTURES, VOCAB_SIZE, Rows, make_world, write_model
from transformers import AutoModelForCausalLM

from raydistill.data.encode import encode_rows, num_known_ids
from raydistill.data.rows import read_rows
from raydistill.evaluate.folders import evaluate_folders
from raydistill.evaluate.held_out import answer_held_out, score_answers
from raydistill.evaluate.rows import file_section
from raydistill.evaluate.targets import Target
from raydistill.quant.export import export_live
from raydistill.quant.formats import WeightFormat, default_layout
from raydistill.quant.layouts import write_layout
from raydistill.quant.student import LoraSettings, adapter_state, load_adapter_state, prepare_student
from raydistill.tensors import CompletionModel

INT4 = WeightFormat(bits=4, group_size=32, symmetric=False, scale="searched")
LORA = LoraSettings(rank=4, alpha=8, targets=("q_proj", "v_proj", "down_proj"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    return make_world(tmp_path_factory.mktemp("world"), num_validation=8)


@pytest.fixture(scope="module")
def examples(rows: Rows) -> Any:
    return encode_rows(read_rows(rows.validation_path).rows, rows.tokenizer, file_section(256))


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_export_has_the_kl_of_its_live_student(rows: Rows, examples: Any, tmp_path: Path, name: str) -> None:
    teacher = write_model(name, rows.tokenizer, tmp_path / "teacher")
    student = prepare_student(load(teacher), INT4, "merged", LORA)
    noise = torch.Generator().manual_seed(0)
    state = {
        key: value + 0.05 * torch.randn(value.shape, generator=noise) for key, value in adapter_state(student).items()
    }
    load_adapter_state(student, state)
    export_live(tmp_path / "packed", student, teacher, {})
    layout = default_layout(INT4)
    write_layout(tmp_path / "packed", tmp_path / layout, layout)
    answers = answer_held_out(CompletionModel(load(teacher)), examples, num_ids=num_known_ids(rows.tokenizer))
    live = score_answers(CompletionModel(student), answers)
    targets = [Target(folder, tmp_path / folder) for folder in ("packed", layout)]
    first, *table = evaluate_folders(targets, teacher, examples, rows.tokenizer)
    assert first.kl_nats == pytest.approx(0, abs=1e-7)
    assert live.kl_nats is not None and live.kl_nats > 0.01
    for row in table:
        assert row.kl_nats == pytest.approx(live.kl_nats, abs=1e-6)
        assert row.perplexity == pytest.approx(live.perplexity, rel=1e-5)


def test_what_a_padded_head_says_about_its_padding_changes_no_kl(rows: Rows, examples: Any, tmp_path: Path) -> None:
    folder = write_model("llama", rows.tokenizer, tmp_path / "teacher")
    plain, loud = load(folder), load(folder)
    with torch.no_grad():
        loud.lm_head.weight[VOCAB_SIZE:] += 1.0
    known = num_known_ids(rows.tokenizer)
    assert known == VOCAB_SIZE < plain.config.vocab_size
    for teacher, student in ((plain, loud), (loud, plain)):
        kl = {
            num_ids: score_answers(
                CompletionModel(student), answer_held_out(CompletionModel(teacher), examples, num_ids=num_ids)
            ).kl_nats
            for num_ids in (known, None)
        }
        assert kl[known] == pytest.approx(0, abs=1e-6)
        assert kl[None] is not None and kl[None] > 0.01, "the padding has no mass, so this proves nothing"
