"""DeepSpeed behind five calls: forward, backward, step, gathered adapter state, learning rate. Only this file imports it.

ZeRO 0 to 3 give the same update. A step whose gradient is not finite leaves no trace: weights, optimizer state and
learning rate stay. DeepSpeed's wrapped optimizers check that themselves; stage 0 in float32 wraps none, so its optimizer
is taught here what they do.
"""

from __future__ import annotations

import math
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raydistill.config import TrainerSection
from raydistill.errors import RunError
from raydistill.imports import without
from raydistill.quant.hashing import CodesDigest
from raydistill.quant.student import adapter_state, layer_codes, student_form
from raydistill.tensors import CompletionModel, SequenceBatch
from raydistill.trainer.schedule import learning_rate_factor

STATE = "state"  # DeepSpeed's tag: the folder with its files


class DeepSpeedEngine:
    """One rank's engine; every method is collective over the ranks."""

    def __init__(
        self,
        model: CompletionModel,
        section: TrainerSection,
        dtype: str,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        use_gpu = section.num_gpus > 0
        if not use_gpu:
            os.environ["DS_ACCELERATOR"] = "cpu"
        with without("mlflow"):  # for DeepSpeed's autotuner
            import deepspeed

        if not use_gpu:
            # The shared-memory op would compile for 50 s on first use; gloo does not need it.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._section, self._deepspeed = section, deepspeed
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = optimizer or torch.optim.AdamW(
            parameters, lr=section.learning_rate, betas=section.betas, weight_decay=section.weight_decay
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(section, step))
        self._checks_gradients = section.zero_stage == 0 and dtype == "float32"
        if self._checks_gradients:
            _skip_overflow(optimizer)
        self._engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=parameters,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            dist_init_required=False,
            config=deepspeed_config(section, dtype),
        )
        if section.zero_stage == 3:
            _register_borrowed_parameters(model, deepspeed)

    @property
    def module(self) -> CompletionModel:
        """The wrapped model, for forward passes without gradients."""
        module: CompletionModel = self._engine.module
        return module

    @property
    def learning_rate(self) -> float:
        return float(self._engine.get_lr()[0])

    def forward(self, batch: SequenceBatch) -> Tensor:
        logits_NV: Tensor = self._engine(batch)
        return logits_NV

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def step(self, bad: bool) -> tuple[bool, float]:
        """After each backward; DeepSpeed updates at the last micro-batch. Returns (applied, gradient norm there).

        `bad`: this step must not be applied; its gradient is NaN already.
        """
        boundary = self._engine.is_gradient_accumulation_boundary()
        if boundary and self._checks_gradients:
            self._check_gradients(bad)
        self._engine.step()
        if not boundary:
            return True, 0.0
        applied: bool = self._engine.was_step_applied()
        assert not (bad and applied), "a step with a NaN gradient was applied"
        return applied, float(self._engine.get_global_grad_norm())

    def _check_gradients(self, bad: bool) -> None:
        """What ZeRO's optimizers note before they clip, under their names: the engine reads both after its step."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        self._engine.optimizer._global_grad_norm = norm
        self._engine.optimizer.overflow = bad or not math.isfinite(norm)

    def save_state(self, folder: Path) -> None:
        """Write weights, optimizer and schedule under `folder`; every rank writes its own files there."""
        self._engine.save_checkpoint(str(folder), tag=STATE, save_latest=False, exclude_frozen_parameters=True)

    def load_state(self, folder: Path) -> None:
        """Go on where `save_state` was called; a changed learning rate holds from here on."""
        path, _ = self._engine.load_checkpoint(str(folder), tag=STATE, load_module_strict=False)
        if path is None:
            raise RunError(f"DeepSpeed finds no state in {folder}")
        # The schedule's own state brings the old peak back; the configured one is what the user asks for now.
        scheduler, groups = self._engine.lr_scheduler, self._engine.optimizer.param_groups
        scheduler.base_lrs = [self._section.learning_rate] * len(groups)
        for group in groups:
            group["initial_lr"] = self._section.learning_rate
            group["lr"] = self._section.learning_rate * learning_rate_factor(self._section, scheduler.last_epoch)

    def adapter_state(self) -> dict[str, Tensor]:
        """The trainable state whole on every rank (ZeRO-3 gathers it)."""
        with self._gathered():
            return {
                name: tensor.detach().float().cpu().clone() for name, tensor in adapter_state(self.module.model).items()
            }

    def _gathered(self) -> Any:
        if self._section.zero_stage < 3:
            return nullcontext()
        return self._deepspeed.zero.GatheredParameters([p for p in self.module.parameters() if p.requires_grad])

    def codes_hash(self, rank: int) -> str | None:
        """`hash_codes` of the student, on rank 0; None on others and where nothing is quantized. One layer at a time: the
        codes of all of them, or what ZeRO-3 has split, need not fit a device."""
        model, digest = self.module.model, CodesDigest()
        form = student_form(model)
        if form.fmt is None or (rank != 0 and self._section.zero_stage < 3):
            return None
        for name in sorted(form.quantized):
            with self._whole(model.get_submodule(name)):
                if rank == 0:
                    digest.add(name, layer_codes(model, name))
        return digest.value if rank == 0 else None

    def _whole(self, layer: nn.Module) -> Any:
        """Context in which a layer's parameters are whole on every rank (a no-op below ZeRO-3)."""
        if self._section.zero_stage < 3:
            return nullcontext()
        return self._deepspeed.zero.GatheredParameters(list(layer.parameters()))


def _skip_overflow(optimizer: Any) -> None:
    """Let `optimizer.step` do nothing where `optimizer.overflow` is set; the engine then keeps its scheduler too."""
    apply, optimizer.overflow = optimizer.step, False
    optimizer.step = lambda: None if optimizer.overflow else apply()


def _register_borrowed_parameters(model: nn.Module, deepspeed: Any) -> None:
    """ZeRO-3 fetches a parameter for the module that owns it; merged layers read their children's, so declare those."""
    for module in model.modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            for parameter in module.parameters():
                deepspeed.zero.register_external_parameter(module, parameter)


def deepspeed_config(section: TrainerSection, dtype: str) -> dict[str, Any]:
    """DeepSpeed's JSON configuration for one trainer section."""
    return {
        "train_micro_batch_size_per_gpu": section.sequences_per_micro_batch,
        "gradient_accumulation_steps": section.micro_batches_per_step,
        "gradient_clipping": section.max_grad_norm,
        "zero_optimization": {"stage": section.zero_stage, "overlap_comm": False},
        # A plain torch optimizer: DeepSpeed's own CPU Adam compiles for minutes.
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == "bfloat16", "check_grad_overflow": True},
        "steps_per_print": 10**9,
    }
