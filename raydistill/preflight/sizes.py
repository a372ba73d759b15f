"""The sizes that `estimates` asks for, read off a config and its models on torch's meta device; no weights, no data rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raydistill.config import Config
from raydistill.preflight.estimates import (
    Answer,
    Batch,
    ModelSize,
    Part,
    Place,
    StudentSize,
    evaluator_memory,
    rollout_memory,
    teacher_memory,
    trainer_memory,
)

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Tokens of one sequence."""

    prompt: float
    completion: float


def model_size(model: nn.Module) -> ModelSize:
    """The numbers of a transformers model, on any device."""
    any_model: Any = model
    shape = any_model.config.get_text_config()
    embedding = any_model.get_input_embeddings().weight.numel()
    matrices = sum(p.numel() for p in any_model.get_decoder().parameters() if p.ndim > 1)
    head_dim = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    return ModelSize(
        parameters=sum(p.numel() for p in model.parameters()),
        matmul=matrices - embedding,
        vocab_size=shape.vocab_size,
        hidden=shape.hidden_size,
        layers=shape.num_hidden_layers,
        query=shape.num_attention_heads * head_dim,
        key=(getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads) * head_dim,
        mlp=getattr(shape, "intermediate_size", None) or 4 * shape.hidden_size,
    )


def student_size(config: Config, model: nn.Module) -> StudentSize:
    """The same with what is quantized and trained; turns an empty model into an (unquantized) student."""
    from raydistill.models import DTYPES, StudentSpec
    from raydistill.quant.student import prepare_student, quantizable_modules, student_form

    spec, size = StudentSpec.of(config), model_size(model)
    layers = {name: layer.weight.numel() for name, layer in quantizable_modules(model, config.quant.skip).items()}
    linear = {name: p.numel() for name, p in model.named_parameters()}
    student = prepare_student(model, None, config.adapter.mode, spec.lora, skip=config.quant.skip)
    return StudentSize(
        model=size,
        mode=config.adapter.mode,
        quantizable=sum(layers.values()),
        targets=sum(linear.get(f"{name}.weight", 0) for name in student_form(student).targets),
        trainable=sum(p.numel() for p in student.parameters() if p.requires_grad),
        largest_layer=max(layers.values(), default=0),
        is_quantized=spec.weight_format is not None,
        is_searched=config.quant.scale == "searched",
        weight_bytes=DTYPES[config.student.dtype].itemsize,
    )


def longest(config: Config) -> Lengths:
    """The longest prompt that is kept, and the longest completion that is trained on: a sampled one ends at
    rollout.max_new_tokens, a reference may fill data.max_length."""
    room = max(config.data.min_prompt_room, config.rollout.max_new_tokens if config.needs_rollouts else 0)
    sampled = config.rollout.max_new_tokens if config.needs_rollouts else 0
    given = config.data.max_length - 1 if config.objective.on_policy_fraction < 1 else 0
    return Lengths(prompt=max(config.data.max_length - room - 1, 1), completion=max(sampled, given))


def memory(
    config: Config, student: StudentSize, teacher: ModelSize | None, answer: Answer | None
) -> dict[str, list[Part]]:
    """The parts of one actor of each role, every sequence at its longest."""
    from raydistill.actors.evaluator import EVAL_BATCH
    from raydistill.actors.teacher import LOGITS_ROWS
    from raydistill.models import DTYPES

    trainer, rollout, bound = config.trainer, config.rollout, longest(config)
    sequence = config.data.max_length
    step_sequences = trainer.sequences_per_step if config.needs_rollouts else config.data.eval_rows
    new_tokens = rollout.max_new_tokens if config.needs_rollouts else config.evaluation.max_new_tokens
    sampled = Batch(
        sequences=-(-step_sequences // rollout.num_actors),
        tokens=int(min(bound.prompt, sequence - new_tokens)) + new_tokens,
        completion=new_tokens,
    )
    completion = int(bound.completion)
    scored_at_once = min(trainer.sequences_per_step, max(1, config.teacher.batch_tokens // sequence))
    held_out = Batch(sequences=min(EVAL_BATCH, config.data.eval_rows), tokens=sequence, completion=sequence - 1)
    found = {
        "rollout": rollout_memory(
            student,
            sampled,
            engine=rollout.engine,
            place=_place(rollout.num_gpus),
            tensor_parallel=rollout.tensor_parallel_size,
            cpu_cache_bytes=max(1, round(rollout.kv_cache_gib)) * 2**30,
        ),
        "trainer": trainer_memory(
            student,
            Batch(sequences=trainer.sequences_per_micro_batch, tokens=sequence, completion=completion),
            answer,
            place=_place(trainer.num_gpus),
            stage=trainer.zero_stage,
            world_size=trainer.num_workers,
            checkpointing=trainer.gradient_checkpointing,
        ),
        "evaluation": evaluator_memory(
            student,
            held_out,
            answer,
            held_out_tokens=config.data.eval_rows * held_out.completion,
            place=_place(config.evaluation.num_gpus),
        ),
    }
    if teacher is not None and answer is not None:
        found["teacher"] = teacher_memory(
            teacher,
            DTYPES[config.teacher.dtype].itemsize,
            Batch(sequences=scored_at_once, tokens=sequence, completion=completion),
            answer,
            logits_rows=LOGITS_ROWS,
            place=_place(config.teacher.num_gpus),
            num_devices=max(1, int(config.teacher.num_gpus)),
        )
    return found


def _place(num_gpus: float) -> Place:
    return "GPU" if num_gpus > 0 else "host"
