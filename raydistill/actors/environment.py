"""Environment variables of a vLLM process; set before it starts. Plain data, so that light modules can use it."""

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
