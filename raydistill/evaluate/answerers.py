"""A model under measurement, whatever computes it: how likely it finds given continuations, and its greedy answers.

`HfAnswerer` is a transformers model in this process; `vllm_answerer.py` is a vLLM engine in a process of its own. Measures
take either, so that one definition holds for both. Token ids go in and come out.
"""

# Shape letters: N continuation tokens of one sequence (of a batch: flattened), H hidden, V vocabulary.
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from raydistill.data.collate import micro_batches
from raydistill.data.encode import num_known_ids
from raydistill.evaluate.generate import greedy_completions
from raydistill.losses.logsumexp import rows_per_chunk, selected_logprobs
from raydistill.messages import TokenRows
from raydistill.tensors import CompletionModel, SequenceBatch

BATCH_TOKENS = 4096
"""Tokens (padding counted) of one forward pass; small models on a CPU get slower beyond it, as caches overflow."""

Ids = Sequence[int] | np.ndarray
Pair = tuple[Ids, Ids]
"""(context, continuation); neither is empty."""
OnDone = Callable[[int], None]
"""Told how many sequences of a call are done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Likelihood:
    """What a model thinks of one given continuation."""

    logprobs_N: np.ndarray  # float32, nats, of each of its tokens given everything before, over the whole vocabulary
    is_greedy: bool  # each of its tokens is the most likely one

    @property
    def total(self) -> float:
        """Log-probability of the whole continuation, summed in float64."""
        return float(self.logprobs_N.sum(dtype=np.float64))


class Answerer(Protocol):
    """What a measure needs from a model."""

    max_tokens: int  # of one sequence, continuation or answer included

    def likelihoods(self, pairs: Sequence[Pair], on_done: OnDone | None = None) -> list[Likelihood]:
        """In the order of the pairs."""

    def answers(
        self, prompts: Sequence[Ids], max_new_tokens: int, stop: Sequence[str] = (), on_done: OnDone | None = None
    ) -> list[list[int]]:
        """The most likely next tokens up to and including an end token, or until the text holds one of `stop`. Ids that
        the tokenizer does not know are never sampled."""


class HfAnswerer:
    """A transformers model in this process."""

    def __init__(self, model: Any, tokenizer: Any, stop_ids: Sequence[int], max_tokens: int) -> None:
        self._model, self._tokenizer, self._stop_ids = model, tokenizer, stop_ids
        self.max_tokens = max_tokens

    @torch.inference_mode()
    def likelihoods(self, pairs: Sequence[Pair], on_done: OnDone | None = None) -> list[Likelihood]:
        """See `Answerer`. Logits exist for continuation tokens only, a few rows at a time."""
        found: list[Likelihood | None] = [None] * len(pairs)
        done = 0
        for places in micro_batches([len(context) + len(rest) for context, rest in pairs], BATCH_TOKENS):
            continuations = TokenRows.from_rows([pairs[place][1] for place in places])
            contexts = TokenRows.from_rows([pairs[place][0] for place in places])
            logprobs_N, is_top_N = self._compare(contexts, continuations)
            ends = np.cumsum(continuations.lengths_B)[:-1]
            parts = zip(np.split(logprobs_N, ends), np.split(is_top_N, ends), strict=True)
            for place, (logprobs, is_top) in zip(places, parts, strict=True):
                found[place] = Likelihood(logprobs_N=logprobs, is_greedy=bool(is_top.all()))
            done += len(places)
            if on_done is not None:
                on_done(done)
        return [one for one in found if one is not None]

    def _compare(self, contexts: TokenRows, continuations: TokenRows) -> tuple[np.ndarray, np.ndarray]:
        """(log-prob of each continuation token, whether it is the most likely one), both [N]."""
        student = CompletionModel(self._model)
        hidden_NH = student.hidden(SequenceBatch.of(contexts, continuations, self._model.device))
        ids_N = torch.from_numpy(continuations.ids_T.copy()).long().to(hidden_NH.device)
        step = rows_per_chunk(self._model.get_output_embeddings().weight.shape[0])
        logprobs, tops = [], []
        for start in range(0, ids_N.numel(), step):
            logits_NV = student.logits(hidden_NH[start : start + step])
            ids = ids_N[start : start + step].to(logits_NV.device)
            logprobs.append(selected_logprobs(logits_NV, ids[:, None])[:, 0].cpu())
            tops.append((logits_NV.argmax(-1) == ids).cpu())
        return torch.cat(logprobs).numpy(), torch.cat(tops).numpy()

    def answers(
        self, prompts: Sequence[Ids], max_new_tokens: int, stop: Sequence[str] = (), on_done: OnDone | None = None
    ) -> list[list[int]]:
        """See `Answerer`."""
        return greedy_completions(
            self._model,
            [np.asarray(prompt, np.int32) for prompt in prompts],
            self._stop_ids,
            max_new_tokens,
            num_ids=num_known_ids(self._tokenizer),
            stop=stop,
            tokenizer=self._tokenizer,
            on_batch=on_done,
        )
