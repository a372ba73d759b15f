"""`evaluate` on CUDA: the numbers of the CPU, with the teacher on one device and spread over two."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from raydistill.data.encode import encode_rows
from raydistill.data.rows import read_rows
from raydistill.evaluate import loading
from raydistill.evaluate.folders import evaluate_folders
from raydistill.evaluate.ptq import export_ptq
from raydistill.evaluate.rows import file_section
from raydistill.evaluate.targets import Target
from raydistill.quant.formats import WeightFormat
from raydistill.results.tables import SummaryRow

pytestmark = pytest.mark.gpu
INT4 = WeightFormat(bits=4, group_size=32, symmetric=False, scale="searched")


def table(world: Any, export: Path) -> list[SummaryRow]:
    tokenizer = AutoTokenizer.from_pretrained(world.teacher_folder)
    examples = encode_rows(read_rows(world.test_path).rows, tokenizer, file_section(256))
    target = Target("int4", export)
    return evaluate_folders([target], world.teacher_folder, examples, tokenizer, "final_number", max_new_tokens=32)


@pytest.fixture(scope="module")
def on_cpu(tiny_world: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[SummaryRow]]:
    export = tmp_path_factory.mktemp("exports") / "int4"
    export_ptq(tiny_world.teacher_folder, INT4, export)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "default_device", lambda: "cpu")
        patch.setattr(loading, "free_gpu_memory", list)
        return export, table(tiny_world, export)


def check(found: list[SummaryRow], expected: list[SummaryRow]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.kl_nats == pytest.approx(theirs.kl_nats, abs=1e-4)
        assert mine.perplexity == pytest.approx(theirs.perplexity, rel=1e-3)
        assert mine.exact_match == pytest.approx(theirs.exact_match, abs=0.05)


def test_one_gpu_gives_the_numbers_of_the_cpu(tiny_world: Any, on_cpu: tuple[Path, list[SummaryRow]]) -> None:
    check(table(tiny_world, on_cpu[0]), on_cpu[1])


@pytest.mark.gpu(num=2)
def test_a_teacher_over_two_gpus_gives_the_numbers_of_the_cpu(
    tiny_world: Any, on_cpu: tuple[Path, list[SummaryRow]], monkeypatch: pytest.MonkeyPatch
) -> None:
    size, places = loading.dense_bytes(tiny_world.teacher_folder), []
    monkeypatch.setattr(loading, "free_gpu_memory", lambda: [2 * size, 10 * size])
    real = loading.load_causal_lm
    monkeypatch.setattr(loading, "load_causal_lm", lambda *asked: places.append(real(*asked)) or places[-1])
    check(table(tiny_world, on_cpu[0]), on_cpu[1])
    assert set(places[0].hf_device_map.values()) == {0, 1}
