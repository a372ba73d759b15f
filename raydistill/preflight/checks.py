"""Fail before starting: what can be known about models and config without an engine, one clear line for each complaint.

Runs in the driver at the start of every run. Loads tokenizers and configs, never weights.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydistill.config import Config
from raydistill.data.encode import num_known_ids
from raydistill.errors import ConfigError, ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What the rest of a run needs to know about the two models."""

    tokenizer: Any  # the student's
    teacher_tokenizer: Any  # None where the teacher is the student's own model, or there is none
    vocab_size: int  # ids that mean something: both models have them and the tokenizer knows them
    student_vocab_size: int  # the student's own: rows above `vocab_size` are padding, neither sampled nor scored
    eos_ids: tuple[int, ...]
    max_length: int  # positions of the shorter model


def check_models(config: Config) -> ModelFacts:
    """Load both sides' tokenizers and configs and compare them; raises ModelError or QuantError."""
    student = config.student.model
    if student is None:
        raise ConfigError(
            "student.model is not set; give a folder or hub id (--student.model FOLDER), or a world that makes one "
            "(--world.name stories)"
        )
    model_config, tokenizer = _read(student, "student.model", config.student.trust_remote_code)
    student_vocab_size, max_length = model_config.get_text_config().vocab_size, _max_length(model_config)
    vocab_size, teacher_tokenizer = min(student_vocab_size, num_known_ids(tokenizer)), None
    if config.needs_teacher and config.teacher.model not in (None, student):
        teacher = config.teacher.model
        assert teacher is not None
        teacher_config, teacher_tokenizer = _read(teacher, "teacher.model", config.teacher.trust_remote_code)
        _compare_vocabularies(student, tokenizer, teacher, teacher_tokenizer)
        _compare_eos(student, tokenizer, teacher, teacher_tokenizer)
        vocab_size = min(vocab_size, teacher_config.get_text_config().vocab_size)
        max_length = min(max_length, _max_length(teacher_config))
    objective = config.objective
    covers_all = objective.target == "top_k" and vocab_size <= objective.top_k
    if config.needs_teacher and objective.beta == 1 and covers_all and vocab_size < student_vocab_size:
        # The teacher's tail would be empty and the student's not.
        raise ModelError(
            f"objective.top_k={objective.top_k} covers all {vocab_size:,} ids that mean something, but the student has "
            f"{student_vocab_size:,}, and the reverse KL (objective.beta=1) would be infinite; use objective.target='dense', "
            "or a smaller objective.top_k"
        )
    if config.data.max_length > max_length:
        raise ModelError(
            f"data.max_length={config.data.max_length} is longer than the model's {max_length} positions; lower it to "
            f"{max_length} or choose a model with more"
        )
    check_layers(config, _empty_student(config))
    _check_ranks(config, model_config)
    return ModelFacts(
        tokenizer=tokenizer,
        teacher_tokenizer=teacher_tokenizer,
        vocab_size=vocab_size,
        student_vocab_size=student_vocab_size,
        eos_ids=_eos_ids("student.model", student, tokenizer),
        max_length=max_length,
    )


def _check_ranks(config: Config, model_config: Any) -> None:
    """Attention heads divide over the ranks of an engine; vLLM would say so after minutes."""
    ranks, shape = config.rollout.tensor_parallel_size, model_config.get_text_config()
    queries = shape.num_attention_heads
    keys = getattr(shape, "num_key_value_heads", None) or queries
    if queries % ranks or (keys % ranks and ranks % keys):
        fitting = [n for n in range(1, queries + 1) if queries % n == 0 and not (keys % n and n % keys)]
        raise ModelError(
            f"rollout.tensor_parallel_size={ranks} does not divide student.model's {queries} attention heads ({keys} of keys); "
            f"use one of {', '.join(map(str, fitting))}"
        )


def _read(model: str, field: str, trust_remote_code: bool) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoTokenizer

    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{field}={model!r} is a folder without config.json, so not a model; {_contents(path)}")
        if not list(path.glob("*.safetensors")):
            raise ModelError(
                f"{field}={model!r} has no *.safetensors file; weights are read from safetensors only: convert it with "
                "save_pretrained(...)"
            )
    elif path.exists():
        raise ModelError(f"{field}={model!r} is a file; give the folder that holds config.json")
    elif model.startswith(("/", "./", "../", "~")) or model.count("/") > 1:
        raise ModelError(f"{field}={model!r} does not exist{_nearest(path)}")
    try:
        return (
            AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code),
            AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code),
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        if "trust_remote_code" in str(error):
            reason = f"it ships its own code; if you trust it, set {field.split('.')[0]}.trust_remote_code=true"
        raise ModelError(f"{field}={model!r} cannot be read as a model: {reason}") from error


def _contents(path: Path) -> str:
    names = sorted(p.name for p in path.iterdir())[:5]
    return f"it holds {', '.join(names)}" if names else "it is empty"


def _nearest(path: Path) -> str:
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else "; give a folder with config.json or a hub id"


def _max_length(model_config: Any) -> int:
    return int(getattr(model_config.get_text_config(), "max_position_embeddings", None) or 2**31)


def _compare_vocabularies(student: str, tokenizer: Any, teacher: str, other: Any) -> None:
    """Ids must mean the same token on both sides; ids that only one side has are padding."""
    mine = {i: token for token, i in tokenizer.get_vocab().items()}
    theirs = {i: token for token, i in other.get_vocab().items()}
    shared = sorted(mine.keys() & theirs.keys())
    wrong = [i for i in shared if mine[i] != theirs[i]]
    if wrong or not shared:
        first = wrong[0] if wrong else 0
        raise ModelError(
            f"teacher.model={teacher!r} and student.model={student!r} disagree on {len(wrong):,} of {len(shared):,} token ids, "
            f"first at id {first}: {theirs.get(first)!r} vs {mine.get(first)!r}. Choose models that share a tokenizer"
        )


def _compare_eos(student: str, tokenizer: Any, teacher: str, other: Any) -> None:
    mine = set(_eos_ids("student.model", student, tokenizer))
    theirs = set(_eos_ids("teacher.model", teacher, other))
    if not mine & theirs:
        names = [t.convert_ids_to_tokens(sorted(ids)) for t, ids in ((tokenizer, mine), (other, theirs))]
        raise ModelError(
            f"student.model ends a text with {names[0]}, teacher.model with {names[1]}: the student would be taught not to "
            "stop. Use a base model with a base teacher or an instruct model with an instruct teacher, or set eos_token_id "
            "in the student's generation_config.json"
        )


def _eos_ids(field: str, model: str, tokenizer: Any) -> tuple[int, ...]:
    from raydistill.models import eos_ids

    ids = eos_ids(model, tokenizer)
    if not ids:
        raise ModelError(f"{field}={model!r} names no end-of-sequence token; set eos_token in its tokenizer")
    return ids


def _empty_student(config: Config) -> Any:
    from raydistill.models import empty_model

    model = config.student.model
    assert model is not None
    try:
        return empty_model(model, config.student.trust_remote_code)
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"student.model={model!r} is no causal language model: {reason}") from error


def check_layers(config: Config, model: Any) -> None:
    """Group sizes and adapter targets against the architecture, a model without weights that becomes a student."""
    from raydistill.models import StudentSpec
    from raydistill.quant.grid import check_group_size
    from raydistill.quant.student import prepare_student, quantizable_modules

    spec = StudentSpec.of(config)
    # Without a format nothing is computed on the empty weights; the group size is checked by hand.
    layers = quantizable_modules(model, config.quant.skip)
    if spec.weight_format is not None:
        for name, layer in layers.items():
            check_group_size(layer.in_features, spec.weight_format, name, "quant.group_size")
    prepare_student(model, None, config.adapter.mode, spec.lora, skip=config.quant.skip)
