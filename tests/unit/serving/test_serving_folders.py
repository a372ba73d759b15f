"""What vLLM is given of a student trained in served mode: base and adapter wherever their sum would be rounded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raydistill.actors.vllm_folders import runnable_folder
from raydistill.quant.export import export_live, load_exported, read_manifest
from raydistill.quant.layouts import write_layout
from raydistill.serving.serve import plan_server


def packed_student(tiny: Any, place: Path, dtype: torch.dtype) -> tuple[Any, Path]:
    """(live student in served mode, its packed export)."""
    tiny.model(dtype=dtype).save_pretrained(place / "base")
    student = tiny.student("served", tiny.int2, dtype=dtype)
    export_live(place / "student", student, place / "base", {})
    return student, place / "student"


def test_a_bfloat16_student_is_served_as_base_and_adapter(tiny: Any, tmp_path: Path) -> None:
    student, packed = packed_student(tiny, tmp_path, torch.bfloat16)
    copy = runnable_folder(packed, takes_int4=True)
    assert copy.name == "student.dequantized" and (copy / "adapter" / "adapter_config.json").is_file()
    assert torch.equal(tiny.logits(load_exported(copy)), tiny.logits(student))
    for is_cpu in (True, False):
        command = " ".join(plan_server(copy, 1, "mine", [], is_cpu).arguments)
        assert f"--lora-modules mine={copy / 'adapter'} --max-lora-rank 8" in command
        assert "--enable-lora" in command and "--dtype bfloat16" in command


def test_a_float32_student_is_served_as_one_model_in_float32(tiny: Any, tmp_path: Path) -> None:
    student, packed = packed_student(tiny, tmp_path, torch.float32)
    copy = runnable_folder(packed, takes_int4=True)
    assert not (copy / "adapter").exists()
    torch.testing.assert_close(tiny.logits(load_exported(copy)), tiny.logits(student), rtol=1e-5, atol=1e-5)
    for is_cpu in (True, False):
        command = " ".join(plan_server(copy, 1, "mine", [], is_cpu).arguments)
        assert "lora" not in command and "--dtype float32" in command, "left alone, vLLM takes bfloat16"


@pytest.mark.parametrize(("dtype", "is_merged"), [(torch.bfloat16, True), (torch.float32, False)])
def test_a_plain_copy_that_has_the_adapter_elsewhere_is_written_again(tiny, tmp_path, dtype, is_merged) -> None:
    _, packed = packed_student(tiny, tmp_path, dtype)
    copy = runnable_folder(packed, takes_int4=True)
    source = {"source": read_manifest(copy)["extra"]["source"]}
    made = load_file(copy / "model.safetensors")
    other = tmp_path / "other"
    write_layout(packed, other, "dequantized", merge_adapter=is_merged, extra=source)
    copy.rename(tmp_path / "aside")
    other.rename(copy)
    assert runnable_folder(packed, takes_int4=True) == copy
    again = load_file(copy / "model.safetensors")
    assert all(torch.equal(again[name], made[name]) and again[name].dtype == made[name].dtype for name in made)
