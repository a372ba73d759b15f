"""From messages to tensors: the forward pass that every actor shares, and the teacher's answers on a device.

Logits exist at completion positions only: the decoder runs on whole sequences, the head on the N positions that predict
a completion token. Shape letters: B sequences, T tokens, N completion tokens, H hidden, V vocabulary, K candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raydistill.data.collate import pad_rows
from raydistill.errors import ModelError
from raydistill.losses.reduction import select_completion_hidden
from raydistill.messages import Samples, TeacherDense, TeacherTarget, TokenRows


@dataclass(frozen=True, slots=True, kw_only=True)
class TopKTensors:
    """`TeacherTopK` on a device."""

    ids_NK: Tensor  # int64
    logprobs_NK: Tensor  # float32
    tail_logprob_N: Tensor  # float32


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseTensors:
    """`TeacherDense` on a device."""

    logprobs_NV: Tensor  # float32


def target_tensors(target: TeacherTarget, device: str | torch.device) -> TopKTensors | DenseTensors:
    """The message as tensors; the copy is needed because shared memory is read-only."""
    if isinstance(target, TeacherDense):
        return DenseTensors(logprobs_NV=_tensor(target.logprobs_NV, device))
    return TopKTensors(
        ids_NK=_tensor(target.ids_NK, device).long(),
        logprobs_NK=_tensor(target.logprobs_NK, device),
        tail_logprob_N=_tensor(target.tail_logprob_N, device),
    )


def _tensor(array: np.ndarray, device: str | torch.device) -> Tensor:
    return torch.from_numpy(array.copy()).to(device)


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceBatch:
    """Prompts and completions as one right-padded batch."""

    ids_BT: Tensor  # int64
    mask_BT: Tensor  # int64, 1 on real tokens
    prompt_lengths_B: Tensor  # int64
    completion_lengths_B: Tensor  # int64

    @classmethod
    def of(cls, prompts: TokenRows, completions: TokenRows, device: str | torch.device) -> SequenceBatch:
        """Pad on the right; a decoder never looks right, so the padding value does not matter."""
        rows = [np.concatenate(pair) for pair in zip(prompts.rows(), completions.rows(), strict=True)]
        ids, mask = pad_rows(rows, 0, side="right")
        return cls(
            ids_BT=torch.from_numpy(ids).long().to(device),
            mask_BT=torch.from_numpy(mask).long().to(device),
            prompt_lengths_B=torch.from_numpy(prompts.lengths_B.copy()).long().to(device),
            completion_lengths_B=torch.from_numpy(completions.lengths_B.copy()).long().to(device),
        )

    @classmethod
    def of_samples(cls, samples: Samples, device: str | torch.device) -> SequenceBatch:
        return cls.of(samples.prompts, samples.completions, device)


class CompletionModel(nn.Module):
    """A causal language model whose forward returns logits [N, V] (or hidden states [N, H]) at completion positions.

    A model may be spread over devices (accelerate's hooks move what goes in): each result lies where its last layer does.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def hidden(self, batch: SequenceBatch) -> Tensor:
        """[N, H]: the final hidden state at the position before each completion token."""
        output = self.model.get_decoder()(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, use_cache=False)
        hidden_BTH = output.last_hidden_state
        lengths = (batch.prompt_lengths_B.to(hidden_BTH.device), batch.completion_lengths_B.to(hidden_BTH.device))
        return select_completion_hidden(hidden_BTH, *lengths)

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """[N, H] -> [N, V], with the soft cap of models that have one (Gemma 2)."""
        logits_NV = self.model.get_output_embeddings()(hidden_NH)
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return torch.tanh(logits_NV / cap) * cap if cap else logits_NV

    def forward(self, batch: SequenceBatch) -> Tensor:
        """[N, V]."""
        return self.logits(self.hidden(batch))

    @torch.no_grad()
    def check_head(self, field: str, device: str | torch.device | None = None) -> None:
        """ModelError if decoder + head is not this architecture's whole forward (some scale their logits).

        device: where its input goes; needed for a model that is spread over devices.
        """
        device = next(self.model.parameters()).device if device is None else device
        ids = TokenRows.from_rows([[0, 1]]), TokenRows.from_rows([[1, 0]])
        batch = SequenceBatch.of(*ids, device)
        whole = self.model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT).logits[0, 1:3].float()
        ours = self(batch).float().to(whole.device)
        if not torch.allclose(whole, ours, rtol=1e-2, atol=1e-2 * float(whole.abs().max())):
            raise ModelError(
                f"{field}: {type(self.model).__name__} changes its logits after the head in a way raydistill does not "
                "know; choose an architecture whose logits are head(hidden)"
            )


@torch.no_grad()
def score_rows(model: CompletionModel, rows: TokenRows, device: str | torch.device) -> np.ndarray:
    """Log-probs [N] float32 of every token but the first of each row, given the ones before it."""
    firsts = TokenRows.from_rows([row[:1] for row in rows.rows()])
    rest = TokenRows.from_rows([row[1:] for row in rows.rows()])
    logits_NV = model(SequenceBatch.of(firsts, rest, device)).float()
    ids_N = torch.from_numpy(rest.ids_T.copy()).long().to(device)
    logprobs_N = torch.log_softmax(logits_NV, -1).gather(-1, ids_N[:, None])[:, 0]
    return logprobs_N.cpu().numpy().astype(np.float32)
