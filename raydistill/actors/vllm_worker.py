"""Runs inside vLLM's worker: keeps the student's full-precision W and rebuilds the served weights from A and B.

vLLM mixes this class into its worker (`worker_extension_cls`), so `self.model_runner` is the worker's. Only A and B
arrive; W stays on the host. The codes are made by the same function as in the trainer, in float32, per unfused module;
vLLM's own loader then fuses and shards them (qkv_proj, gate_up_proj, tensor parallel).
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor

from raydistill.models import StudentSpec, quantizable_weights
from raydistill.quant.hashing import hash_codes, hash_tensors
from raydistill.quant.student import rebuild_codes, rebuild_weights


class StudentWorkerExtension:
    """Methods that `LLM.collective_rpc` calls on every worker of the engine."""

    model_runner: Any

    def hold_student(self, spec: StudentSpec) -> None:
        """Read W once; nothing but adapters arrives from then on."""
        self._spec = spec
        self._base = quantizable_weights(spec)
        self._adapter_id = 0
        if spec.adapter.mode == "served":
            self._rebuild({})

    def load_student(self, version: int, tensors: dict[str, Any], want_codes: bool) -> tuple[str, str | None]:
        """Make the engine compute version `version`; returns (hash of the loaded tensors, hash of the codes)."""
        # Ray hands out read-only shared memory, which torch cannot wrap.
        state = {name: torch.from_numpy(array.copy()) for name, array in tensors.items()}
        spec = self._spec
        if spec.adapter.mode == "served":
            self._swap_adapter(version + 1, state)
        else:
            self._rebuild(state)
        codes_hash = None
        if want_codes and spec.weight_format is not None:
            codes = rebuild_codes(self._base, state, spec.weight_format, spec.scaling, spec.adapter.mode)
            codes_hash = hash_codes(codes)
        return hash_tensors(state), codes_hash

    def _rebuild(self, state: dict[str, torch.Tensor]) -> None:
        """Write the student's weights into the running model; layers that are not named keep theirs."""
        spec = self._spec
        weights = rebuild_weights(self._base, state, spec.weight_format, spec.scaling, spec.adapter.mode)
        self.model_runner.reload_weights(weights_iterator=weights)
        if spec.adapter.mode == "none":
            self._refresh_tied_head()

    def _refresh_tied_head(self) -> None:
        """On CPU a tied lm_head keeps a packed copy of the embedding that a reload does not touch."""
        head = getattr(self.model_runner.get_model(), "lm_head", None)
        method = getattr(head, "quant_method", None)
        if method is not None:
            method.process_weights_after_loading(head)

    def _swap_adapter(self, adapter_id: int, state: dict[str, torch.Tensor]) -> None:
        """Replace the served adapter; a new id for every version, so no cache can serve an old one (vLLM #47724)."""
        worker_manager = self.model_runner.lora_manager
        manager = worker_manager._adapter_manager
        if self._adapter_id:
            manager.remove_adapter(self._adapter_id)
        adapter = self._spec.adapter
        helper = PEFTHelper(r=adapter.rank, lora_alpha=int(adapter.alpha), target_modules=list(adapter.targets))
        helper.vllm_lora_scaling_factor = self._spec.scaling
        # Copies: vLLM scales B in place, and the hash of `state` is compared with the trainer's.
        named = {f"base_model.model.{key}.weight": tensor.clone() for key, tensor in state.items()}
        mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
        lora = LoRAModel.from_lora_tensors(
            lora_model_id=adapter_id,
            tensors=named,
            peft_helper=helper,
            device="cpu",
            dtype=worker_manager.lora_config.lora_dtype,
            weights_mapper=mapper.get_rename_mapper() if mapper is not None else None,
        )
        manager.add_adapter(lora)
        manager.activate_adapter(adapter_id)
        self._adapter_id = adapter_id


class SampledIds(LogitsProcessor):
    """Keeps every request from sampling padding: ids from `additional_config["sampled_ids"]` on mean nothing.

    Scores (prompt log-probs) are those of the whole softmax, as in the trainer.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._sampled_ids = int(vllm_config.additional_config["sampled_ids"])

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """[B, V] -> [B, V], in place."""
        logits[:, self._sampled_ids :] = float("-inf")
        return logits

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """All requests are alike."""
