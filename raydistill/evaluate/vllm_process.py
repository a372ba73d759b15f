"""The other side of `VllmAnswerer`: one vLLM engine after another in a process of their own.

vLLM changes process-wide state (threads, seeds) and wants its environment before the process starts. The functions below
are what the process is asked to do, in this order: `start`, then `select` and the two kinds of questions, `stop`.
"""

# Shape letters: N continuation tokens of one sequence.
from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np

from raydistill.actors.vllm_engine import VllmEngine, load_vllm
from raydistill.actors.vllm_settings import engine_options, lora_options
from raydistill.config import RolloutSection
from raydistill.errors import RunError, UserError
from raydistill.messages import StudentWeights, TokenRows
from raydistill.models import StudentSpec

CHECKPOINT = "checkpoint"  # what the engine calls whose weights they are: here it holds one at a time
MEMORY_SHARE = 0.85  # of a GPU
P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineBase:
    """What one engine start holds, and what may be put over it."""

    model: str
    tokenizer: str
    dtype: str
    max_tokens: int  # of one sequence
    eos_ids: tuple[int, ...]
    sampled_ids: int | None
    num_gpus: int
    student: StudentSpec | None  # a run's student: `select` takes its weights; None: `select` takes PEFT folders
    lora_rank: int = 0  # of the PEFT folders; 0: there are none
    lora_layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert self.student is None or self.lora_rank == 0


class _Engine:
    """One engine, and what is over its base now."""

    def __init__(self, base: EngineBase) -> None:
        self._adapter: Any = None
        self._num_adapters = 0
        self._student: VllmEngine | None = None
        self._eos_ids = list(base.eos_ids)
        length = base.max_tokens + 1
        if base.student is not None:
            section = RolloutSection(num_gpus=base.num_gpus, gpu_memory_utilization=MEMORY_SHARE)
            self._student = VllmEngine(base.student, section, length, base.eos_ids, base.sampled_ids)
            return
        options = engine_options(base.num_gpus, MEMORY_SHARE, base.sampled_ids)
        if base.lora_rank:
            options |= lora_options(base.lora_rank, base.lora_layers)
        options |= {"dtype": base.dtype, "max_model_len": length}
        self._llm = load_vllm()(model=base.model, tokenizer=base.tokenizer, **options)

    def select(self, over: StudentWeights | Path | None) -> str | None:
        """Put this over the base from now on; returns the hash of a student's codes. A new number for every adapter, so that
        no cache serves an old one."""
        if self._student is not None:
            assert isinstance(over, StudentWeights)
            return self._student.load(CHECKPOINT, over, want_codes=True)[1]
        from vllm.lora.request import LoRARequest

        assert not isinstance(over, StudentWeights)
        self._adapter = None
        if over is not None:
            self._num_adapters += 1
            number = self._num_adapters
            self._adapter = LoRARequest(lora_name=f"adapter-{number}", lora_int_id=number, lora_path=str(over))
        self._llm.reset_prefix_cache()
        return None

    def generate(self, rows: Sequence[np.ndarray], params: Any) -> list[Any]:
        if self._student is not None:
            return self._student.generate(TokenRows.from_rows(rows), [params] * len(rows))
        prompts = [{"prompt_token_ids": row.tolist()} for row in rows]
        outputs: list[Any] = self._llm.generate(prompts, params, use_tqdm=False, lora_request=self._adapter)
        return outputs

    def close(self) -> None:
        if self._student is not None:
            self._student.close()
            return
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()


_engine: _Engine | None = None


def one_line_errors(function: Callable[P, R]) -> Callable[P, R]:
    """vLLM's errors as one line: their classes need not exist on the other side."""

    @wraps(function)
    def asked(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (UserError, RunError):
            raise
        except Exception as error:
            lines = str(error).strip().splitlines()
            raise RunError(f"vLLM ended with {type(error).__name__}: {lines[0] if lines else 'no message'}") from None

    return asked


def prepare(log: str) -> None:
    """First of all: what vLLM says goes to a file; stdout is for results."""
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)


@one_line_errors
def start(base: EngineBase) -> int:
    """Start an engine; returns this process' id."""
    global _engine
    assert _engine is None, "stop the engine before"
    _engine = _Engine(base)
    return os.getpid()


@one_line_errors
def stop() -> None:
    """Free the engine; another one may follow."""
    global _engine
    if _engine is not None:
        _engine.close()
        _engine = None


@one_line_errors
def select(over: StudentWeights | Path | None) -> str | None:
    """See `_Engine.select`."""
    assert _engine is not None
    return _engine.select(over)


@one_line_errors
def likelihoods(rows: Sequence[np.ndarray], starts: Sequence[int]) -> list[tuple[np.ndarray, bool]]:
    """(log-probs [N] float32 of the tokens from `start` on, whether each is the most likely one) of every row."""
    from vllm import SamplingParams

    assert _engine is not None
    params = SamplingParams(prompt_logprobs=0, max_tokens=1, temperature=0.0, flat_logprobs=True, detokenize=False)
    found = []
    for output, first in zip(_engine.generate(rows, params), starts, strict=True):
        flat = output.prompt_logprobs  # entry 0 of a position is the actual token
        entries = flat.start_indices[first:]
        logprobs = np.array([flat.logprobs[entry] for entry in entries], np.float32)
        found.append((logprobs, all(flat.ranks[entry] == 1 for entry in entries)))
    return found


@one_line_errors
def answers(rows: Sequence[np.ndarray], max_new_tokens: int, stop: Sequence[str]) -> list[list[int]]:
    """Greedy completions with the token or text that ended them."""
    from vllm import SamplingParams

    assert _engine is not None
    params = SamplingParams(
        temperature=0.0,
        max_tokens=max_new_tokens,
        stop_token_ids=_engine._eos_ids,
        stop=list(stop) or None,
        include_stop_str_in_output=True,
        detokenize=bool(stop),
    )
    return [list(output.outputs[0].token_ids) for output in _engine.generate(rows, params)]
