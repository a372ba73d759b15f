"""The same requests to a running server, timed: vLLM's own load generator (`vllm bench serve`) on prompts of token ids.

vLLM's command line for it does not start with the CPU build, and takes text only, so its function is called. It prints a
report of its own and takes proxies from the environment; both are kept out of the way here.
"""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import Coroutine, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

from raydistill.errors import RunError
from raydistill.quiet import quiet_libraries
from raydistill.serving.serve import HOST


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One pass over the prompts; lists have one entry for each request."""

    seconds: float  # of the whole pass
    first_token_s: list[float]
    request_s: list[float]
    num_tokens: list[int]  # written by the model

    @property
    def tokens_per_s(self) -> float:
        return sum(self.num_tokens) / self.seconds

    @property
    def per_token_s(self) -> list[float]:
        """Time per token after the first, of each request that has more than one."""
        times = zip(self.request_s, self.first_token_s, self.num_tokens, strict=True)
        return [(request - first) / (number - 1) for request, first, number in times if number > 1]


def load_generator() -> Any:
    """vLLM's function; imports vLLM, which takes seconds."""
    quiet_libraries()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["NO_PROXY"] = ",".join(filter(None, [os.environ.get("NO_PROXY"), HOST]))
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        from vllm.benchmarks.serve import benchmark
    return benchmark


async def _quietly(work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
    """What fails is in the result; of requests that a signal cuts off asyncio would print tracebacks."""
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
    return await work


def send(
    generator: Any, port: int, model: str, prompts: Sequence[Sequence[int]], new_tokens: int, concurrency: int
) -> Load:
    """Every prompt once, at most `concurrency` at a time; each gets exactly `new_tokens` greedy tokens.

    generator: `load_generator()`. RunError, with the server's words, if a request fails.
    """
    from vllm.benchmarks.datasets import SampleRequest
    from vllm.benchmarks.serve import TaskType

    requests = [SampleRequest(prompt=list(ids), prompt_len=len(ids), expected_output_len=new_tokens) for ids in prompts]
    pass_over = generator(
        task_type=TaskType.GENERATION,
        endpoint_type="openai",
        api_url=f"http://{HOST}:{port}/v1/completions",
        base_url=f"http://{HOST}:{port}",
        model_id=model,
        model_name=model,
        tokenizer=None,
        input_requests=requests,
        logprobs=None,
        request_rate=float("inf"),
        burstiness=1.0,
        disable_tqdm=True,
        num_warmups=0,
        profile=False,
        selected_percentile_metrics=[],
        selected_percentiles=[50.0],
        ignore_eos=True,
        goodput_config_dict={},
        max_concurrency=concurrency,
        lora_modules=None,
        extra_headers=None,
        extra_body={"temperature": 0.0},
        ready_check_timeout_sec=0,
    )
    with redirect_stdout(io.StringIO()):
        result = asyncio.run(_quietly(pass_over))
    if result["failed"]:
        reason = next(error for error in result["errors"] if error).strip().splitlines()[-1]
        raise RunError(f"{result['failed']} of {len(requests)} requests to {model} failed: {reason}")
    return Load(
        seconds=result["duration"],
        first_token_s=result["ttfts"],
        request_s=result["latencies"],
        num_tokens=result["output_lens"],
    )
