"""The choice among grids; what a method makes is played by raydistill's own rounding."""

import pytest
import torch
from transformers import AutoTokenizer

from raydistill.evaluate.held_out import answer_held_out
from raydistill.evaluate.rows import encode_held_out, file_section, rows_of_file
from raydistill.ptq.baselines import Baseline, Subject, choose_calibrated, find_baselines, layers_of
from raydistill.ptq.overlay import Calibrated, Failed
from raydistill.quant.baselines import ptq_grids
from raydistill.quant.export import load_exported, read_manifest
from raydistill.quant.grid import dequantize, quantize
from raydistill.quant.student import quantizable_modules
from raydistill.tensors import CompletionModel

TEMPLATE = {"enable_thinking": False}


@pytest.fixture(scope="module")
def subject(rows, model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    chosen = rows_of_file(rows.validation_path, 8)
    examples, _ = encode_held_out(chosen, tokenizer, file_section(256), 256, [tokenizer.eos_token_id])
    return Subject(
        model=model, teacher=model, validation=examples, group_size=32, scale_dtype="float16", skip=("lm_head",),
        dtype="float32", template=TEMPLATE,
    )  # fmt: skip


@pytest.fixture(scope="module")
def answers(subject):
    return answer_held_out(CompletionModel(load_exported(subject.teacher)), subject.validation)


def made(subject, fmt, seconds=1.0, notes=()):
    layers = quantizable_modules(load_exported(subject.model))
    codes = {name: quantize(layer.weight, fmt) for name, layer in layers.items()}
    return Calibrated(fmt=fmt, codes=codes, others={}, seconds=seconds, notes=notes)


def test_the_grid_with_the_lowest_kl_is_kept_and_its_folder_is_a_ptq_export(subject, answers, tmp_path):
    grids = ptq_grids(2, 32)
    every = [
        *(made(subject, fmt, notes=(fmt.name,)) for fmt in grids[:3]),
        Failed(fmt=grids[3], reason="no", seconds=0.5),
    ]
    extra = {"role": "ptq", "method": "gptq"}
    found = choose_calibrated("gptq", "int2", every, subject, answers, tmp_path, extra)
    assert found.name == "gptq-int2"
    assert found.kl_nats.keys() == {fmt.name for fmt in grids[:3]}
    assert found.format == min(found.kl_nats, key=found.kl_nats.__getitem__)
    assert found.reasons == {grids[3].name: "no"}
    assert found.reason is None
    assert found.notes == (found.format,)
    assert found.seconds >= 3.5
    manifest = read_manifest(found.folder)
    assert (manifest["format"]["name"], manifest["extra"]["method"]) == (found.format, "gptq")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gptq-int2"], "the other grids' folders are gone"
    assert Baseline.from_json(found.to_json()) == found


def test_where_no_grid_can_be_done_the_reasons_stand_in_its_place_each_once(subject, answers, tmp_path):
    every = [Failed(fmt=fmt, reason="ValueError: 3 bits") for fmt in ptq_grids(3, 32)]
    found = choose_calibrated("awq", "int3", every, subject, answers, tmp_path, {})
    assert (found.folder, found.format, found.reason) == (None, None, "ValueError: 3 bits")


def test_a_grid_that_gives_no_finite_numbers_is_never_chosen(subject, answers, tmp_path):
    broken = made(subject, ptq_grids(4, 32)[0])
    for codes in broken.codes.values():
        codes.scale_OG.fill_(torch.inf)
    found = choose_calibrated("gptq", "int4", [broken], subject, answers, tmp_path, {})
    assert (found.folder, found.reason) == (None, "no grid gives finite numbers")
    good = made(subject, ptq_grids(4, 32)[1])
    assert choose_calibrated("gptq", "int4", [broken, good], subject, answers, tmp_path, {}).format == good.fmt.name


def test_parameters_that_a_method_changed_beside_the_codes_are_part_of_the_folder(subject, answers, tmp_path):
    one = made(subject, ptq_grids(4, 32)[0])
    norm = "model.layers.0.input_layernorm.weight"
    doubled = 2 * load_exported(subject.model).get_parameter(norm).detach()
    changed = Calibrated(fmt=one.fmt, codes=one.codes, others={norm: doubled}, seconds=0)
    found = choose_calibrated("awq", "int4", [changed], subject, answers, tmp_path, {})
    loaded = load_exported(found.folder)
    assert torch.equal(loaded.get_parameter(norm), doubled)
    for name, codes in one.codes.items():
        assert torch.equal(loaded.get_submodule(name).weight, dequantize(codes))


def test_rounding_gets_the_best_of_the_same_four_grids_at_every_width(subject, tmp_path):
    told = []
    found = find_baselines("rtn", ["int4", "int2"], subject, None, tmp_path, lambda what, done: told.append(done))
    assert told == list(range(1, 9))
    assert [one.name for one in found] == ["rtn-int4", "rtn-int2"]
    for one, bits in zip(found, (4, 2), strict=True):
        assert one.kl_nats.keys() == {fmt.name for fmt in ptq_grids(bits, 32)}
        assert one.kl_nats[one.format] == min(one.kl_nats.values())
        assert read_manifest(one.folder)["extra"] == {"role": "ptq", "method": "rtn", "template": TEMPLATE}


def test_the_layers_are_those_of_a_student(subject):
    assert layers_of(subject.model, ("lm_head",)) == tuple(quantizable_modules(load_exported(subject.model)))
    assert not any(name.endswith("down_proj") for name in layers_of(subject.model, ("lm_head", "down_proj")))
