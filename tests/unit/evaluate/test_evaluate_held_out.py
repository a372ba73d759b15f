import math

import numpy as np
import pytest
import torch

from raydistill.data.encode import Example
from raydistill.data.schedule import held_out_references
from raydistill.errors import DataError
from raydistill.evaluate.held_out import answer_held_out, score_answers, score_rows, score_targets
from raydistill.merge import split_scored
from raydistill.messages import Scored, TeacherDense, TeacherTopK
from raydistill.tensors import CompletionModel


def hand_sums(teacher, student, examples):
    """KL and cross-entropy sums in float64, one unpadded row at a time through the models' whole forward."""
    kl_sum = ce_sum = 0.0
    teacher, student = teacher.double(), student.double()
    for example in examples:
        ids = torch.from_numpy(np.concatenate([example.prompt_ids, example.reference_ids])).long()[None]
        first = example.prompt_ids.size
        with torch.no_grad():
            p, q = (torch.log_softmax(m(input_ids=ids).logits[0, first - 1 : -1], -1) for m in (teacher, student))
        kl_sum += float((p.exp() * (p - q)).sum())
        ce_sum -= float(q.gather(1, ids[0, first:, None]).sum())
    return kl_sum, ce_sum


def dense_target(teacher, samples):
    """[N, V] float32 log-probs row by row, in the order of the samples."""
    parts = []
    for prompt, completion in zip(samples.prompts.rows(), samples.completions.rows(), strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, completion])).long()[None]
        with torch.no_grad():
            logits = teacher(input_ids=ids).logits[0, prompt.size - 1 : -1]
        parts.append(torch.log_softmax(logits, -1).numpy())
    return np.concatenate(parts)


def test_kl_of_a_model_against_itself_is_zero(world, teacher):
    model = CompletionModel(teacher)
    score = score_answers(model, answer_held_out(model, world.examples))
    assert score.kl_nats == pytest.approx(0.0, abs=1e-7)
    assert score.num_tokens == sum(e.reference_ids.size for e in world.examples)


def test_kl_and_perplexity_equal_a_float64_sum_over_the_whole_vocabulary(world, teacher, other):
    score = score_answers(CompletionModel(other), answer_held_out(CompletionModel(teacher), world.examples))
    kl_sum, ce_sum = hand_sums(teacher, other, world.examples)
    assert score.kl_sum == pytest.approx(kl_sum, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(ce_sum / score.num_tokens), rel=1e-5)
    assert score.kl_nats is not None
    assert score.kl_nats > 0.1


def test_the_batches_and_the_order_of_rows_do_not_change_the_sums(world, teacher, other):
    student = CompletionModel(other)
    scores = [
        score_answers(student, answer_held_out(CompletionModel(teacher), examples, batch_tokens))
        for examples in (world.examples, world.examples[::-1])
        for batch_tokens in (1, 200, 4096)
    ]
    for score in scores[1:]:
        assert score.num_tokens == scores[0].num_tokens
        assert score.kl_sum == pytest.approx(scores[0].kl_sum, rel=1e-5)
        assert score.cross_entropy_sum == pytest.approx(scores[0].cross_entropy_sum, rel=1e-5)


def test_vocabulary_chunks_do_not_change_the_sums(world, teacher, other, monkeypatch):
    answers = answer_held_out(CompletionModel(teacher), world.examples)
    whole = score_answers(CompletionModel(other), answers)
    monkeypatch.setattr("raydistill.evaluate.held_out.rows_per_chunk", lambda vocabulary_size: 7)
    chunked = score_answers(CompletionModel(other), answers)
    assert chunked.kl_sum == pytest.approx(whole.kl_sum, rel=1e-6)
    assert chunked.num_tokens == whole.num_tokens


def test_messages_of_a_teacher_give_the_same_score_as_a_teacher_in_the_process(world, teacher, other):
    student = CompletionModel(other)
    exact = score_answers(student, answer_held_out(CompletionModel(teacher), world.examples))
    samples = held_out_references(world.examples)
    assert samples is not None
    logprobs = dense_target(teacher, samples)

    dense = score_targets(
        student, split_scored([Scored(samples=samples, target=TeacherDense(logprobs_NV=logprobs))], 5)
    )
    assert dense.kl_sum == pytest.approx(exact.kl_sum, rel=1e-5)
    assert dense.cross_entropy_sum == pytest.approx(exact.cross_entropy_sum, rel=1e-5)

    def top_k(k):
        order = np.argsort(-logprobs, axis=1, kind="stable")
        rest = np.take_along_axis(logprobs, order[:, k:], axis=1).astype(np.float64)
        with np.errstate(divide="ignore"):
            tail = np.log(np.exp(rest).sum(1)).astype(np.float32)
        target = TeacherTopK(
            ids_NK=order[:, :k].astype(np.int32),
            logprobs_NK=np.take_along_axis(logprobs, order[:, :k], axis=1),
            tail_logprob_N=tail,
        )
        return score_targets(student, split_scored([Scored(samples=samples, target=target)], 5)).kl_sum

    assert top_k(logprobs.shape[1]) == pytest.approx(exact.kl_sum, rel=1e-5)
    assert 0 < top_k(8) < top_k(64) < exact.kl_sum * (1 + 1e-6)


def test_without_a_teacher_there_is_no_kl_but_a_perplexity(world, other):
    samples = held_out_references(world.examples)
    assert samples is not None
    score = score_targets(CompletionModel(other), [Scored(samples=samples, target=None)])
    assert score.kl_nats is None
    assert score.perplexity > 1


def test_rows_without_a_reference_do_not_count(world, teacher):
    model = CompletionModel(teacher)
    bare = Example("bare", world.examples[0].prompt_ids, np.zeros(0, np.int32))
    assert score_answers(model, answer_held_out(model, [bare, world.examples[0]])).num_tokens == (
        world.examples[0].reference_ids.size
    )
    with pytest.raises(DataError, match="none of the 1 held-out rows has a reference"):
        answer_held_out(model, [bare])


def test_a_row_scores_the_same_alone_as_among_others_and_rows_add_up(world, teacher, other):
    student = CompletionModel(other)
    together = score_rows(student, answer_held_out(CompletionModel(teacher), world.examples, batch_tokens=200))
    assert together.row_ids == tuple(example.row_id for example in world.examples)
    for place, example in enumerate(world.examples[:5]):
        alone = score_answers(student, answer_held_out(CompletionModel(teacher), [example]))
        assert together.tokens_R[place] == example.reference_ids.size
        assert together.kl_R[place] == pytest.approx(alone.kl_sum, rel=1e-5)
        assert together.cross_entropy_R[place] == pytest.approx(alone.cross_entropy_sum, rel=1e-5)
    assert together.total.kl_nats == pytest.approx(together.values()["kl_nats"].mean, rel=1e-12)
    assert together.total.num_tokens == together.tokens_R.sum()
