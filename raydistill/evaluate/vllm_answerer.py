"""vLLM as an `Answerer`: an engine in a process of its own serves everything that lies over one base, one start for all.

Adapters in PEFT folders are swapped by vLLM; a run's checkpoints are loaded as in the run itself, adapter rebuilt into the
quantized weights or swapped.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from raydistill.actors.vllm_folders import engine_dtype, manifest_of, runnable_folder, takes_int4
from raydistill.actors.vllm_settings import CPU_ENGINE_ENVIRONMENT, ENGINE_ENVIRONMENT
from raydistill.data.encode import num_known_ids
from raydistill.errors import ModelError, RunError
from raydistill.evaluate import vllm_process
from raydistill.evaluate.answerers import Ids, Likelihood, OnDone, Pair
from raydistill.evaluate.loading import adapter_layers, adapter_settings, check_codes, check_lora, spec_of
from raydistill.evaluate.targets import Target
from raydistill.evaluate.vllm_process import EngineBase
from raydistill.evaluate.vocabulary import positions_of
from raydistill.models import eos_ids
from raydistill.quant.formats import ADAPTER_FOLDER
from raydistill.recovery.checkpoint import load_checkpoint

SEQUENCES = 256  # of one call: what the progress bar moves by
HEAD = "lm_head"
LOG_LINES = 12  # of a process that died


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineGroup:
    """Targets that one engine start serves, in their order."""

    base: EngineBase
    targets: tuple[Target, ...]
    adapters: Mapping[str, Path | None]  # by target name; nothing for checkpoints


def engine_groups(targets: Sequence[Target], tokenizer: Any, longest: int) -> list[EngineGroup]:
    """Targets by what lies under them. Plain weights are written beside exports that vLLM cannot run as they are.

    longest: tokens of the longest sequence; where a model has fewer positions, its engine has as many.
    """
    together: dict[object, list[tuple[Target, Path, Path | None]]] = {}
    for target in targets:
        folder, adapter = (target.folder, None) if target.checkpoint else _parts(target)
        key = (target.run, "checkpoints") if target.checkpoint else folder.resolve()
        together.setdefault(key, []).append((target, folder, adapter))
    return [_group(members, tokenizer, longest) for members in together.values()]


def _parts(target: Target) -> tuple[Path, Path | None]:
    """(folder of the base as vLLM runs it, PEFT folder over it)."""
    folder = runnable_folder(target.folder, takes_int4())
    if target.adapter is not None:
        check_lora(target)
        return folder, target.adapter
    is_beside = (manifest_of(folder) or {}).get("lora") is not None
    return folder, folder / ADAPTER_FOLDER if is_beside else None


def _group(members: Sequence[tuple[Target, Path, Path | None]], tokenizer: Any, longest: int) -> EngineGroup:
    first, folder, _ = members[0]
    adapters = {target.name: adapter for target, _, adapter in members}
    folders = [adapter for adapter in adapters.values() if adapter is not None]
    layers = {layer for adapter in folders for layer in adapter_layers(adapter)}
    if HEAD in layers:
        raise ModelError(f"an adapter over {folder} changes {HEAD}, which vLLM cannot score with; use --engine hf")
    spec = spec_of(first) if first.checkpoint else None
    known = num_known_ids(tokenizer)
    vocab_size = AutoConfig.from_pretrained(folder).get_text_config().vocab_size
    base = EngineBase(
        model=str(folder),
        tokenizer=str(tokenizer.name_or_path),
        dtype=spec.student.dtype if spec else engine_dtype(folder, is_cpu=not torch.cuda.is_available()),
        max_tokens=min(longest, positions_of(folder) - 1),  # scoring a sequence takes the place of one more token
        eos_ids=eos_ids(first.folder, tokenizer),
        sampled_ids=known if known < vocab_size else None,
        num_gpus=1 if torch.cuda.is_available() else 0,
        student=spec,
        lora_rank=max((int(adapter_settings(adapter)["r"]) for adapter in folders), default=0),
        lora_layers=tuple(sorted(layers)),
    )
    return EngineGroup(base=base, targets=tuple(target for target, _, _ in members), adapters=adapters)


class VllmAnswerer:
    """An engine on one base in a process of its own; `select` before the first question."""

    def __init__(self, process: VllmProcess, group: EngineGroup) -> None:
        self._process, self._group = process, group
        self.max_tokens = group.base.max_tokens

    def select(self, target: Target) -> None:
        """Answer as this target from now on."""
        over = load_checkpoint(target.checkpoint) if target.checkpoint else self._group.adapters[target.name]
        codes_hash = self._process.ask(vllm_process.select, over)
        if target.checkpoint:
            check_codes(target, codes_hash)

    def likelihoods(self, pairs: Sequence[Pair], on_done: OnDone | None = None) -> list[Likelihood]:
        """See `Answerer`."""
        found: list[Likelihood] = []
        for part in _parts_of(pairs):
            rows = [np.concatenate([np.asarray(ids, np.int32) for ids in pair]) for pair in part]
            scored = self._process.ask(vllm_process.likelihoods, rows, [len(context) for context, _ in part])
            found += [Likelihood(logprobs_N=logprobs_N, is_greedy=is_greedy) for logprobs_N, is_greedy in scored]
            if on_done is not None:
                on_done(len(found))
        return found

    def answers(
        self, prompts: Sequence[Ids], max_new_tokens: int, stop: Sequence[str] = (), on_done: OnDone | None = None
    ) -> list[list[int]]:
        """See `Answerer`."""
        found: list[list[int]] = []
        for part in _parts_of(prompts):
            rows = [np.asarray(prompt, np.int32) for prompt in part]
            found += self._process.ask(vllm_process.answers, rows, max_new_tokens, list(stop))
            if on_done is not None:
                on_done(len(found))
        return found


class VllmProcess:
    """A process for one engine after another: vLLM is imported once."""

    def __init__(self, log: Path) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._log = log  # for what vLLM says
        self.num_starts = 0  # of engines

    @contextmanager
    def engine(self, group: EngineGroup) -> Iterator[VllmAnswerer]:
        """An engine that is stopped after the body."""
        if self._pool is None:
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(1, spawn, vllm_process.prepare, (str(self._log),))
        with _environment(_engine_environment()):  # the process starts with the first question
            self.ask(vllm_process.start, group.base)
        self.num_starts += 1
        yield VllmAnswerer(self, group)
        self.ask(vllm_process.stop)  # after an error `close` ends the process

    def ask(self, question: Callable[..., Any], *arguments: Any) -> Any:
        """Let the process answer; RunError with its last lines where it died."""
        assert self._pool is not None
        try:
            return self._pool.submit(question, *arguments).result()
        except BrokenProcessPool as error:
            lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
            words = ["the process of the vLLM engine died; use --engine hf, or shorter sequences. Its last lines:"]
            raise RunError("\n".join(words + lines[-LOG_LINES:])) from error

    def close(self) -> None:
        """End the process."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


@contextmanager
def engine_process() -> Iterator[VllmProcess]:
    """A process that ends with the body."""
    with tempfile.NamedTemporaryFile(prefix="raydistill-vllm-", suffix=".log") as log:
        process = VllmProcess(Path(log.name))
        try:
            yield process
        finally:
            process.close()


def _parts_of(sequences: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(sequences), SEQUENCES):
        yield sequences[start : start + SEQUENCES]


def _engine_environment() -> dict[str, str]:
    environment = {**ENGINE_ENVIRONMENT, "HF_HUB_OFFLINE": "1"}
    if not torch.cuda.is_available():
        environment |= CPU_ENGINE_ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    return environment


@contextmanager
def _environment(wanted: Mapping[str, str]) -> Iterator[None]:
    """Variables for processes that start within; what the caller's environment sets stays as it is."""
    new = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            del os.environ[name]
