"""What vLLM has to be told: environment variables, set before its process starts, and the LoRA ranks it allocates.

Plain data, so that light modules can use it.
"""

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)

CPU_ENGINE_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_TARGET_DEVICE": "cpu",
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
