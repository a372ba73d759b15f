"""What `raydistill bench` needs before and beside its servers: prompts, the dtype of both, what the memory holds."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydistill.cli import console
from raydistill.errors import DataError, UserError
from raydistill.quant.formats import MANIFEST

if TYPE_CHECKING:
    from raydistill.data.rows import Row
    from raydistill.evaluate.run_defaults import RunDefaults

GIB = 2**30
CPU_KV_CACHE = "VLLM_CPU_KVCACHE_SPACE"  # GiB; vLLM's own variable
PROCESS_BYTES = 3 * GIB  # of vLLM itself: two processes with torch in each
MOST_OF_A_GPU = 0.45  # of its memory, for one of two servers
QUESTIONS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "A train travels 120 km in 1.5 hours. What is its average speed?",
    "Write a short poem about autumn.",
    "List three uses of a paper clip.",
    "Translate into German: The weather is nice today.",
    "What is the difference between a list and a tuple in Python?",
    "Give me a recipe for pancakes.",
)


def prompt_ids(
    student: Path,
    teacher: Path,
    defaults: RunDefaults | None,
    file: Path | None,
    num_requests: int,
    new_tokens: int,
) -> tuple[list[list[int]], str]:
    """(`num_requests` prompts as token ids by the student's chat template, where they are from).

    Fewer prompts than requests are repeated; those that leave no room for `new_tokens` are left out.
    """
    from transformers import AutoTokenizer

    from raydistill.data.encode import encode_rows
    from raydistill.evaluate.rows import file_section

    rows, source = _rows(defaults, file)
    try:
        tokenizer = AutoTokenizer.from_pretrained(student)
    except (OSError, ValueError) as error:
        raise UserError(f"{student} has no tokenizer that loads: {str(error).strip().splitlines()[0]}") from error
    positions = min(max_positions(student), max_positions(teacher))
    section = defaults.data if defaults is not None else file_section(positions)
    encoded = [example.prompt_ids.tolist() for example in encode_rows(rows, tokenizer, section)]
    fitting = [ids for ids in encoded if len(ids) + new_tokens <= positions]
    if not fitting:
        raise UserError(
            f"no prompt of {source} leaves room for --new-tokens {new_tokens} in the models' {positions} positions (the "
            f"shortest has {min(map(len, encoded))} tokens); lower --new-tokens, or give others with --prompts FILE"
        )
    return [fitting[index % len(fitting)] for index in range(num_requests)], source


def _rows(defaults: RunDefaults | None, file: Path | None) -> tuple[Sequence[Row], str]:
    from raydistill.data.rows import Message, Row
    from raydistill.evaluate.rows import rows_of_file, rows_of_run

    if file is not None:
        return rows_of_file(file, None).rows, str(file)
    if defaults is not None:
        try:
            return rows_of_run(defaults.data, None).rows, f"held out by run {defaults.run}"
        except DataError as error:
            console.print(f"{error}; built-in questions are sent", style="yellow", soft_wrap=True)
    rows = [Row(str(number), (Message("user", text),)) for number, text in enumerate(QUESTIONS)]
    return rows, "built-in questions"


def max_positions(folder: Path) -> int:
    """Longest sequence that the model knows."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder).get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 2**31)


def serving_dtype(student: Path) -> str:
    """What both servers compute in: the student's dtype; bfloat16 for 4-bit kernels, whose codes are of no dtype."""
    config = json.loads((student / "config.json").read_text())
    if config.get("quantization_config"):
        return "bfloat16"
    manifest = json.loads((student / MANIFEST).read_text()) if (student / MANIFEST).is_file() else {}
    return str(manifest.get("dtype") or config.get("dtype") or config.get("torch_dtype") or "bfloat16")


def same_for_both(dtype: str, is_side_by_side: bool) -> list[str]:
    """vLLM's arguments for a fair comparison: dtype, no prefix cache, the same KV cache."""
    options = ["--dtype", dtype, "--no-enable-prefix-caching"]
    if gpu_bytes_in_use() is not None:
        options += ["--kv-cache-memory-bytes", str(int(kv_cache_gib() * GIB))]
        if is_side_by_side:
            options += ["--gpu-memory-utilization", str(MOST_OF_A_GPU)]
    return options


def kv_cache_gib() -> float:
    """Of each server. On a CPU as `raydistill serve` asks for it; a GPU serves more requests at a time."""
    return float(os.environ.get(CPU_KV_CACHE, 1)) if gpu_bytes_in_use() is None else 4.0


def fits_side_by_side(weight_bytes: Sequence[int]) -> bool:
    """Whether both servers' weights (as served), caches and processes fit into what is free now."""
    import psutil

    cache = kv_cache_gib() * GIB
    in_use = gpu_bytes_in_use()
    if in_use is None:
        needed = sum(1.2 * size + cache + PROCESS_BYTES for size in weight_bytes)
        return needed < psutil.virtual_memory().available
    share = MOST_OF_A_GPU * _gpu_bytes()[1] / _num_gpus()  # without further arguments vLLM uses one GPU
    return in_use < 0.05 * _gpu_bytes()[1] and 1.2 * max(weight_bytes) + cache + PROCESS_BYTES < share


def gpu_bytes_in_use() -> int | None:
    """On all visible GPUs, by whatever process; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = _gpu_bytes()
    return total - free


def _gpu_bytes() -> tuple[int, int]:
    """(free, all) bytes of the visible GPUs."""
    import torch

    sizes = [torch.cuda.mem_get_info(device) for device in range(_num_gpus())]
    return sum(free for free, _ in sizes), sum(total for _, total in sizes)


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def resident_bytes(pid: int) -> int:
    """Of a process and its children; pages that they share count in each."""
    import psutil

    def of(process: Any) -> int:
        try:
            return int(process.memory_info().rss)
        except psutil.Error:
            return 0

    process = psutil.Process(pid)
    return sum(of(member) for member in (process, *process.children(recursive=True)))
