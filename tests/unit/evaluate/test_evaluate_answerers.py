"""What every measure asks of a model: likelihoods of given continuations, and greedy answers."""

import numpy as np
import pytest
import torch

from raydistill.evaluate.answerers import HfAnswerer

from .conftest import make_model


def pairs_of(world):
    pairs = [(e.prompt_ids, e.reference_ids) for e in world.examples[:6]]
    return [*pairs, ([5], [6]), (world.examples[0].prompt_ids[:3], world.examples[1].reference_ids)]


def test_likelihoods_equal_a_float64_pass_of_each_sequence_alone_in_any_order(world, other):
    answerer = HfAnswerer(other, world.tokenizer, [2], 256)
    pairs, done = pairs_of(world), []
    found = answerer.likelihoods(pairs, done.append)
    backwards = answerer.likelihoods(pairs[::-1])[::-1]
    assert done[-1] == len(pairs) and done == sorted(done)
    other = other.double()
    for (context, rest), one, again in zip(pairs, found, backwards, strict=True):
        ids = torch.tensor([[*context, *rest]]).long()
        with torch.no_grad():
            logprobs = other(input_ids=ids).logits[0, len(context) - 1 : -1].log_softmax(-1)
        target = ids[0, len(context) :]
        np.testing.assert_allclose(one.logprobs_N, logprobs.gather(1, target[:, None])[:, 0], atol=2e-5)
        np.testing.assert_allclose(one.logprobs_N, again.logprobs_N, atol=2e-5)
        assert one.is_greedy == bool((logprobs.argmax(-1) == target).all())
        assert one.total == pytest.approx(float(one.logprobs_N.astype(np.float64).sum()))


def test_a_continuation_is_greedy_if_it_is_what_the_model_would_say(world, other):
    answerer = HfAnswerer(other, world.tokenizer, [2], 256)
    prompts = [example.prompt_ids for example in world.examples[:4]]
    answers = answerer.answers(prompts, 8)
    found = answerer.likelihoods(list(zip(prompts, answers, strict=True)))
    assert [one.is_greedy for one in found] == [True] * 4
    changed = [[*answer[:-1], (answer[-1] + 1) % 300] for answer in answers]
    assert not any(one.is_greedy for one in answerer.likelihoods(list(zip(prompts, changed, strict=True))))


def test_padding_of_the_vocabulary_is_never_an_answer(world):
    size = len(world.tokenizer)
    model = make_model(world.tokenizer, 5, tied=False, vocab_size=size + 16)
    with torch.no_grad():
        model.lm_head.weight[size:] = 0.0
        model.lm_head.weight[size + 3] = 50 * torch.sign(model.model.norm.weight)
        model.model.norm.weight.abs_()
    prompts = [example.prompt_ids for example in world.examples[:8]]
    unbounded = {int(model(input_ids=torch.from_numpy(p).long()[None]).logits[0, -1].argmax()) for p in prompts}
    assert max(unbounded) >= size, "else this proves nothing"
    answers = HfAnswerer(model, world.tokenizer, [world.tokenizer.eos_token_id], 256).answers(prompts, 6)
    assert max(max(answer) for answer in answers) < size


def test_an_answer_ends_where_its_text_holds_a_stop_text(world, parrot):
    """The parrot says `#### 7<|im_end|>`."""
    answerer = HfAnswerer(parrot, world.tokenizer, [world.tokenizer.eos_token_id], 256)
    prompts = [example.prompt_ids for example in world.examples[:3]]
    texts = {
        stop: {world.tokenizer.decode(answer) for answer in answerer.answers(prompts, 16, stop)}
        for stop in ((), ("###",), ("7", "nowhere"))
    }
    assert texts == {(): {"#### 7<|im_end|>"}, ("###",): {"####"}, ("7", "nowhere"): {"#### 7"}}
