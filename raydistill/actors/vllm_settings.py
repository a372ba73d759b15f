"""What vLLM has to be told: environment variables, set before its process starts, and the arguments of its engine.

Plain data, so that light modules can use it.
"""

import os
from collections.abc import Iterable
from typing import Any

BLOCK_SIZE = 32  # CPU attention wants a multiple of 32
# One processor for the whole batch: allowed_token_ids would send a list as long as the vocabulary with every request.
SAMPLED_IDS = "raydistill.actors.vllm_worker:SampledIds"
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)

CPU_ENGINE_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_TARGET_DEVICE": "cpu",
    # Two small functions of the sampler would be compiled at their first use, by a C++ compiler that may not be there.
    "TORCHDYNAMO_DISABLE": "1",
}
ENGINE_ENVIRONMENT = {
    # In-process engine: one process, one failure domain; a dead engine process would hang a synchronous caller for ever.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def allocated_rank(rank: int) -> int:
    """The rank vLLM allocates for an adapter of `rank`: the next it knows; smaller adapters are padded up."""
    return next((known for known in LORA_RANKS if known >= rank), rank)


def engine_options(num_gpus: float, gpu_memory_utilization: float, sampled_ids: int | None) -> dict[str, Any]:
    """Arguments of every engine of ours. sampled_ids: sample ids below this only; None: all."""
    options: dict[str, Any] = {
        "generation_config": "vllm",  # the model's own sampling defaults (top_k ...) must not leak in
        "max_logprobs": -1,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
    }
    if sampled_ids is not None:
        options |= {"logits_processors": [SAMPLED_IDS], "additional_config": {"sampled_ids": sampled_ids}}
    if os.environ.get("VLLM_TARGET_DEVICE") != "cpu" and num_gpus > 0:
        return options | {"gpu_memory_utilization": gpu_memory_utilization}
    return options | {"enforce_eager": True, "block_size": BLOCK_SIZE}


def lora_options(rank: int, targets: Iterable[str], num_adapters: int = 1) -> dict[str, Any]:
    """Arguments of an engine that swaps adapters of up to this rank and holds `num_adapters` at once.

    targets: the layers that have one. lm_head is none of them: LoRA on it together with prompt_logprobs kills the engine
    (vLLM 0.32).
    """
    return {
        "enable_lora": True,
        "max_loras": num_adapters,
        "max_cpu_loras": num_adapters,
        "max_lora_rank": allocated_rank(rank),
        "lora_target_modules": sorted(targets),
    }
