"""One optimizer step is one function of its tokens, however ranks and micro-batches split them."""

import copy
import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3Config

from raydistill.losses.divergence import generalized_jsd
from raydistill.losses.objective import Objective, TokenLosses
from raydistill.losses.targets import dense_classes
from raydistill.merge import merge_scored, take_scored
from raydistill.messages import REFERENCE_VERSION, Samples, Scored, TeacherDense, TeacherTopK, TokenRows, reduce_metrics
from raydistill.tensors import CompletionModel, SequenceBatch
from raydistill.trainer.step import Ranks, RankStep, run_step

VOCABULARY, K = 29, 5
VERSION = 6  # policy version before the step
LENGTHS = [1, 12, 3, 2, 9, 1, 7, 4]  # completion tokens of the step's eight sequences
LEARNING_RATE, MAX_NORM = 0.5, 0.1
OBJECTIVE = Objective(beta=0.3, ce_weight=0.5)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(5)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        dtype="float32",
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def step() -> Scored:
    """Eight sequences; every third is a reference, the others were sampled by versions 5 and 6."""
    generator = np.random.default_rng(0)
    logits = torch.from_numpy(generator.normal(size=(sum(LENGTHS), VOCABULARY)) * 2).float()
    top, ids = torch.log_softmax(logits, -1).topk(K)
    tail = torch.log1p(-top.exp().sum(-1))
    samples = Samples(
        step=VERSION,
        indices=tuple(range(8)),
        row_ids=tuple("abcdefgh"),
        prompts=TokenRows.from_rows([generator.integers(VOCABULARY, size=2 + i % 3) for i in range(8)]),
        completions=TokenRows.from_rows([generator.integers(VOCABULARY, size=n) for n in LENGTHS]),
        policy_versions=tuple(REFERENCE_VERSION if i % 3 == 0 else 5 + i % 2 for i in range(8)),
        finish_reasons=tuple("reference" if i % 3 == 0 else "stop" for i in range(8)),
    )
    target = TeacherTopK(ids_NK=ids.int().numpy(), logprobs_NK=top.numpy(), tail_logprob_N=tail.numpy())
    return Scored(samples=samples, target=target)


class SumOverThreads:
    """All-reduce (sum) over ranks that run as threads."""

    def __init__(self, world_size: int) -> None:
        self.slots: list[Tensor] = [torch.zeros(())] * world_size
        self.barrier = threading.Barrier(world_size, timeout=30)

    def of_rank(self, rank: int) -> Any:
        def total(vector: Tensor) -> Tensor:
            self.slots[rank] = vector
            self.barrier.wait()
            result = torch.stack(self.slots).sum(0)
            self.barrier.wait()
            return result

        return total


class PlainEngine:
    """Does by hand what DeepSpeed does: divides by the accumulation steps, averages over ranks, clips, SGD."""

    def __init__(self, model: nn.Module, micro_batches: int, world_size: int, sum_over_ranks: Any) -> None:
        self.model = CompletionModel(copy.deepcopy(model))
        self.micro_batches, self.world_size, self.sum_over_ranks = micro_batches, world_size, sum_over_ranks
        self.seen = 0
        self.clipped: Tensor | None = None

    def forward(self, batch: SequenceBatch) -> Tensor:
        logits: Tensor = self.model(batch)
        return logits

    def backward(self, loss: Tensor) -> None:
        (loss / self.micro_batches).backward()

    def step(self, bad: bool) -> tuple[bool, float]:
        self.seen += 1
        if self.seen < self.micro_batches:
            return True, 0.0
        parameters = list(self.model.parameters())
        own = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters])
        gradient = self.sum_over_ranks(own) / self.world_size
        norm = float(gradient.norm())
        if not math.isfinite(norm):
            return False, norm
        assert not bad, "a step that is dropped must be dropped by its gradient on every rank"
        self.clipped = gradient * min(1.0, MAX_NORM / max(norm, 1e-12))
        with torch.no_grad():
            pieces = torch.split(self.clipped, [p.numel() for p in parameters])
            for parameter, piece in zip(parameters, pieces, strict=True):
                parameter -= LEARNING_RATE * piece.view_as(parameter)
        return True, norm

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


def train(
    model: nn.Module, ranks: Sequence[Sequence[Scored]], objective: Objective = OBJECTIVE
) -> list[tuple[PlainEngine, RankStep]]:
    """One step on `ranks` lists of micro-batches, each rank in a thread."""
    summing = SumOverThreads(len(ranks))

    def one(rank: int) -> tuple[PlainEngine, RankStep]:
        total = summing.of_rank(rank)
        engine = PlainEngine(model, len(ranks[rank]), len(ranks), total)
        group = Ranks(world_size=len(ranks), sum=total)
        try:
            return engine, run_step(engine, objective, ranks[rank], VERSION, group, "cpu")
        except BaseException:
            summing.barrier.abort()
            raise

    with ThreadPoolExecutor(len(ranks)) as threads:
        return list(threads.map(one, range(len(ranks))))


def split(step: Scored, layout: Sequence[Sequence[Sequence[int]]]) -> list[list[Scored]]:
    return [[take_scored(step, rows) for rows in rank] for rank in layout]


WHOLE = [[list(range(8))]]
LAYOUTS = {
    "1 rank x 4 micro-batches": [[[0, 1], [2, 3], [4, 5], [6, 7]]],
    "1 rank x 8 micro-batches": [[[i] for i in range(8)]],
    "2 ranks x 2 micro-batches": [[[0, 2], [4, 6]], [[1, 3], [5, 7]]],
    "2 ranks x 1 micro-batch": [[[0, 1, 2, 3]], [[4, 5, 6, 7]]],
    "2 ranks, all long sequences on one": [[[1, 4], [6, 7]], [[0, 2], [3, 5]]],
    "4 ranks x 2 micro-batches": [[[0], [1]], [[2], [3]], [[4], [5]], [[6], [7]]],
}


def by_hand(model: nn.Module, step: Scored) -> Tensor:
    """The clipped gradient of sum(token losses) / count in one backward."""
    whole = CompletionModel(copy.deepcopy(model))
    logits = whole(SequenceBatch.of_samples(step.samples, "cpu"))
    assert isinstance(step.target, TeacherTopK)
    ids = torch.from_numpy(step.target.ids_NK.copy()).long()
    top, tail = torch.from_numpy(step.target.logprobs_NK.copy()), torch.from_numpy(step.target.tail_logprob_N.copy())
    logprobs = torch.log_softmax(logits, -1)
    student_top = logprobs.gather(1, ids)
    student_tail = logprobs.scatter(1, ids, -math.inf).logsumexp(1)
    student = torch.cat([student_top, student_tail[:, None]], 1)
    teacher = torch.cat([top, tail[:, None]], 1)
    middle = (0.3 * teacher.exp() + 0.7 * student.exp()).log()
    divergence = 0.3 * (teacher.exp() * (teacher - middle)).sum(1) + 0.7 * (student.exp() * (student - middle)).sum(1)
    tokens = torch.from_numpy(step.samples.completions.ids_T.copy()).long()
    is_reference = torch.from_numpy(np.repeat(np.arange(8) % 3 == 0, LENGTHS))
    cross_entropy = -logprobs.gather(1, tokens[:, None])[:, 0] * is_reference
    ((divergence + 0.5 * cross_entropy).sum() / sum(LENGTHS)).backward()
    gradient = torch.cat([p.grad.flatten() for p in whole.parameters() if p.grad is not None])
    return gradient * min(1.0, MAX_NORM / float(gradient.norm()))


def test_the_gradient_is_that_of_the_sum_over_tokens_divided_by_their_count(model: nn.Module, step: Scored) -> None:
    [(engine, done)] = train(model, split(step, WHOLE))
    assert done.skipped is None
    assert engine.clipped is not None
    torch.testing.assert_close(engine.clipped, by_hand(model, step), rtol=1e-4, atol=1e-6)
    assert float(engine.clipped.norm()) == pytest.approx(MAX_NORM, rel=1e-5)  # clipping is at work


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_gradient_and_update_do_not_depend_on_ranks_and_micro_batches(
    model: nn.Module, step: Scored, layout: list[list[list[int]]]
) -> None:
    [(alone, expected)] = train(model, split(step, WHOLE))
    engines = train(model, split(step, layout))
    for engine, done in engines:
        assert done.skipped is None
        torch.testing.assert_close(engine.clipped, alone.clipped, rtol=0, atol=1e-6)
        torch.testing.assert_close(engine.weights(), alone.weights(), rtol=0, atol=1e-6)
        torch.testing.assert_close(engine.weights(), engines[0][0].weights(), rtol=0, atol=0)
        metrics = reduce_metrics(done.metrics)
        assert metrics == pytest.approx(reduce_metrics(expected.metrics), rel=1e-5)


def test_metrics_are_weighted_by_what_they_count(model: nn.Module, step: Scored) -> None:
    (_, done), _ = train(model, split(step, LAYOUTS["2 ranks, all long sequences on one"]))
    metrics = reduce_metrics(done.metrics)
    weights = {metric.name: metric.weight for metric in done.metrics}
    references = sum(n for i, n in enumerate(LENGTHS) if i % 3 == 0)
    assert metrics["trainer/tokens"] == sum(LENGTHS)
    assert weights["trainer/loss"] == weights["trainer/divergence_nats"] == sum(LENGTHS)
    assert weights["trainer/cross_entropy_nats"] == references
    assert weights["trainer/staleness_steps"] == 5  # sequences that a policy sampled
    assert metrics["trainer/staleness_steps"] == pytest.approx(2 / 5)  # of 1, 2, 4, 5, 7: two are by version 5
    shares = [metrics[f"trainer/staleness_share/{age}"] for age in range(4)]
    assert shares == pytest.approx([3 / 5, 2 / 5, 0, 0])
    loss = metrics["trainer/divergence_nats"] + 0.5 * metrics["trainer/cross_entropy_nats"] * references / sum(LENGTHS)
    assert metrics["trainer/loss"] == pytest.approx(loss, rel=1e-5)
    assert 0 < metrics["trainer/entropy_nats"] < math.log(VOCABULARY)


def with_answers(step: Scored, **changes: np.ndarray) -> Scored:
    target = step.target
    assert isinstance(target, TeacherTopK)
    fields = {"ids_NK": target.ids_NK, "logprobs_NK": target.logprobs_NK, "tail_logprob_N": target.tail_logprob_N}
    return Scored(samples=step.samples, target=TeacherTopK(**(fields | changes)))


def spoiled(step: Scored, value: float) -> Scored:
    assert isinstance(step.target, TeacherTopK)
    logprobs = step.target.logprobs_NK.copy()
    logprobs[-1, 2] = value  # one number of the last sequence
    return with_answers(step, logprobs_NK=logprobs)


def assert_skipped(model: nn.Module, engines: list[tuple[PlainEngine, RankStep]], reason: str) -> None:
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    for engine, done in engines:
        assert done.skipped == reason
        assert engine.seen == engine.micro_batches  # every rank takes part in every collective call
        torch.testing.assert_close(engine.weights(), before, rtol=0, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_an_answer_that_is_no_number_skips_the_step_on_all_ranks(
    model: nn.Module, step: Scored, layout: list[list[list[int]]], value: float
) -> None:
    assert_skipped(model, train(model, split(spoiled(step, value), layout)), "teacher answers are NaN or infinite")


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_an_infinite_loss_skips_the_step_on_all_ranks(
    model: nn.Module, step: Scored, layout: list[list[list[int]]]
) -> None:
    assert isinstance(step.target, TeacherTopK)
    tail = step.target.tail_logprob_N.copy()
    tail[0] = -math.inf  # legal, but the student has mass there: the reverse KL is infinite
    ranks = split(with_answers(step, tail_logprob_N=tail), layout)
    assert_skipped(model, train(model, ranks, Objective(beta=1.0)), "the loss is NaN or infinite")


def test_an_infinite_loss_skips_the_step_though_its_gradient_is_finite(model: nn.Module, step: Scored) -> None:
    class Shifted(Objective):
        def token_losses(self, *inputs: Any) -> TokenLosses:
            losses = super().token_losses(*inputs)
            return replace(losses, loss_N=losses.loss_N + math.inf)

    ranks = split(step, LAYOUTS["2 ranks x 2 micro-batches"])
    assert_skipped(model, train(model, ranks, Shifted(beta=0.3)), "the loss is NaN or infinite")


def test_a_gradient_that_overflows_skips_the_step_though_the_loss_is_finite(model: nn.Module, step: Scored) -> None:
    class Overflowing(PlainEngine):
        def backward(self, loss: Tensor) -> None:
            super().backward(loss)
            next(p for p in self.model.parameters() if p.grad is not None).grad.fill_(math.inf)  # type: ignore[union-attr]

    engine = Overflowing(model, 1, 1, lambda vector: vector)
    done = run_step(engine, OBJECTIVE, [step], VERSION, Ranks(world_size=1, sum=lambda v: v), "cpu")
    assert_skipped(model, [(engine, done)], "the gradient is NaN or infinite")


def test_a_rank_whose_completions_are_all_empty_takes_part(model: nn.Module, step: Scored) -> None:
    nothing = Scored(
        samples=Samples(
            step=VERSION,
            indices=(8, 9),
            row_ids=("x", "y"),
            prompts=TokenRows.from_rows([[1, 2], [3]]),
            completions=TokenRows.from_rows([[], []]),
            policy_versions=(VERSION, VERSION),
            finish_reasons=("length", "length"),
        ),
        target=TeacherTopK(
            ids_NK=np.zeros((0, K), np.int32),
            logprobs_NK=np.zeros((0, K), np.float32),
            tail_logprob_N=np.zeros(0, np.float32),
        ),
    )
    [(alone, _)] = train(model, split(step, WHOLE))
    (first, done), (second, _) = train(model, [[step], [nothing]])
    assert done.skipped is None
    torch.testing.assert_close(first.weights(), alone.weights(), rtol=0, atol=1e-6)
    torch.testing.assert_close(second.weights(), alone.weights(), rtol=0, atol=1e-6)
    [(_, done)] = train(model, [[nothing]])  # not one token in the whole step
    assert done.skipped is None
    assert reduce_metrics(done.metrics)["trainer/tokens"] == 0


def test_dense_answers_train_like_the_formula(model: nn.Module, step: Scored) -> None:
    generator = torch.Generator().manual_seed(2)
    teacher = torch.log_softmax(torch.randn(sum(LENGTHS), VOCABULARY, generator=generator), -1)
    dense = Scored(samples=step.samples, target=TeacherDense(logprobs_NV=teacher.numpy()))
    ranks = split(dense, LAYOUTS["2 ranks x 2 micro-batches"])
    (_, done), _ = train(model, ranks, Objective(beta=0.0))
    with torch.no_grad():
        logits = CompletionModel(model)(SequenceBatch.of_samples(step.samples, "cpu"))
        expected = generalized_jsd(*dense_classes(logits, teacher), 0.0, "raw").mean()
    assert reduce_metrics(done.metrics)["trainer/loss"] == pytest.approx(float(expected), rel=1e-5)


def test_without_a_teacher_the_cross_entropy_of_references_is_trained(model: nn.Module, step: Scored) -> None:
    references = [0, 3, 6]
    plain = Scored(samples=step.samples.take(references), target=None)
    [(engine, done)] = train(model, [[plain]], Objective(distill_weight=0.0, ce_weight=1.0))
    metrics = reduce_metrics(done.metrics)
    assert done.skipped is None
    assert engine.clipped is not None
    assert metrics["trainer/loss"] == pytest.approx(metrics["trainer/cross_entropy_nats"])
    assert metrics["trainer/divergence_nats"] == 0.0
    assert "trainer/staleness_steps" not in metrics


def test_micro_batches_can_be_put_together_again(step: Scored) -> None:
    parts = [take_scored(step, rows) for rows in LAYOUTS["1 rank x 4 micro-batches"][0]]
    assert merge_scored(parts).samples.completions.ids_T.tolist() == step.samples.completions.ids_T.tolist()
