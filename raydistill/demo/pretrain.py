"""Trains a tiny Qwen3 from nothing on one CPU core: the teacher of the embedded world.

`train_language_model` is a pure function of (rows, recipe): the schedule counts steps, never seconds, and every draw
comes from the recipe's seed. Layer matrices are trained with Muon, everything else with AdamW; at this size that
needs half the steps of AdamW alone. The folder appears complete or not at all.
"""

import os
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from raydistill.demo.batches import Batch, LossOn, make_batches
from raydistill.demo.fast_forward import counted_logits
from raydistill.demo.muon import Muon
from raydistill.demo.progress import StepProgress
from raydistill.demo.tokenizer import TokenRow, save_tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherRecipe:
    """Size and schedule of one teacher; the defaults are those of the arithmetic stories."""

    hidden_size: int = 96
    num_layers: int = 3
    num_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32  # the smallest that vLLM serves on CPU
    mlp_size: int = 288
    rope_theta: float = 10_000.0
    vocab_size: int = 512  # an upper bound: the tokenizer may need fewer
    max_length: int = 512
    num_steps: int = 1000
    batch_size: int = 32
    warmup_steps: int = 100
    decay_fraction: float = 0.5  # the last part of the steps, over which both learning rates fall to 0
    matrix_learning_rate: float = 0.02
    matrix_momentum: float = 0.95
    learning_rate: float = 4e-3
    weight_decay: float = 0.01
    max_gradient_norm: float = 1.0
    loss_on: LossOn = "completion"
    num_threads: int = 1
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherReport:
    """What the training cost and where it ended."""

    num_parameters: int
    num_steps: int
    final_loss_nats: float  # mean of the last 20 steps
    wall_s: float
    cpu_s: float


def train_language_model(
    rows: Iterable[TokenRow],
    recipe: TeacherRecipe,
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    progress: StepProgress | None = None,
) -> TeacherReport:
    """Trains on (prompt ids, completion ids) rows and saves model, tokenizer and generation settings in `folder`."""
    wall, cpu = time.perf_counter(), time.process_time()
    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.num_threads)
    try:
        model = new_model(recipe, tokenizer)
        losses = run_steps(model, list(rows), recipe, progress)
    finally:
        torch.set_num_threads(threads)
    save_model(model, tokenizer, folder)
    return TeacherReport(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_steps=len(losses),
        final_loss_nats=sum(losses[-20:]) / len(losses[-20:]),
        wall_s=time.perf_counter() - wall,
        cpu_s=time.process_time() - cpu,
    )


def new_model(recipe: TeacherRecipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A fresh float32 Qwen3 of the recipe's size, its weights drawn from the recipe's seed."""
    config = _architecture(
        recipe, len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return Qwen3ForCausalLM(config).float()


def empty_teacher(recipe: TeacherRecipe) -> Qwen3ForCausalLM:
    """The same without weights (meta device), with as many ids as the recipe allows: what is known before the tokenizer."""
    with torch.device("meta"):
        return Qwen3ForCausalLM(_architecture(recipe, recipe.vocab_size))


def _architecture(recipe: TeacherRecipe, vocab_size: int, **special_ids: int | None) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.mlp_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_key_value_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=recipe.max_length,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=None,
        dtype="float32",
        **special_ids,
    )


def run_steps(
    model: Qwen3ForCausalLM, rows: Sequence[TokenRow], recipe: TeacherRecipe, progress: StepProgress | None
) -> list[float]:
    """The training loop; returns the loss of every step in nats per counted token."""
    optimizers = make_optimizers(model, recipe)
    losses: list[float] = []
    model.train()
    batches = make_batches(rows, recipe.batch_size, recipe.max_length, recipe.loss_on, recipe.seed)
    for step in range(recipe.num_steps):
        batch = next(batches)
        loss = mean_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_gradient_norm)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * schedule(step, recipe)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if progress is not None:
            progress(step + 1, losses[-1])
    return losses


def mean_loss(model: Qwen3ForCausalLM, batch: Batch) -> Tensor:
    """Cross-entropy in nats per counted token."""
    logits_NV = counted_logits(model, batch.input_ids_BT, batch.counted_BC, batch.keep_N)
    return torch.nn.functional.cross_entropy(logits_NV, batch.targets_N)


def make_optimizers(model: Qwen3ForCausalLM, recipe: TeacherRecipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    inside = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    ids = {id(parameter) for parameter in inside}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in ids]
    optimizers = [
        Muon(
            inside,
            lr=recipe.matrix_learning_rate,
            momentum=recipe.matrix_momentum,
            weight_decay=recipe.weight_decay,
        ),
        torch.optim.AdamW(
            rest, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay, foreach=True
        ),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def schedule(step: int, recipe: TeacherRecipe) -> float:
    """Factor on the learning rates: linear warm-up, constant, linear decay to zero."""
    warmup = (step + 1) / max(1, recipe.warmup_steps)
    decay = (recipe.num_steps - step) / max(1.0, recipe.decay_fraction * recipe.num_steps)
    return min(1.0, warmup, decay)


def save_model(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Safetensors, tokenizer and generation settings, written beside `folder` and then moved into its place."""
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.eval().save_pretrained(partial)
    save_tokenizer(tokenizer, partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
