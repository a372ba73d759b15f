"""Runs inside vLLM's workers: keeps the student's full-precision W and rebuilds the served weights from A and B.

vLLM mixes this class into its worker (`worker_extension_cls`), so `self.model_runner` is the worker's. Only A and B
arrive; W stays on the host. The codes are made by the same function as in the trainer, in float32, per unfused module, on
the worker's device; vLLM's own loader then fuses them (qkv_proj, gate_up_proj).

Under tensor parallelism a rank keeps and rebuilds its own part of each layer only (`quant.shards`): quantizing is what a
rebuild costs. vLLM's loader takes whole weights in the checkpoint's format and narrows them to its rank's part, so that
part is handed over in a tensor of the whole layer's shape. The loader's other format ("kernel format", already sharded)
knows neither fused modules by their parts nor the packing that a CPU's kernels want.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from multiprocessing.connection import wait
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed.parallel_state import get_tp_group
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor

from raydistill.models import StudentSpec, quantizable_weights
from raydistill.quant.hashing import CodesDigest, hash_tensors
from raydistill.quant.shards import WHOLE, LayerSplit, heads_split, join_codes, shard_of
from raydistill.quant.student import check_adapter, other_trained, rebuild_codes, rebuild_weight


class StudentWorkerExtension:
    """Methods that `LLM.collective_rpc` calls on every worker of the engine."""

    model_runner: Any
    device: torch.device  # the worker's

    def hold_student(self, spec: StudentSpec) -> int:
        """Read W once, keep this rank's part of it; nothing but adapters arrives from then on. Returns the weights kept.

        While it is read, the whole model lies on the host once for each rank.
        """
        self._spec = spec
        _end_with_parent()
        model, rank = self.model_runner.get_model(), get_tp_group().rank_in_group
        whole = quantizable_weights(spec)
        self._shards = {
            name: shard_of(tuple(weight.shape), layer_split(model, name), rank, spec.weight_format)
            for name, weight in whole.items()
        }
        self._whole = {name: torch.empty_like(weight, device="meta") for name, weight in whole.items()}  # shapes only
        # Copies of the parts: a view would keep the whole layer in memory.
        self._base = {
            name: weight if self._shards[name].is_whole else self._shards[name].of_weight(weight).clone()
            for name, weight in whole.items()
        }
        if spec.adapter.mode == "served":
            self._rebuild({})
        return sum(shard.num_weights for shard in self._shards.values())

    def load_student(
        self, tensors: dict[str, Any], want_codes: bool, adapter_id: int | None, dropped_id: int | None
    ) -> tuple[str, str | None]:
        """Make the engine compute these A and B; returns (hash of the loaded tensors, hash of the codes, on the first rank
        only). A served adapter gets `adapter_id`, in the place of `dropped_id` if that is given."""
        # Ray hands out read-only shared memory, which torch cannot wrap.
        state = {name: torch.from_numpy(array.copy()) for name, array in tensors.items()}
        if adapter_id is not None:
            self._swap_adapter(adapter_id, dropped_id, state)
        else:
            self._rebuild(state)
        return hash_tensors(state), self._codes_hash(state) if want_codes else None

    def _rebuild(self, state: Mapping[str, Tensor]) -> None:
        """Write the student's weights into the running model; layers that are not named keep theirs."""
        check_adapter(
            self._whole, state, self._spec.adapter.mode
        )  # a rank's parts would not show a name that fits nothing
        self.model_runner.reload_weights(weights_iterator=self._rebuilt(state))
        if self._spec.adapter.mode == "none":
            self._refresh_tied_head()

    def _rebuilt(self, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        spec = self._spec
        # In the model's order: the loader fuses neighbours.
        for name, weight, adapter in self._layers(self._base, state):
            dense = rebuild_weight(name, weight, adapter, spec.weight_format, spec.scaling, spec.adapter.mode)
            yield f"{name}.weight", self._shards[name].placed(dense)
        if spec.adapter.mode == "none":
            yield from other_trained(self._base, state)

    def _layers(
        self, names: Iterable[str], state: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """(name, this rank's part of W on its device, what of A and B belongs to it), one layer at a time."""
        for name in names:
            yield name, self._base[name].to(self.device), self._shards[name].of_adapter(name, state)

    def _codes_hash(self, state: Mapping[str, Tensor]) -> str | None:
        """`hash_codes` of the whole student on the first rank, from the parts that every rank rebuilt; None elsewhere, and
        for a student without codes."""
        spec, group, digest = self._spec, get_tp_group(), CodesDigest()
        if spec.weight_format is None:
            return None
        for name, weight, adapter in self._layers(sorted(self._base), state):
            adapter = {} if spec.adapter.mode == "served" else adapter
            codes = rebuild_codes({name: weight}, adapter, spec.weight_format, spec.scaling, spec.adapter.mode)[name]
            mine = (self._shards[name], codes.to("cpu"))
            parts: list[Any] | None = [mine]
            if group.world_size > 1:
                parts = [None] * group.world_size if group.rank_in_group == 0 else None
                torch.distributed.gather_object(mine, parts, dst=group.ranks[0], group=group.cpu_group)
            if parts is not None:
                digest.add(name, join_codes(parts))
        return digest.value if group.rank_in_group == 0 else None

    def _refresh_tied_head(self) -> None:
        """On CPU a tied lm_head keeps a packed copy of the embedding that a reload does not touch."""
        head = getattr(self.model_runner.get_model(), "lm_head", None)
        method = getattr(head, "quant_method", None)
        if method is not None:
            method.process_weights_after_loading(head)

    def _swap_adapter(self, adapter_id: int, dropped_id: int | None, state: dict[str, Tensor]) -> None:
        """Add a served adapter, in the place of another."""
        worker_manager = self.model_runner.lora_manager
        manager = worker_manager._adapter_manager
        if dropped_id is not None:
            manager.remove_adapter(dropped_id)
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


def _end_with_parent() -> None:
    """Let a rank that has a process of its own end as soon as the engine's process has: vLLM's own way out can wait for
    the other ranks for ever, and the memory of a device is wanted by the replacement."""
    parent = multiprocessing.parent_process()

    def end(sentinel: int) -> None:
        wait([sentinel])
        os._exit(1)

    if parent is not None:
        threading.Thread(target=end, args=(parent.sentinel,), daemon=True, name="end-with-parent").start()


def layer_split(model: nn.Module, name: str) -> LayerSplit:
    """How vLLM's `model` shares the layer that Hugging Face calls `name`; whole where it has no plain layer of that name,
    which costs time and is never wrong."""
    parent, _, leaf = name.rpartition(".")
    packed: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    fused, parts = next(((fused, parts) for fused, parts in packed.items() if leaf in parts), (leaf, [leaf]))
    try:
        layer: Any = model.get_submodule(f"{parent}.{fused}")
    except AttributeError:
        return WHOLE
    layer = getattr(layer, "base_layer", layer)  # under a served adapter
    kind, world_size = type(layer), getattr(layer, "tp_size", 1)  # the class itself: subclasses share in their own ways
    if world_size == 1:
        return WHOLE
    if kind is QKVParallelLinear and len(parts) == 3:
        heads = layer.total_num_heads if parts.index(leaf) == 0 else layer.total_num_kv_heads
        return heads_split(heads, world_size)
    if kind is ColumnParallelLinear or (kind is MergedColumnParallelLinear and len(parts) == len(layer.output_sizes)):
        return LayerSplit(along="outputs", world_size=world_size)
    return LayerSplit(along="inputs", world_size=world_size) if kind is RowParallelLinear else WHOLE
