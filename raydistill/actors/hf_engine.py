"""transformers' generate as the second sampling engine: the reference in tests, and for students vLLM cannot serve.

The model is built by the very function the trainer uses, so a policy gap here can only come from arithmetic order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import (
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from raydistill.actors.engine import Completion, SamplingSettings
from raydistill.data.collate import pad_rows
from raydistill.messages import StudentWeights, TokenRows
from raydistill.models import StudentSpec, build_student, default_device
from raydistill.quant.hashing import hash_codes, hash_tensors
from raydistill.quant.student import adapter_state, load_adapter_state, student_codes
from raydistill.tensors import CompletionModel, score_rows


class SeededGumbel(LogitsProcessor):
    """Adds Gumbel noise from one generator per row, so that argmax samples the softmax (Gumbel-max trick).

    `generate`'s own sampling draws all rows from one stream: a completion would depend on its batch. Here it depends on
    its own seed only.
    """

    def __init__(self, seeds: Sequence[int], device: str) -> None:
        self._generators = [torch.Generator(device=device).manual_seed(int(seed)) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = torch.stack(
            [torch.rand(scores.shape[1], generator=g, device=scores.device) for g in self._generators]
        ).clamp_min(torch.finfo(torch.float32).tiny)
        return scores.float() - torch.log(-torch.log(noise))


class HfEngine:
    """One transformers student that samples with `generate`."""

    name = "transformers.generate"

    def __init__(self, spec: StudentSpec, eos_ids: Sequence[int], sampled_ids: int | None = None) -> None:
        self._device = default_device()
        self._model = build_student(spec, self._device).eval()
        self._completions = CompletionModel(self._model)
        self._eos_ids = list(eos_ids)
        self._sampled_ids = sampled_ids
        self._run: str | None = None  # whose weights are loaded
        # `generate` fills in what a call leaves open, a repetition penalty for example: not the policy that is trained.
        self._model.generation_config = GenerationConfig()

    def load(self, run: str, weights: StudentWeights, want_codes: bool) -> tuple[str, str | None]:
        """See `Engine.load`."""
        self._run = run
        state = {name: torch.from_numpy(array.copy()) for name, array in weights.tensors.items()}
        load_adapter_state(self._model, state)
        codes = student_codes(self._model) if want_codes else {}
        return hash_tensors(adapter_state(self._model)), hash_codes(codes) if codes else None

    def select(self, run: str) -> bool:
        """See `Engine.select`."""
        return self._run == run

    def drop(self, run: str) -> None:
        """See `Engine.drop`: the next load replaces its weights."""
        if self._run == run:
            self._run = None

    @torch.inference_mode()
    def sample(self, prompts: TokenRows, settings: SamplingSettings, seeds: Sequence[int]) -> list[Completion]:
        """See `Engine.sample`."""
        pad_id = self._eos_ids[0]
        ids, mask = pad_rows(prompts.rows(), pad_id, side="left")
        processors = LogitsProcessorList()
        if self._sampled_ids is not None:
            padding = list(range(self._sampled_ids, self._model.config.vocab_size))
            processors.append(SuppressTokensLogitsProcessor(padding, device=self._device))
        if settings.temperature > 0:
            if settings.temperature != 1.0:
                processors.append(TemperatureLogitsWarper(settings.temperature))
            if settings.top_p < 1.0:
                processors.append(TopPLogitsWarper(settings.top_p))
            processors.append(SeededGumbel(seeds, self._device))
        output = self._model.generate(
            input_ids=torch.from_numpy(ids).long().to(self._device),
            attention_mask=torch.from_numpy(mask).long().to(self._device),
            do_sample=False,
            num_beams=1,
            min_new_tokens=settings.min_new_tokens or None,
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=self._eos_ids,
            pad_token_id=pad_id,
            logits_processor=processors,
        )
        return [self._cut(row) for row in output[:, ids.shape[1] :].tolist()]

    def _cut(self, row: list[int]) -> Completion:
        for position, token in enumerate(row):
            if token in self._eos_ids:
                return Completion(ids=row[: position + 1], finish_reason="stop")
        return Completion(ids=row, finish_reason="length")

    @torch.inference_mode()
    def score(self, rows: TokenRows) -> np.ndarray:
        """See `Engine.score`."""
        return score_rows(self._completions, rows, self._device)

    def close(self) -> None:
        """See `Engine.close`."""
        del self._completions, self._model
