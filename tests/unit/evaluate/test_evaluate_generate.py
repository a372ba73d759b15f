import math

import numpy as np
import pytest
import torch

from raydistill.data.encode import Example
from raydistill.errors import DataError, ModelError
from raydistill.evaluate.generate import (
    MatchScore,
    greedy_completions,
    match_answers,
    require_final_numbers,
)


def example(tokenizer, row_id, prompt, reference):
    prompt_text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    encode = lambda text: np.array(tokenizer.encode(text, add_special_tokens=False), np.int32)  # noqa: E731
    return Example(row_id, encode(prompt_text), encode(f"{reference}<|im_end|>"))


@pytest.fixture
def questions(world):
    """Three of four answers are 7, however they get there."""
    pairs = [("2+5?", "2+5=7\n#### 7"), ("Is it 7?", "#### 7"), ("How many are 3 and 5?", "#### 8"), ("9-2", "#### 7")]
    return [example(world.tokenizer, f"q{i}", *pair) for i, pair in enumerate(pairs)]


def test_exact_match_counts_the_answers_whose_final_number_is_right(world, parrot, questions):
    eos = world.tokenizer.eos_token_id
    answers = greedy_completions(parrot, [q.prompt_ids for q in questions], [eos], 16)
    score = match_answers(zip(answers, (q.reference_ids for q in questions), strict=True), world.tokenizer)
    assert (sum(score.hits), score.num_rows) == (3, 4)
    assert score.share == 0.75
    assert score.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 4))


def test_greedy_answers_end_with_eos_and_come_in_the_order_of_the_prompts(world, parrot, questions):
    eos = world.tokenizer.eos_token_id
    finished = []
    answers = greedy_completions(
        parrot, [q.prompt_ids for q in questions], [eos], 16, batch_tokens=60, on_batch=finished.append
    )
    assert {world.tokenizer.decode(answer) for answer in answers} == {"#### 7<|im_end|>"}
    assert finished == sorted(finished)
    assert finished[-1] == 4
    assert len(finished) > 1


def test_an_answer_is_cut_at_max_new_tokens(world, parrot, questions):
    answers = greedy_completions(parrot, [questions[0].prompt_ids], [world.tokenizer.eos_token_id], 2)
    assert len(answers[0]) == 2


def test_answers_equal_step_by_step_argmax_and_do_not_depend_on_the_batch(world, other):
    prompts = [e.prompt_ids for e in world.examples[:8]]
    eos = world.tokenizer.eos_token_id
    together = greedy_completions(other, prompts, [eos], 12)
    assert greedy_completions(other, prompts[::-1], [eos], 12, batch_tokens=1)[::-1] == together
    for prompt, answer in zip(prompts, together, strict=True):
        ids = prompt.tolist()
        for token in answer:
            with torch.no_grad():
                assert token == int(other(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)


def test_the_models_own_sampling_settings_do_not_bend_the_greedy_answer(world, parrot, questions):
    own = parrot.generation_config
    own.repetition_penalty, own.do_sample, own.temperature = 50.0, True, 3.0
    prompts = [example(world.tokenizer, "x", "#### 7 #### 7", "#### 7").prompt_ids]
    answers = greedy_completions(parrot, prompts, [world.tokenizer.eos_token_id], 16)
    assert world.tokenizer.decode(answers[0]) == "#### 7<|im_end|>"
    assert parrot.generation_config is own


def test_a_model_without_eos_is_refused(parrot, questions):
    with pytest.raises(ModelError, match="no end-of-sequence id"):
        greedy_completions(parrot, [questions[0].prompt_ids], [], 4)


def test_an_answer_without_the_mark_is_wrong(world):
    encode = world.tokenizer.encode
    assert match_answers([(encode("7"), encode("#### 7")), (encode("#### 7"), encode("#### 7"))], world.tokenizer) == (
        MatchScore(hits=(False, True))
    )


def test_references_without_a_final_number_are_refused(world, questions):
    require_final_numbers(questions, world.tokenizer)
    bad = example(world.tokenizer, "bad", "How many?", "seven")
    with pytest.raises(DataError, match=r"1 of 5 references mark none \(first bad\)"):
        require_final_numbers([*questions, bad], world.tokenizer)
