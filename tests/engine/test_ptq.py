"""GPTQ and AWQ by the real llm-compressor, where `make ptq` has set it up: one process for each method."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from raydistill.data.encode import encode_rows
from raydistill.data.rows import read_rows
from raydistill.errors import ConfigError
from raydistill.evaluate.held_out import answer_held_out, score_answers
from raydistill.evaluate.rows import encode_held_out, file_section, rows_of_file
from raydistill.ptq.baselines import export_calibrated, layers_of
from raydistill.ptq.calibration import draw_calibration
from raydistill.ptq.overlay import Calibrated, Failed, Job, find_interpreter, run_job
from raydistill.quant.baselines import apply_ptq
from raydistill.quant.export import load_exported
from raydistill.quant.formats import WeightFormat
from raydistill.quant.grid import dequantize, quantize
from raydistill.quant.layouts import write_layout
from raydistill.quant.student import quantizable_modules
from raydistill.tensors import CompletionModel

pytestmark = pytest.mark.engine

SKIP = ("lm_head",)
STRONG = 16.0  # how much louder some channels are made


def grid(bits: int, group_size: int | None = 32, symmetric: bool = False) -> WeightFormat:
    return WeightFormat(bits=bits, group_size=group_size, symmetric=symmetric, scale="absmax")


@pytest.fixture(scope="module", autouse=True)
def _environment() -> None:
    try:
        find_interpreter()
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def rows(tiny_world: Any) -> Any:
    """(calibration, validation examples)."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_world.teacher_folder)
    train = encode_rows(read_rows(tiny_world.train_path).rows, tokenizer, file_section(512))
    chosen = rows_of_file(tiny_world.validation_path, 24)
    validation, _ = encode_held_out(chosen, tokenizer, file_section(512), 512, [tokenizer.eos_token_id])
    return draw_calibration(train, 128, seed=0), validation


def job_of(method: Any, model: Path, rows: Any, *grids: WeightFormat) -> Job:
    layers = layers_of(model, SKIP)
    return Job(method=method, model=model, layers=layers, grids=grids, calibration=rows[0], dtype="float32")


def kl_of(model: Any, folder: Path, rows: Any) -> float:
    answers = answer_held_out(CompletionModel(load_exported(folder)), rows[1])
    kl = score_answers(CompletionModel(model), answers).kl_nats
    assert kl is not None
    return kl


def rounded(folder: Path, fmt: WeightFormat) -> Any:
    model = load_exported(folder)
    apply_ptq(model, fmt, SKIP)
    return model


def test_gptq_is_nearer_to_the_teacher_than_rounding_on_the_same_grid(tiny_model: Path, rows: Any, tmp_path: Path):
    grids = [grid(4, symmetric=True), grid(3, None), grid(2), grid(2, 64)]
    told: list[float] = []
    log = tmp_path / "gptq.log"
    *made, failed = run_job(job_of("gptq", tiny_model, rows, *grids), log, lambda what, done: told.append(done))
    assert isinstance(failed, Failed), "96 columns do not divide by 64"
    assert "divisible by group_size" in failed.reason
    assert "Traceback" in log.read_text()
    assert told == sorted(told)
    assert told[-1] == 4
    layers = quantizable_modules(load_exported(tiny_model))
    for one in made:
        assert isinstance(one, Calibrated)
        assert one.others == {}, "GPTQ changes nothing beside the codes"
        out = tmp_path / one.fmt.name
        export_calibrated(one, tiny_model, out, "float32", {"role": "ptq"})
        model = load_exported(out)
        assert kl_of(model, tiny_model, rows) < 0.8 * kl_of(rounded(tiny_model, one.fmt), tiny_model, rows)
        for name, codes in one.codes.items():
            plain = quantize(layers[name].weight, one.fmt)
            assert codes.scale_OG.dtype == torch.float16
            assert torch.equal(codes.scale_OG, plain.scale_OG), "the grid is that of the weights: only codes are moved"
            assert codes.codes_OI.min() >= one.fmt.code_min
            assert codes.codes_OI.max() <= one.fmt.code_max
            assert not torch.equal(codes.codes_OI, plain.codes_OI)
            assert torch.equal(model.get_submodule(name).weight, dequantize(codes)), "the folder is these codes"
    other = tmp_path / "compressed-tensors"
    write_layout(tmp_path / grids[0].name, other, "compressed-tensors")
    as_read, as_made = load_exported(other), load_exported(tmp_path / grids[0].name)
    for name, parameter in as_made.named_parameters():
        assert torch.equal(as_read.get_parameter(name), parameter), f"{name}, as transformers reads it"


def test_awq_finds_the_channels_that_rounding_loses(tiny_model: Path, rows: Any, tmp_path: Path):
    """Some channels' activations are made stronger and the weights that read them weaker: the same function, whose
    important weights are now the small ones of each group."""
    loud = tmp_path / "loud"
    model, channels = load_exported(tiny_model), torch.arange(0, 96, 11)
    with torch.no_grad():
        for layer in model.model.layers:
            for norm, readers in (
                (layer.input_layernorm, (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)),
                (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
            ):
                norm.weight[channels] *= STRONG
                for reader in readers:
                    reader.weight[:, channels] /= STRONG
    model.save_pretrained(loud)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(loud)
    assert kl_of(model, tiny_model, rows) < 1e-6, "the same function"
    (made,) = run_job(job_of("awq", loud, rows, grid(3)), tmp_path / "awq.log", lambda what, done: None)
    assert isinstance(made, Calibrated), made
    assert all("norm" in name for name in made.others)
    assert made.others, "AWQ rescales norms"
    out = tmp_path / "awq"
    export_calibrated(made, loud, out, "float32", {"role": "ptq"})
    assert kl_of(load_exported(out), loud, rows) < 0.7 * kl_of(rounded(loud, grid(3)), loud, rows)
