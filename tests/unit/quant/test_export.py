"""An exported folder stands alone, computes exactly what the live student computed, and notices damage."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from raydistill.errors import QuantError
from raydistill.quant.baselines import apply_ptq
from raydistill.quant.export import export_live, export_student, load_exported, packed_bytes, read_manifest
from raydistill.quant.hashing import hash_codes
from raydistill.quant.student import rebuild_codes, student_codes

MODES = ["merged", "served", "none"]


@pytest.fixture
def base(tiny, tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    tiny.model().save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fmt", ["int2", "int4", None])
def test_an_export_computes_exactly_what_the_live_student_does(tiny, base, tmp_path, mode, fmt) -> None:
    student = tiny.student(mode, getattr(tiny, fmt) if fmt else None)
    written = export_live(tmp_path / "out", student, base, {"version": 3})
    loaded = load_exported(tmp_path / "out")
    assert torch.equal(tiny.logits(loaded), tiny.logits(student))
    assert written == hash_codes(student_codes(student)) == read_manifest(tmp_path / "out")["codes_hash"]
    assert read_manifest(tmp_path / "out")["extra"] == {"version": 3}
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_an_untied_head_and_biases_are_exported(tiny, tmp_path) -> None:
    tiny.model("llama").save_pretrained(tmp_path / "base")
    student = tiny.student("merged", family="llama")
    export_live(tmp_path / "out", student, tmp_path / "base", {})
    assert torch.equal(tiny.logits(load_exported(tmp_path / "out")), tiny.logits(student))
    assert "lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")


def test_a_tied_head_is_stored_once_and_codes_are_dense(tiny, base, tmp_path) -> None:
    student = tiny.student("merged")
    export_live(tmp_path / "out", student, base, {})
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    packed = tensors["model.layers.0.mlp.up_proj.weight_packed"]
    assert (packed.dtype, packed.numel()) == (torch.uint8, 64 * 32 // 4)
    assert tensors["model.layers.0.mlp.up_proj.weight_zero_point"].numel() == 64 * 2 // 4
    assert packed_bytes(tmp_path / "out") == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert packed_bytes(tmp_path / "out") < 0.5 * packed_bytes(base)


def test_a_served_adapter_is_in_pefts_format_and_counts_as_bytes(tiny, base, tmp_path) -> None:
    student = tiny.student("served")
    export_live(tmp_path / "out", student, base, {})
    plain = tiny.model()
    apply_ptq(plain, tiny.int2)
    with_peft = PeftModel.from_pretrained(plain, tmp_path / "out" / "adapter")
    assert torch.equal(tiny.logits(with_peft), tiny.logits(student))
    sizes = [path.stat().st_size for path in (tmp_path / "out").rglob("*.safetensors")]
    assert len(sizes) == 2
    assert packed_bytes(tmp_path / "out") == sum(sizes)


def test_a_ptq_baseline_exports_from_codes_alone(tiny, base, tmp_path) -> None:
    model = tiny.model()
    codes = apply_ptq(model, tiny.int4)
    export_student(tmp_path / "out", base, codes, fmt=tiny.int4, mode="merged")
    assert torch.equal(tiny.logits(load_exported(tmp_path / "out")), tiny.logits(model))
    weights = {name: module.weight for name, module in tiny.model().named_modules() if name in codes}
    assert hash_codes(rebuild_codes(weights, {}, tiny.int4, 1.0, "served")) == hash_codes(codes)


def test_a_bfloat16_student_comes_back_in_bfloat16_or_as_asked(tiny, tmp_path) -> None:
    tiny.model(dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    student = tiny.student("merged", dtype=torch.bfloat16)
    export_live(tmp_path / "out", student, tmp_path / "base", {})
    assert torch.equal(tiny.logits(load_exported(tmp_path / "out")), tiny.logits(student))
    assert next(load_exported(tmp_path / "out", torch.float32).parameters()).dtype == torch.float32


def test_a_plain_folder_loads_as_the_model_it_is(tiny, base) -> None:
    assert torch.equal(tiny.logits(load_exported(base)), tiny.logits(tiny.model()))


def test_a_second_export_replaces_the_first_and_nothing_else_is_overwritten(tiny, base, tmp_path) -> None:
    student = tiny.student("merged")
    export_live(tmp_path / "out", student, base, {"version": 1})
    export_live(tmp_path / "out", student, base, {"version": 2})
    assert read_manifest(tmp_path / "out")["extra"] == {"version": 2}
    with pytest.raises(QuantError, match="is no export of raydistill"):
        export_live(base, student, base, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_an_export_that_fails_leaves_nothing(tiny, base, tmp_path, monkeypatch) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("raydistill.quant.export.save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        export_live(tmp_path / "out", tiny.student("merged"), base, {})
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("mode", ["merged", "served"])
def test_damage_is_noticed_and_names_the_file(tiny, base, tmp_path, mode: str) -> None:
    out = tmp_path / "out"
    export_live(out, tiny.student(mode), base, {})
    weights = out / ("adapter/adapter_model.safetensors" if mode == "served" else "model.safetensors")
    good = load_file(weights)
    for name in (next(key for key in good if "packed" in key or "lora_A" in key), list(good)[-1]):
        changed = {key: value.clone() for key, value in good.items()}
        changed[name].view(-1).view(torch.uint8)[0] ^= 1
        save_file(changed, weights)
        with pytest.raises(QuantError, match=f"{weights.name}.* have hash|has hash"):
            load_exported(out)
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(QuantError, match=weights.name):
        load_exported(out)
    weights.unlink()
    with pytest.raises(QuantError, match=weights.name):
        load_exported(out)


def test_bad_folders_say_what_to_do(tiny, base, tmp_path) -> None:
    out, codes = tmp_path / "out", apply_ptq(tiny.model(), tiny.int4)
    with pytest.raises(QuantError, match="is no folder"):
        load_exported(tmp_path / "nowhere")
    with pytest.raises(QuantError, match="neither a folder nor a hub id"):
        export_student(out, tmp_path / "nowhere", codes, fmt=tiny.int4, mode="merged")
    with pytest.raises(QuantError, match=r"has no tensor other\.weight"):
        export_student(out, base, {"other": codes["model.layers.0.mlp.up_proj"]}, fmt=tiny.int4, mode="merged")
    with pytest.raises(QuantError, match="if and only if it is 'served'"):
        export_student(out, base, codes, fmt=tiny.int4, mode="served")
    with pytest.raises(QuantError, match=r"no \.safetensors file"):
        packed_bytes(tmp_path / "nowhere")
    export_student(out, base, codes, fmt=tiny.int4, mode="merged")
    manifest = json.loads((out / "raydistill.json").read_text())
    (out / "raydistill.json").write_text(json.dumps({**manifest, "layout": 99}))
    with pytest.raises(QuantError, match="another layout"):
        load_exported(out)
    (out / "raydistill.json").write_text("{")
    with pytest.raises(QuantError, match="cannot be read"):
        load_exported(out)
