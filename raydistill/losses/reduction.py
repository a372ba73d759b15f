"""Which rows a loss sees, and the one normalisation: the sum over an optimizer step's completion tokens / their count.

Order: `count_completion_tokens` on every rank before the first backward, summed over ranks and micro-batches by the
trainer; then per micro-batch select rows -> per-token losses -> `micro_batch_loss`, which is backpropagated.
"""

# Shape letters: B sequences, T tokens (prompt, completion, padding), N completion tokens (flattened), V vocabulary,
# H hidden size.
from __future__ import annotations

import torch
from torch import Tensor


def count_completion_tokens(completion_lengths_B: Tensor) -> int:
    """Number of tokens that get a loss in these sequences (the sampled EOS included, padding not)."""
    return int(completion_lengths_B.sum())


def loss_scale(global_count: int, world_size: int = 1, accumulation_steps: int = 1) -> float:
    """The factor for a micro-batch's summed token losses: world_size * accumulation_steps / global_count.

    global_count: completion tokens of the whole optimizer step, all ranks and all micro-batches.
    world_size: data-parallel ranks over which the framework *averages* gradients (1 if it sums).
    accumulation_steps: by how much the framework's backward divides each loss (DeepSpeed divides by its
    gradient_accumulation_steps; plain torch by nothing: 1).
    The framework's divisions cancel these two factors, and the gradient becomes that of
    (sum of all token losses) / global_count, however the tokens were split. A mean of means would weight tokens of
    short batches more.

    Property tested: 1 rank x 4 micro-batches and 2 ranks x 2 of unequal token counts give one gradient and one update.
    """
    if global_count <= 0:
        raise ValueError(f"global_count={global_count}: an optimizer step needs at least one completion token")
    return world_size * accumulation_steps / global_count


def micro_batch_loss(token_losses_N: Tensor, scale: float) -> Tensor:
    """The scalar to backpropagate: scale * sum of the token losses, `scale` from `loss_scale`. [N] -> [].

    With N = 0 it is 0 and still connected to the graph, so a rank without tokens takes part in the collective backward.
    """
    return token_losses_N.sum() * scale


def select_completion_logits(logits_BTV: Tensor, prompt_lengths_B: Tensor, completion_lengths_B: Tensor) -> Tensor:
    """The logits that predict each completion token: [B, T, V] -> [N, V], sequence after sequence.

    Token t is predicted by position t - 1, so a completion of c tokens after a prompt of p uses positions p - 1 to
    p + c - 2. Batches are right-padded. Rows are selected before any loss is computed: masking a loss afterwards leaks
    the NaN of a padded row into the gradient (0 * NaN). Gradient reaches the selected rows only.

    Property tested: hand-made logits that name their position return the positions written above.
    """
    return logits_BTV[_predicting_positions(logits_BTV.shape[1], prompt_lengths_B, completion_lengths_B)]


def select_completion_hidden(hidden_BTH: Tensor, prompt_lengths_B: Tensor, completion_lengths_B: Tensor) -> Tensor:
    """The hidden states whose lm_head outputs are `select_completion_logits`: [B, T, H] -> [N, H].

    Applying lm_head to these spares the logits of prompts and padding, usually the largest tensor of a step.

    Property tested: lm_head of these equals `select_completion_logits` of lm_head.
    """
    return hidden_BTH[_predicting_positions(hidden_BTH.shape[1], prompt_lengths_B, completion_lengths_B)]


def select_completion_ids(ids_BT: Tensor, prompt_lengths_B: Tensor, completion_lengths_B: Tensor) -> Tensor:
    """The completion tokens themselves, in the order of `select_completion_logits`: [B, T] -> [N].

    Property tested: a model that predicts perfectly has its highest selected logit at each of them.
    """
    sequence_N, position_N = _predicting_positions(ids_BT.shape[1], prompt_lengths_B, completion_lengths_B)
    return ids_BT[sequence_N, position_N + 1]


def _predicting_positions(
    num_tokens: int, prompt_lengths_B: Tensor, completion_lengths_B: Tensor
) -> tuple[Tensor, Tensor]:
    """(sequence [N], position [N]) of the row that predicts each completion token."""
    if bool((prompt_lengths_B < 1).any()) or bool((completion_lengths_B < 0).any()):
        raise ValueError("every prompt needs at least 1 token (nothing predicts the first) and completions 0 or more")
    if bool((prompt_lengths_B + completion_lengths_B > num_tokens).any()):
        longest = int((prompt_lengths_B + completion_lengths_B).max())
        raise ValueError(f"a prompt and its completion have {longest} tokens but the batch is {num_tokens} wide")
    num_sequences = completion_lengths_B.shape[0]
    sequence_N = torch.arange(num_sequences, device=completion_lengths_B.device)
    sequence_N = sequence_N.repeat_interleave(completion_lengths_B)
    first_row_B = completion_lengths_B.cumsum(0) - completion_lengths_B
    offset_N = torch.arange(sequence_N.shape[0], device=sequence_N.device) - first_row_B[sequence_N]
    return sequence_N, prompt_lengths_B[sequence_N] - 1 + offset_N
