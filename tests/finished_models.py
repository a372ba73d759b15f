"""Adapters and runs as they lie on the disk, made without training."""

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from raydistill.config import Config
from raydistill.messages import StudentWeights
from raydistill.models import StudentSpec, build_student
from raydistill.quant.hashing import hash_codes
from raydistill.quant.student import adapter_state, load_adapter_state, student_codes
from raydistill.recovery.checkpoint import save_checkpoint
from raydistill.results.record import RunRecord


def write_lora(base: Path, folder: Path, seed: int, targets: Sequence[str] = ("q_proj", "down_proj")) -> Path:
    """A LoRA adapter over a model folder, in PEFT's format, that changes what the model says."""
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.2 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return folder


def write_run(folder: Path, base: Path, rows: Path, mode: str = "merged", versions: Sequence[int] = (0, 2, 4)) -> Path:
    """A run's folder with a record and checkpoints further and further from their start, and no export."""
    section = {"path": str(rows), "eval_rows": 6, "min_completion": 1, "min_prompt_room": 1, "max_length": 256}
    config = Config.model_validate(
        {
            "student": {"model": str(base), "dtype": "float32"},
            "data": section,
            "quant": {"format": "int4", "group_size": 32},
            "adapter": {"mode": mode, "rank": 2, "alpha": 4},
        }
    )
    with RunRecord(folder) as record:
        record.start(name=folder.name, config=config.model_dump(mode="json"), provenance={}, seed=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = build_student(StudentSpec.of(config))
    start = adapter_state(student)
    noise = torch.Generator().manual_seed(1)
    steps = {key: torch.randn(value.shape, generator=noise) for key, value in start.items()}
    for version in versions:
        state = {key: value + 0.02 * version * steps[key] for key, value in start.items()}
        load_adapter_state(student, state)
        codes = student_codes(student)
        weights = StudentWeights(version=version, tensors={k: v.numpy() for k, v in state.items()}, probe=None)
        save_checkpoint(folder / "checkpoints", weights, {"codes_hash": hash_codes(codes) if codes else None})
    return folder
