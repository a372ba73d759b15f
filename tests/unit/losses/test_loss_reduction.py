"""Which rows are selected, and that the gradient does not depend on how tokens are split."""

import pytest
import torch
from torch import Tensor

from raydistill.losses.objective import Objective
from raydistill.losses.reduction import (
    count_completion_tokens,
    loss_scale,
    micro_batch_loss,
    select_completion_hidden,
    select_completion_ids,
    select_completion_logits,
)


def test_each_completion_token_is_predicted_by_the_row_before_it() -> None:
    # Sequence 0: prompt of 2, completion of 3. Sequence 1: prompt of 4, completion of 1. The rest is padding.
    positions = torch.arange(6).float()
    logits = torch.stack([positions, 100 + positions])[:, :, None].expand(2, 6, 3)
    prompts, completions = torch.tensor([2, 4]), torch.tensor([3, 1])
    assert select_completion_logits(logits, prompts, completions)[:, 0].tolist() == [1, 2, 3, 103]
    ids = torch.stack([torch.arange(6), 100 + torch.arange(6)])
    assert select_completion_ids(ids, prompts, completions).tolist() == [2, 3, 4, 104]


def test_a_model_that_predicts_perfectly_has_no_loss() -> None:
    ids = torch.randint(0, 5, (3, 8), generator=torch.Generator().manual_seed(0))
    next_ids = torch.cat([ids[:, 1:], ids[:, :1]], 1)
    logits = torch.nn.functional.one_hot(next_ids, 5).float() * 50
    prompts, completions = torch.tensor([1, 3, 5]), torch.tensor([7, 2, 0])
    selected = select_completion_logits(logits, prompts, completions)
    assert torch.equal(selected.argmax(-1), select_completion_ids(ids, prompts, completions))


def test_lm_head_on_selected_hidden_states_equals_selected_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(2, 5, 4, generator=generator), torch.randn(7, 4, generator=generator)
    prompts, completions = torch.tensor([1, 2]), torch.tensor([4, 2])
    selected = select_completion_hidden(hidden, prompts, completions) @ head.T
    assert torch.allclose(selected, select_completion_logits(hidden @ head.T, prompts, completions), atol=1e-6)


def test_nan_in_unselected_rows_never_reaches_the_gradient() -> None:
    logits = torch.zeros(1, 4, 3)
    logits[0, 3] = float("nan")
    logits[0, 0] = float("nan")
    logits.requires_grad_()
    selected = select_completion_logits(logits, torch.tensor([2]), torch.tensor([2]))
    (-selected.log_softmax(-1)[:, 0].sum()).backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.parametrize(("prompt", "completion"), [(0, 2), (3, 2), (1, -1)])
def test_lengths_that_do_not_fit_are_refused(prompt: int, completion: int) -> None:
    with pytest.raises(ValueError):
        select_completion_logits(torch.zeros(1, 4, 3), torch.tensor([prompt]), torch.tensor([completion]))


def test_an_optimizer_step_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one completion token"):
        loss_scale(0)


def test_a_micro_batch_without_tokens_gives_a_connected_zero() -> None:
    losses = torch.zeros(0, requires_grad=True)
    value = micro_batch_loss(losses, 0.5)
    value.backward()
    assert value.item() == 0 and losses.grad is not None


class Dense:
    def __init__(self, logprobs_NV: Tensor) -> None:
        self.logprobs_NV = logprobs_NV


LENGTHS = [(1, 7), (4, 2), (2, 1), (3, 5)]
"""(prompt, completion) of the four micro-batches, one sequence each: 15 completion tokens, unequal on purpose."""
SETTINGS = [(1, 4), (2, 2), (4, 1)]
LEARNING_RATE = 0.5


def micro_batch_gradient(weight: Tensor, index: int, scale: float) -> Tensor:
    """Gradient of a bigram model (weight [V, V]) on one sequence."""
    generator = torch.Generator().manual_seed(index)
    prompt, completion = LENGTHS[index]
    ids = torch.randint(0, 6, (1, 8), generator=generator)
    lengths = torch.tensor([prompt]), torch.tensor([completion])
    teacher = Dense(torch.randn(completion, 6, generator=generator).mul(2).log_softmax(-1))
    model = weight.clone().requires_grad_()
    logits = select_completion_logits(model[ids], *lengths)
    objective = Objective(beta=0.5, ce_weight=0.3)
    is_reference = torch.full((completion,), index % 2 == 0)
    result = objective.token_losses(logits, teacher, select_completion_ids(ids, *lengths), is_reference)
    micro_batch_loss(result.loss_N, scale).backward()
    assert model.grad is not None
    return model.grad


def simulated_step(weight: Tensor, world_size: int, accumulation_steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient, clipped gradient, updated weight) under a framework that divides as DeepSpeed does."""
    global_count = count_completion_tokens(torch.tensor([completion for _, completion in LENGTHS]))
    scale = loss_scale(global_count, world_size, accumulation_steps)
    ranks = []
    for rank in range(world_size):
        indices = range(rank * accumulation_steps, (rank + 1) * accumulation_steps)
        gradients = [micro_batch_gradient(weight, i, scale) / accumulation_steps for i in indices]
        ranks.append(torch.stack(gradients).sum(0))
    parameter = torch.nn.Parameter(weight.clone())
    gradient = torch.stack(ranks).mean(0)
    parameter.grad = gradient.clone()
    norm = torch.nn.utils.clip_grad_norm_([parameter], max_norm=0.05)
    assert norm > 0.05, "the clip must bite for the comparison to mean anything"
    clipped = parameter.grad.clone()
    torch.optim.SGD([parameter], lr=LEARNING_RATE).step()
    return gradient, clipped, parameter.detach()


@pytest.mark.parametrize(("world_size", "accumulation_steps"), SETTINGS)
def test_gradient_clipped_gradient_and_update_do_not_depend_on_the_split(
    world_size: int, accumulation_steps: int
) -> None:
    weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(9))
    # The definition: (sum of all token losses) / 15, summed here without any framework.
    plain = torch.stack([micro_batch_gradient(weight, i, 1.0) for i in range(4)]).sum(0) / 15
    gradient, clipped, updated = simulated_step(weight, world_size, accumulation_steps)
    plain_clipped = plain * min(1.0, 0.05 / (plain.norm().item() + 1e-6))
    assert torch.allclose(gradient, plain, rtol=0, atol=1e-6)
    assert torch.allclose(clipped, plain_clipped, rtol=0, atol=1e-6)
    assert torch.allclose(updated, weight - LEARNING_RATE * plain_clipped, rtol=0, atol=1e-6)


def test_a_mean_of_means_would_give_another_gradient() -> None:
    weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(9))
    plain = torch.stack([micro_batch_gradient(weight, i, 1.0) for i in range(4)]).sum(0) / 15
    of_means = torch.stack([micro_batch_gradient(weight, i, 1.0 / n) for i, (_, n) in enumerate(LENGTHS)]).mean(0)
    assert (plain - of_means).abs().max() > 1e-2
