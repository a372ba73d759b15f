"""vLLM as the sampling engine: in-process, one failure domain, weights rebuilt or adapters swapped in place.

Imported inside rollout actors only: vLLM changes process-wide state (threads, seeds). Under tensor parallelism the
engine's ranks are processes of their own, below this one; they share its fate in both directions.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np

from raydistill.actors.engine import Completion, SamplingSettings
from raydistill.actors.vllm_settings import engine_options, lora_options
from raydistill.config import RolloutSection
from raydistill.imports import UNUSED_BY_VLLM, without
from raydistill.messages import FinishReason, StudentWeights, TokenRows
from raydistill.models import DTYPES, StudentSpec

log = logging.getLogger(__name__)
DEATH_SHOWS_S = 5.0  # an error that a rank's death causes may arrive before the death itself is seen


def load_vllm() -> Any:
    """The class `vllm.LLM`, whose import takes longer than an engine to build.

    vLLM collects garbage five times while it starts; what is there before is set aside from that.
    """
    try:
        with without(*UNUSED_BY_VLLM):
            from vllm import LLM
    except ImportError:  # what another build of vLLM brings along may need them
        from vllm import LLM
    gc.freeze()
    return LLM


class VllmEngine:
    """One vLLM engine that holds the quantized student."""

    name = "vllm.LLM"

    def __init__(
        self,
        spec: StudentSpec,
        section: RolloutSection,
        max_model_len: int,
        eos_ids: Sequence[int],
        sampled_ids: int | None = None,
        num_adapters: int = 1,
    ) -> None:
        """num_adapters: served adapters, one for each run, that are held at once."""
        self._spec = spec
        self._eos_ids = list(eos_ids)
        self._run: str | None = None  # whose weights are computed
        self._num_adapters = num_adapters
        self._adapters: OrderedDict[str, int] = OrderedDict()  # served: run -> id, the least recently used first
        self._last_id = 0
        options = engine_options(section.num_gpus, section.gpu_memory_utilization, sampled_ids)
        if spec.adapter.mode == "served":
            options |= lora_options(spec.adapter.rank, spec.adapter.targets, num_adapters)
            options["lora_dtype"] = DTYPES[spec.student.dtype]
        if section.tensor_parallel_size > 1:
            # Left alone, vLLM would book actors of its own where this one runs in a placement group.
            options["distributed_executor_backend"] = "mp"
            options["tensor_parallel_size"] = section.tensor_parallel_size
        before = set(multiprocessing.active_children())
        self._llm = load_vllm()(
            model=spec.model,
            dtype=spec.student.dtype,
            max_model_len=max_model_len,
            trust_remote_code=spec.student.trust_remote_code,
            worker_extension_cls="raydistill.actors.vllm_worker.StudentWorkerExtension",
            **options,
        )
        self._ranks = [child for child in multiprocessing.active_children() if child not in before]
        self._is_closing = threading.Event()
        if self._ranks:
            threading.Thread(target=_die_with, args=(self._ranks, self._is_closing), daemon=True).start()
        with self._shared_fate():
            self.weights_kept: list[int] = self._llm.collective_rpc("hold_student", args=(spec,))  # by rank

    def load(self, run: str, weights: StudentWeights, want_codes: bool) -> tuple[str, str | None]:
        """See `Engine.load`. No request is in flight: the actor's calls run one after another."""
        adapter_id, dropped_id = self._place_for(run) if self._spec.adapter.mode == "served" else (None, None)
        self._run = None
        arguments = (weights.tensors, want_codes, adapter_id, dropped_id)
        with self._shared_fate():
            answers = self._llm.collective_rpc("load_student", args=arguments)
            self._llm.reset_prefix_cache()
        if len({weights_hash for weights_hash, _ in answers}) != 1:
            raise RuntimeError(f"the engine's ranks hold different weights: {answers}")
        self._run = run
        if adapter_id is not None:
            self._adapters[run] = adapter_id
        first: tuple[str, str | None] = answers[0]
        return first

    def _place_for(self, run: str) -> tuple[int, int | None]:
        """(a fresh id, the id whose place it takes). No id is used twice: no cache can serve an old version (vLLM #47724)."""
        dropped = self._adapters.pop(run, None)
        if dropped is None and len(self._adapters) == self._num_adapters:
            _, dropped = self._adapters.popitem(last=False)
        self._last_id += 1
        return self._last_id, dropped

    def select(self, run: str) -> bool:
        """See `Engine.select`."""
        if run in self._adapters:
            self._adapters.move_to_end(run)
            self._run = run
        return self._run == run

    def drop(self, run: str) -> None:
        """See `Engine.drop`. An adapter stays until another takes its place."""
        if run in self._adapters:
            self._adapters.move_to_end(run, last=False)
        if self._run == run:
            self._run = None

    def sample(self, prompts: TokenRows, settings: SamplingSettings, seeds: Sequence[int]) -> list[Completion]:
        """See `Engine.sample`."""
        from vllm import SamplingParams

        params = [
            SamplingParams(
                temperature=settings.temperature,
                top_p=settings.top_p,
                min_tokens=settings.min_new_tokens,
                max_tokens=settings.max_new_tokens,
                stop_token_ids=self._eos_ids,
                seed=seed if settings.temperature > 0 else None,
                detokenize=False,
            )
            for seed in seeds
        ]
        outputs = self.generate(prompts, params)
        return [
            Completion(ids=out.outputs[0].token_ids, finish_reason=_finish(out.outputs[0].finish_reason))
            for out in outputs
        ]

    def score(self, rows: TokenRows) -> np.ndarray:
        """See `Engine.score`: prompt log-probs of the actual tokens; entry 0 of each position is the actual token."""
        from vllm import SamplingParams

        params = SamplingParams(prompt_logprobs=0, max_tokens=1, temperature=0.0, flat_logprobs=True, detokenize=False)
        outputs = self.generate(rows, [params] * len(rows))
        parts = []
        for output in outputs:
            flat = output.prompt_logprobs
            parts.append([flat.logprobs[start] for start in flat.start_indices[1:]])
        return np.concatenate([np.asarray(p, np.float32) for p in parts])

    def generate(self, rows: TokenRows, params: list[Any]) -> list[Any]:
        """vLLM's own outputs for each row with its own sampling parameters, by the version that is held."""
        from vllm.lora.request import LoRARequest

        lora = None
        if self._spec.adapter.mode == "served":
            assert self._run is not None, "load a version before sampling"
            number = self._adapters[self._run]
            lora = LoRARequest(lora_name=f"adapter-{number}", lora_int_id=number, lora_path="held-in-memory")
        prompts = [{"prompt_token_ids": row.tolist()} for row in rows.rows()]
        with self._shared_fate():
            outputs: list[Any] = self._llm.generate(prompts, params, use_tqdm=False, lora_request=lora)
        return outputs

    @contextmanager
    def _shared_fate(self) -> Iterator[None]:
        """An error that comes of a rank's death is none to report: this process ends, and a pool replaces a dead actor."""
        try:
            yield
        except Exception:
            if wait([rank.sentinel for rank in self._ranks], DEATH_SHOWS_S) if self._ranks else False:
                threading.Event().wait()  # until `_die_with` has its turn
            raise

    def close(self) -> None:
        """Free the engine; another one may follow in the same process."""
        import gc

        self._is_closing.set()
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()


def _die_with(ranks: Sequence[BaseProcess], is_closing: threading.Event) -> None:
    """End this process and the other ranks as soon as one has ended: they would wait for it, some of them for ever."""
    wait([rank.sentinel for rank in ranks])
    if not is_closing.is_set():
        log.error("a rank of the tensor parallel engine died; the rollout actor ends with it")
        for rank in ranks:
            rank.kill()
        os._exit(1)


def _finish(reason: str | None) -> FinishReason:
    return "stop" if reason == "stop" else "length"
