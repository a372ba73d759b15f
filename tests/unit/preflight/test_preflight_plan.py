"""The plan's arithmetic against numbers computed by hand, and its sizes against real models and messages."""

import json
import re
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast, Qwen3Config

from raydistill.__main__ import dispatch
from raydistill.cli import main_with_errors
from raydistill.config import Config
from raydistill.demo.pretrain import TeacherRecipe
from raydistill.losses import logsumexp
from raydistill.messages import Samples, TeacherDense, TeacherTopK, TokenRows
from raydistill.models import StudentSpec, empty_model
from raydistill.preflight.devices import GPUS, Device, gpu_named, measure_cpu, rough_rates
from raydistill.preflight.estimates import (
    LOSS_CHUNK_LOGITS,
    SEARCH_CANDIDATES,
    SEARCH_ELEMENTS,
    Answer,
    Batch,
    Mode,
    ModelSize,
    Part,
    Stage,
    Step,
    StudentSize,
    activation_bytes,
    evaluator_memory,
    forward_flops,
    kept_dense_bytes,
    rebuild_bytes,
    rollout_memory,
    stage_seconds,
    step_flops,
    step_seconds,
    teacher_memory,
    trainer_memory,
    wire_bytes,
)
from raydistill.preflight.sizes import longest, model_size, student_size
from raydistill.quant import grid
from raydistill.quant.student import LoraSettings, adapter_state, prepare_student
from raydistill.results.record import RunRecord
from raydistill.tensors import CompletionModel, SequenceBatch

SHAPE: dict[str, Any] = {
    "vocab_size": 16, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip
# By hand: a layer has q 32x32, k and v 16x32, o 32x32, three of 48x32 = 7,680 weights and norms 32 + 32 + 16 + 16.
MATMUL = 2 * 7680
PARAMETERS = MATMUL + 2 * 96 + 32 + 2 * 16 * 32
ADAPTER = 2 * 4 * ((32 + 32) + (32 + 16) + (32 + 16) + (32 + 32) + 3 * (32 + 48))  # rank 4

MODEL = ModelSize(
    parameters=1000, matmul=600, vocab_size=50, hidden=8, layers=3, query=12, key=4, mlp=20
)  # round numbers, no real model
STUDENT = StudentSize(
    model=MODEL, mode="merged", quantizable=600, targets=400, trainable=96, largest_layer=100,
    is_quantized=True, is_searched=False, weight_bytes=2,
)  # fmt: skip
FULL = replace(STUDENT, mode="none", targets=0, trainable=1000)
SERVED = replace(STUDENT, mode="served")
TOP_K = Answer(vocab_size=50, candidates=4)
DENSE = Answer(vocab_size=50, candidates=None)
BATCH = Batch(sequences=2, tokens=10, completion=6)
STEP = Step(sampled=6, given=2, prompt=5, completion=10)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder as the plan sees it: config and tokenizer are real, the weights are never opened."""
    Qwen3Config(**SHAPE).save_pretrained(tmp_path / "model")
    words = ["<pad>", "<end>", "a", "b"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>").save_pretrained(
        tmp_path / "model"
    )
    (tmp_path / "model" / "model.safetensors").touch()
    return tmp_path / "model"


def arguments(folder: Path, *more: str) -> list[str]:
    sizes = ["--data.max_length", "64", "--rollout.max_new_tokens", "16", "--quant.group_size", "16"]
    return ["plan", "--student.model", str(folder), *sizes, "--adapter.rank", "4", "--adapter.alpha", "8", *more]


def plan(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    assert main_with_errors(dispatch, arguments(folder, "--json", *more)) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def sizes(parts: list[Part]) -> dict[str, int]:
    return {part.name: part.bytes for part in parts}


def trainer(student: StudentSize = STUDENT, **changes: Any) -> dict[str, int]:
    given = {"place": "GPU", "stage": 2, "world_size": 4, "checkpointing": False} | changes
    return sizes(trainer_memory(student, BATCH, TOP_K, **given))


# Sizes of real models -------------------------------------------------------------------------------------------------


def config_of(folder: Path, mode: Mode) -> Config:
    return Config.model_validate(
        {
            "student": {"model": str(folder), "dtype": "float32"},
            "adapter": {"mode": mode, "rank": 4, "alpha": 8},
            "quant": {"group_size": 16},
        }
    )


def test_the_size_of_a_tiny_qwen3_is_the_one_counted_by_hand(folder: Path) -> None:
    size = student_size(config_of(folder, "merged"), empty_model(folder))
    assert size.model == ModelSize(
        parameters=PARAMETERS, matmul=MATMUL, vocab_size=16, hidden=32, layers=2, query=32, key=16, mlp=48
    )
    assert (size.quantizable, size.targets, size.trainable, size.largest_layer) == (MATMUL, MATMUL, ADAPTER, 1536)
    assert size.weight_bytes == 4


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", [Qwen3Config, LlamaConfig])
def test_parameters_are_those_of_the_real_model(tmp_path: Path, family: type[PretrainedConfig], tied: bool) -> None:
    shape = family(**SHAPE | {"tie_word_embeddings": tied})
    shape.save_pretrained(tmp_path)
    real = AutoModelForCausalLM.from_config(shape)
    assert model_size(empty_model(tmp_path)) == model_size(real)
    assert model_size(real).parameters == sum(p.numel() for p in real.parameters())


@pytest.mark.parametrize("mode", ["merged", "served", "none"])
def test_trainable_weights_are_those_that_the_real_student_trains_and_sends(folder: Path, mode: Mode) -> None:
    config = config_of(folder, mode)
    spec = StudentSpec.of(config)
    real = prepare_student(AutoModelForCausalLM.from_config(Qwen3Config(**SHAPE)), spec.weight_format, mode, spec.lora)
    size = student_size(config, empty_model(folder))
    assert size.trainable == sum(p.numel() for p in real.parameters() if p.requires_grad)
    sent = sum(tensor.nbytes for tensor in adapter_state(real).values())
    assert wire_bytes(size, STEP, TOP_K, num_rollouts=3)["adapter to rollout actors"] == 3 * sent


# Memory ---------------------------------------------------------------------------------------------------------------


def test_a_rank_shares_more_with_every_zero_stage() -> None:
    """96 trained weights in bfloat16, 1000 frozen: 2 bytes each; moments and master 12, update's gradients 4."""
    names = ("frozen weights", "trainable weights", "gradients", "optimizer states", "float32 gradients of the update")
    by_stage = {stage: tuple(trainer(stage=stage)[name] for name in names) for stage in range(4)}
    assert by_stage == {
        0: (2000, 192, 192, 1152, 384),
        1: (2000, 192, 192, 288, 96),
        2: (2000, 192, 48, 288, 96),
        3: (500, 48, 48, 288, 96),
    }
    assert [trainer(stage=stage)["reduction bucket"] for stage in range(4)] == [0, 10**9, 10**9, 10**9]
    assert trainer(place="host")["reduction bucket"] == 192
    assert [trainer(stage=stage)["gathered weights (ZeRO-3)"] for stage in (2, 3)] == [0, 2 * 1096]


def test_float32_has_no_second_copy_where_the_optimizer_updates_the_weights_themselves() -> None:
    student = replace(STUDENT, weight_bytes=4)
    states = [trainer(student, stage=stage, world_size=1)["optimizer states"] for stage in range(4)]
    assert states == [8 * 96, 12 * 96, 12 * 96, 8 * 96]
    assert trainer(student)["float32 gradients of the update"] == 0


def test_training_all_weights_holds_none_frozen_and_updates_every_one() -> None:
    full = trainer(FULL, world_size=1)
    assert (full["frozen weights"], full["trainable weights"], full["gradients"]) == (0, 2000, 2000)
    assert full["optimizer states"] == 12 * 1000
    assert sum(full.values()) > sum(trainer(world_size=1).values())


def test_dense_weights_are_kept_where_a_layer_rebuilds_them() -> None:
    assert kept_dense_bytes(STUDENT) == 2 * 400  # merged: each target's dense weight
    assert kept_dense_bytes(FULL) == 2 * 2 * 600  # all weights: the dense weight and a copy of W
    assert kept_dense_bytes(replace(FULL, is_quantized=False)) == 0
    assert kept_dense_bytes(SERVED) == 0
    assert rebuild_bytes(STUDENT, "GPU") == 20 * 100
    assert rebuild_bytes(replace(STUDENT, is_searched=True), "GPU") == 20 * 100 + 8 * 16 * 100
    assert rebuild_bytes(replace(STUDENT, is_quantized=False), "GPU") == 0


def test_the_chunks_are_those_of_the_losses_and_the_quantizer() -> None:
    assert logsumexp.CHUNK_ELEMENTS == LOSS_CHUNK_LOGITS
    assert len(grid.FACTORS) == SEARCH_CANDIDATES
    assert {True: SEARCH_ELEMENTS["host"], False: SEARCH_ELEMENTS["GPU"]} == grid.CHUNK_ELEMENTS


def test_logits_exist_at_completion_positions_and_answers_take_their_types() -> None:
    parts = trainer()
    assert parts["logits and their gradient"] == 2 * 12 * 50 * 2 + 12 * 50 * 8
    assert parts["teacher's answers"] == 12 * (4 * 8 + 4)


def test_checkpointing_keeps_one_hidden_state_for_each_layer() -> None:
    layer = 20 * (6 * 8 + 3 * 12 + 4 * 4 + 5 * 20) * 2
    assert trainer()["activations (rough)"] == 3 * layer
    assert trainer(checkpointing=True)["activations (rough)"] == 3 * 20 * 8 * 2 + layer


def saved_bytes(model: nn.Module, sequences: int, tokens: int) -> int:
    """What PyTorch keeps for backward, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)  # a freed address would be given out twice
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    rows = TokenRows.from_rows([[1] * (tokens // 2)] * sequences)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        CompletionModel(model.train()).hidden(SequenceBatch.of(rows, rows, "cpu"))
    return sum(seen.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["merged", "served", "none"])
@pytest.mark.parametrize("family", [Qwen3Config, LlamaConfig])
def test_activations_are_within_a_third_of_what_pytorch_saves(
    family: type[PretrainedConfig], mode: Mode, dtype: torch.dtype
) -> None:
    lora = None if mode == "none" else LoraSettings(rank=4, alpha=8, targets=Config().adapter.targets)
    measured = []
    for layers in (2, 4):  # the difference is two layers, whatever embedding and head keep
        shape = SHAPE | {"num_hidden_layers": layers, "intermediate_size": 96}
        model = AutoModelForCausalLM.from_config(family(**shape))
        size = model_size(model)
        student = prepare_student(model, None, mode, lora).to(dtype)  # DeepSpeed casts A and B too
        measured.append(saved_bytes(student, 4, 32))
    expected = activation_bytes(replace(size, layers=2), 4 * 32, dtype.itemsize, checkpointing=False)
    assert measured[1] - measured[0] == pytest.approx(expected, rel=1 / 3)


def test_gradient_checkpointing_is_what_pytorch_saves() -> None:
    measured = []
    for layers in (2, 4):
        model: Any = AutoModelForCausalLM.from_config(Qwen3Config(**SHAPE | {"num_hidden_layers": layers}))
        size = model_size(model)
        student: Any = prepare_student(model, None, "merged", LoraSettings(rank=4, alpha=8, targets=("q_proj",)))
        student.enable_input_require_grads()
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        measured.append(saved_bytes(student, 4, 32))
    four, two = (activation_bytes(replace(size, layers=n), 4 * 32, 4, checkpointing=True) for n in (4, 2))
    assert measured[1] - measured[0] == four - two


def test_an_engine_serves_dense_weights_and_its_workers_keep_w_on_the_host() -> None:
    given: dict[str, Any] = {"engine": "vllm", "tensor_parallel": 2, "cpu_cache_bytes": 2**30}
    parts = rollout_memory(STUDENT, BATCH, place="GPU", **given)
    assert sizes(parts) == {
        "weights, dense": 1000,  # 2 bytes each, over two GPUs: the format saves nothing here
        "KV cache": 2 * 3 * 4 * 20 * 2 // 2,
        "one layer's rebuild": 20 * 50 + 2 * 2 * 100,  # half of the layer, and two layers that wait to be fused
        "W kept for rebuilding": 600 * 2,  # half of it by each rank
        "A and B": 2 * 96 * 4,
    }
    assert [part.place for part in parts] == ["GPU", "GPU", "GPU", "host", "host"]
    alone = sizes(rollout_memory(STUDENT, BATCH, place="host", **given | {"tensor_parallel": 1}))
    assert alone["KV cache"] == 2**30
    assert alone["one layer's rebuild"] == 20 * 100
    two = sizes(rollout_memory(STUDENT, BATCH, place="host", **given))
    assert two["weights, dense"] == 2000  # both halves are on this host
    assert (two["KV cache"], two["one layer's rebuild"]) == (2 * 2**30, 2 * 1400)
    served = sizes(rollout_memory(SERVED, BATCH, place="GPU", **given))
    assert served["weights, dense"] == (2000 + 2 * 96) // 2


def test_generate_holds_the_trainers_model_without_its_optimizer() -> None:
    parts = sizes(rollout_memory(STUDENT, BATCH, engine="hf", place="GPU", tensor_parallel=1, cpu_cache_bytes=2**30))
    assert (parts["weights"], parts["dense weights kept"]) == (2 * 1096, 800)
    assert parts["KV cache"] == 2 * 3 * 4 * 20 * 2


def test_a_teacher_holds_its_weights_and_one_block_of_logits() -> None:
    parts = sizes(teacher_memory(MODEL, 2, BATCH, TOP_K, logits_rows=10, place="GPU"))
    assert parts["weights"] == 2000
    assert parts["largest block of logits"] == 10 * 50 * 12
    assert parts["answers"] == parts["answers to send"] == 12 * 36
    spread = sizes(teacher_memory(MODEL, 2, BATCH, TOP_K, logits_rows=10, place="GPU", num_devices=3))
    assert spread == parts | {"weights": 667}  # the device with the head has all the rest
    dense = sizes(teacher_memory(MODEL, 2, BATCH, DENSE, logits_rows=4096, place="GPU"))
    assert dense["largest block of logits"] == 12 * 50 * 12
    assert dense["answers"] == 12 * 200


def test_the_evaluator_keeps_the_held_out_answers_on_the_host() -> None:
    parts = evaluator_memory(STUDENT, BATCH, TOP_K, held_out_tokens=100, place="GPU")
    assert sizes(parts)["held-out answers"] == 3600
    assert [part.place for part in parts if part.name == "held-out answers"] == ["host"]
    assert sizes(evaluator_memory(STUDENT, BATCH, None, held_out_tokens=100, place="GPU"))["held-out answers"] == 0


# Wire -----------------------------------------------------------------------------------------------------------------


def arrays_bytes(message: Any) -> int:
    """Of all arrays in a message, rows included."""
    values = [getattr(message, spec.name) for spec in fields(message)]
    return sum(
        v.nbytes if isinstance(v, np.ndarray) else arrays_bytes(v)
        for v in values
        if isinstance(v, (np.ndarray, TokenRows))
    )


def test_answers_take_the_bytes_of_the_real_messages() -> None:
    assert TOP_K.token_bytes == 4 * 4 + 4 * 4 + 4
    top = TeacherTopK(
        ids_NK=np.zeros((7, 4), np.int32),
        logprobs_NK=np.zeros((7, 4), np.float32),
        tail_logprob_N=np.zeros(7, np.float32),
    )
    assert arrays_bytes(top) == 7 * TOP_K.token_bytes
    assert arrays_bytes(TeacherDense(logprobs_NV=np.zeros((7, 50), np.float32))) == 7 * DENSE.token_bytes
    assert Answer(vocab_size=50, candidates=64).token_bytes == 50 * 8 + 4  # a teacher has no more than V candidates


def test_the_wire_of_a_step_is_what_its_messages_hold() -> None:
    wire = wire_bytes(STUDENT, STEP, TOP_K, num_rollouts=3)
    samples = Samples(
        step=0,
        indices=tuple(range(6)),
        row_ids=("",) * 6,
        prompts=TokenRows.from_rows([[1] * 5] * 6),
        completions=TokenRows.from_rows([[1] * 10] * 6),
        policy_versions=(0,) * 6,
        finish_reasons=("stop",) * 6,
    )
    assert wire == {
        "adapter to rollout actors": 3 * 4 * 96,
        "prompts to rollout actors": arrays_bytes(samples.prompts),
        "sampled completions": 2 * arrays_bytes(samples),  # to the teacher, then to the trainer
        "references": 2 * 2 * (4 * 5 + 4 + 4 * 10 + 4),
        "teacher's answers": 80 * 36,
    }
    assert wire_bytes(STUDENT, STEP, DENSE, num_rollouts=3)["teacher's answers"] == 80 * 4 * 50


def test_without_sampling_no_adapter_travels_and_without_a_teacher_no_answers() -> None:
    wire = wire_bytes(STUDENT, replace(STEP, sampled=0, given=8), None, num_rollouts=1)
    assert wire["adapter to rollout actors"] == wire["teacher's answers"] == wire["sampled completions"] == 0
    assert wire["references"] == 8 * 68


# FLOPs and time -------------------------------------------------------------------------------------------------------


def test_flops_are_two_for_each_weight_and_token_plus_attention_plus_head() -> None:
    forward = 2 * 600 * 15 + 2 * 3 * 12 * 15**2 + 2 * 400 * 10
    assert forward_flops(MODEL, 8, STEP) == 8 * forward
    flops = step_flops(STUDENT, MODEL, STEP, checkpointing=False)
    assert flops == {
        "rollout": 6 * forward,
        "teacher": 8 * forward,
        "trainer": 2 * 8 * forward + 2 * 400 * 120,  # merged: the gradient of each target's whole W
    }
    assert step_flops(FULL, None, STEP, False)["trainer"] == 16 * forward + 2 * 600 * 120 + 2 * 400 * 80
    assert step_flops(FULL, None, STEP, False)["teacher"] == 0
    again = step_flops(STUDENT, MODEL, STEP, checkpointing=True)["trainer"] - flops["trainer"]
    assert again == 8 * (forward - 2 * 400 * 10)


def test_a_stage_takes_its_tokens_over_the_speed_of_its_actors() -> None:
    seconds = stage_seconds(
        STEP, {"rollout": 10, "teacher": 40, "trainer": 20}, {"rollout": 2, "teacher": 1, "trainer": 4}
    )
    assert seconds == {"rollout": 60 / 20, "teacher": 80 / 40, "trainer": 80 / 80}


def test_a_step_takes_the_sum_when_serial_and_the_slowest_stage_when_overlapped() -> None:
    assert step_seconds({"rollout": 3, "teacher": 2, "trainer": 6}, 0) == 11
    assert step_seconds({"rollout": 3, "teacher": 2, "trainer": 6}, 1) == 6
    # One step ahead is not enough to hide three equal stages: 9 s of work, two steps under way.
    assert step_seconds({"rollout": 3, "teacher": 3, "trainer": 3}, 1) == 4.5
    assert step_seconds({"rollout": 3, "teacher": 3, "trainer": 3}, 2) == 3


# The verb -------------------------------------------------------------------------------------------------------------


def test_the_json_has_every_part_of_the_plan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = plan(folder, capsys, "--cluster.by_role", "--rollout.tensor_parallel_size", "2", "--rollout.num_gpus", "2")
    assert set(report) == {
        "is_estimate", "placement", "memory", "gpus", "wire_bytes_per_step", "flops_per_step", "duration", "step", "student",
        "teacher", "notes",
    }  # fmt: skip
    assert report["placement"][1] == {
        "role": "rollout", "count": 1, "cpus_each": 0.5, "gpus_each": 2.0, "tensor_parallel_size": 2,
        "node_resource": "rollout",
    }  # fmt: skip
    assert [row["node_resource"] for row in report["placement"]] == ["trainer", "rollout", "teacher", "teacher"]
    assert {(row["role"], row["place"]) for row in report["memory"]} == {
        ("trainer", "host"), ("rollout", "GPU"), ("rollout", "host"), ("teacher", "host"), ("evaluation", "host"),
    }  # fmt: skip
    assert (report["student"]["trainable"], report["teacher"]["parameters"]) == (ADAPTER, PARAMETERS)
    assert report["wire_bytes_per_step"]["adapter to rollout actors"] == 4 * ADAPTER
    assert set(report["duration"]["rough"]) == {"rollout", "teacher", "trainer"}
    assert any("takes 85% of its GPUs" in note for note in report["notes"])
    assert any(note.startswith("rollout: the GPU parts above are those of each") for note in report["notes"])


def test_actors_that_share_a_gpu_are_added_up(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shares = ("--rollout.num_gpus", "0.5", "--teacher.num_gpus", "0.4", "--evaluation.num_gpus", "0.1")
    settings = (*shares, "--trainer.num_gpus", "1")
    report = plan(folder, capsys, *settings)
    together, alone = report["gpus"]
    assert (together["roles"], together["count"], together["share"]) == (["rollout", "teacher", "evaluation"], 1, 1)
    assert alone["roles"] == ["trainer"]
    of = {row["role"]: 0 for row in report["memory"]}
    for row in report["memory"]:
        of[row["role"]] += row["bytes"] if row["place"] == "GPU" else 0
    assert together["bytes"] == of["rollout"] + of["teacher"] + of["evaluation"]
    assert alone["bytes"] == of["trainer"]
    assert main_with_errors(dispatch, arguments(folder, *settings)) == 0
    shown = capsys.readouterr()
    assert "shared GPUs (estimate)" in shown.out
    assert "rollout + teacher + evaluation" in shown.out
    assert "add their GPU parts up" not in shown.err


def test_sequences_count_at_their_longest_or_as_long_as_the_user_says(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = plan(folder, capsys, "--objective.on_policy_fraction", "1")["step"]
    assert (step["sampled"], step["given"], step["prompt"], step["completion"]) == (32, 0, 31, 16)
    step = plan(folder, capsys, "--prompt-tokens", "20", "--completion-tokens", "12.5")["step"]
    assert (step["sampled"], step["prompt"], step["completion"]) == (16, 20, 12.5)
    off = Config.model_validate({"objective": {"on_policy_fraction": 0}, "data": {"max_length": 64}})
    assert (longest(off).prompt, longest(off).completion) == (31, 63)


def test_speeds_that_the_user_gives_make_a_duration(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [f"--tokens-per-second-{stage}" for stage in ("rollout", "teacher", "trainer")]
    speeds = [given[0], "100", given[1], "400", given[2], "50", "--completion-tokens", "10", "--trainer.num_steps", "7"]
    times = [plan(folder, capsys, *speeds, "--sync.max_staleness", s)["duration"] for s in ("0", "1")]
    assert times[0]["stage_s"] == {"rollout": 1.6, "teacher": 0.8, "trainer": 6.4}
    assert [time["step_s"] for time in times] == pytest.approx([8.8, 6.4])
    assert times[0]["steps_s"] == pytest.approx(7 * 8.8)
    assert times[0]["rough"] == {}
    part = plan(folder, capsys, *speeds[:2])["duration"]
    assert (part["tokens_per_second"]["rollout"], set(part["rough"])) == (100, {"teacher", "trainer"})


def write_run(folder: Path, config: Config) -> Path:
    with RunRecord(folder) as record:
        record.start(name="before", config=config.model_dump(mode="json"), provenance={}, seed=0)
        for step, (busy, tokens) in enumerate([(1.0, 300.0), (3.0, 500.0)]):
            metrics = {"rollout/busy_s": busy, "rollout/tokens_per_s": 50.0, "teacher/busy_s": 2.0}
            metrics |= {"teacher/tokens_per_s": 100.0, "trainer/busy_s": 4.0, "trainer/tokens": tokens}
            record.step(step, metrics | {"trainer/publish_s": 0.5, "loop/step_s": 6.0})
        record.end("finished")
    return folder


def test_a_recorded_run_lends_its_speeds_and_says_how_it_differs(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Config.model_validate({"student": {"model": str(folder)}, "trainer": {"num_workers": 2}})
    report = plan(folder, capsys, "--like", str(write_run(tmp_path / "before", before)), "--sync.max_staleness", "0")
    time = report["duration"]
    # Trainer: 800 tokens in 8 s of two ranks; a completion had 400 tokens a step / 32 sequences.
    assert time["tokens_per_second"] == pytest.approx({"rollout": 50, "teacher": 100, "trainer": 50})
    assert report["step"]["completion"] == 12.5
    assert time["stage_s"] == pytest.approx({"rollout": 4, "teacher": 4, "trainer": 8.5})
    assert (time["step_s"], time["recorded_step_s"]) == (pytest.approx(16.5), 6.0)
    assert any("adapter.rank 32 there, 4 here" in note for note in report["notes"])


def test_without_a_speed_the_duration_is_rough_and_says_how_to_get_a_better_one(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main_with_errors(dispatch, arguments(folder)) == 0
    said = capsys.readouterr()
    assert "memory of one actor (estimate)" in said.out
    assert re.search(r"about \S+ s a step .* for all steps; roughly, a factor of two .* --like RUN_FOLDER", said.out)
    assert "the speed of rollout and teacher and trainer is a guess from one core of this machine: 50% of" in said.err


def test_gpus_that_are_not_here_are_named_or_assumed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpus = [f"--{role}.num_gpus" for role in ("rollout", "teacher", "trainer")]
    on_gpus = [part for field in gpus for part in (field, "1")]
    report = plan(folder, capsys, *on_gpus, "--gpu", "h100")
    assert set(report["duration"]["rough"].values()) == {"H100: 40% of 989 TFLOP/s (bfloat16), 60% of 3350 GB/s"}
    if not torch.cuda.is_available():
        report = plan(folder, capsys, *on_gpus)
        assert "no GPU is here, so speeds are those of L4 GPUs; name yours with --gpu" in report["notes"]


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--trainer.sequences_per_step", "7"], "trainer.sequences_per_step"),
        (["--trainer.sequence_per_step", "8"], "sequence_per_step"),
        (["--quant.group_size", "5"], "group_size=5 does not divide"),
        (["--like", "nowhere"], "--like nowhere: no recorded steps there"),
        (["--tokens-per-second-rollout", "0"], "--tokens-per-second-rollout 0 is not above 0"),
        (["--rollout.num_gpus", "1", "--gpu", "H1000"], "--gpu 'H1000' is not known; choose from T4, A10G"),
    ],
)
def test_what_cannot_be_planned_ends_with_exit_code_2(
    folder: Path, capsys: pytest.CaptureFixture[str], more: list[str], complaint: str
) -> None:
    assert main_with_errors(dispatch, arguments(folder, *more)) == 2
    assert complaint in capsys.readouterr().err


def test_a_world_that_is_built_gives_its_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = tmp_path / "world"
    world.mkdir()
    folder.rename(world / "teacher")
    sizes = ["--data.max_length", "64", "--rollout.max_new_tokens", "16", "--quant.group_size", "16"]
    assert (
        main_with_errors(dispatch, ["plan", "--json", "--world.name", "stories", "--world.folder", str(world), *sizes])
        == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert report["student"]["model"]["parameters"] == report["teacher"]["parameters"] == PARAMETERS


def test_a_world_that_is_not_built_yet_is_planned_with_its_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = ["--world.name", "stories", "--world.folder", str(tmp_path / "none")]
    command = ["plan", "--json", *world, "--data.max_length", "256"]
    assert main_with_errors(dispatch, command) == 0
    report = json.loads(capsys.readouterr().out)
    recipe = TeacherRecipe()
    assert report["student"]["model"] == report["teacher"]
    assert (report["teacher"]["hidden"], report["teacher"]["layers"]) == (recipe.hidden_size, recipe.num_layers)
    assert report["duration"]["step_s"] > 0
    assert any("the world 'stories' is not built yet" in note for note in report["notes"])
    assert main_with_errors(dispatch, [*command, "--quant.group_size", "36"]) == 2
    assert "group_size=36 does not divide" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


# Devices --------------------------------------------------------------------------------------------------------------

ROUND = Device(text="", flops=1e6, bytes_per_s=1e4, layer_s=0.01, decode_s=0.1)
DEVICES: dict[Stage, Device] = {"rollout": ROUND, "teacher": ROUND, "trainer": ROUND}
CONFIG = Config.model_validate(
    {"rollout": {"max_new_tokens": 15}, "trainer": {"sequences_per_step": 8, "sequences_per_micro_batch": 2}}
)


def test_a_rough_speed_is_what_the_device_can_do() -> None:
    """80 completion tokens of 8 sequences; 6 are sampled."""
    flops = step_flops(STUDENT, MODEL, STEP, False)
    rates = rough_rates(CONFIG, STUDENT, MODEL, STEP, DEVICES)
    assert rates["teacher"] == pytest.approx(80 / (flops["teacher"] / 1e6 + 3 * 0.01))  # one batch through 3 layers
    assert rates["trainer"] == pytest.approx(80 / (flops["trainer"] / 1e6 + 4 * 3 * 3 * 0.01))  # 4 micro-batches
    # Each of the longest completion's 15 tokens reads 1000 weights of 2 bytes, and the cache of 5 + 10 / 2 tokens a sequence.
    read = 1000 * 2 + 2 * 3 * 4 * 6 * 10 * 2
    prompts = 6 * (2 * 600 * 5 + 2 * 3 * 12 * 5**2)
    seconds = prompts / 1e6 + 0.03 + 15 * (read / 1e4 + 0.03 + 0.1)
    assert rates["rollout"] == pytest.approx(6 * 10 / seconds)


def test_more_actors_sample_faster_together_but_each_reads_all_weights() -> None:
    two = CONFIG.model_copy(update={"rollout": CONFIG.rollout.model_copy(update={"num_actors": 2})})
    one, each = (rough_rates(config, STUDENT, MODEL, STEP, DEVICES)["rollout"] for config in (CONFIG, two))
    assert each < one < 2 * each
    assert "rollout" not in rough_rates(CONFIG, STUDENT, None, replace(STEP, sampled=0, given=8), DEVICES)


@pytest.mark.parametrize(
    ("said", "entry"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-40GB", "A100-40G"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("A10G", "A10G"),
        ("nvidia l40s", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_a_gpu_is_known_by_the_names_that_cuda_ray_and_people_use(said: str, entry: str | None) -> None:
    assert gpu_named(said) == entry
    assert all(gpu_named(name) == name for name in GPUS)


def test_a_core_is_measured_within_a_second() -> None:
    start = time.monotonic()
    threads = torch.get_num_threads()
    device = measure_cpu("float32", MODEL)
    assert time.monotonic() - start < 10  # a fraction of a second where the machine is free
    assert (device.flops > 1e6, device.bytes_per_s > 1e7, torch.get_num_threads()) == (True, True, threads)
