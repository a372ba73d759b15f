"""The tokenizer: what a prompt's ids are does not depend on what follows."""

import itertools

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from raydistill.demo.stories import generate_stories
from raydistill.demo.tokenizer import END, encode_chats, save_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """Trained, saved and loaded again the way everybody else loads it."""
    stories = itertools.islice(generate_stories("train", 0), 500)
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer([text for s in stories for text in (s.prompt, s.answer)], 512), folder)
    loaded: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(folder)
    return loaded


def chat(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


AWKWARD = [
    "12+7=19\n#### 19",
    "\n\n  two lines\n",
    " leading space",
    "7",
    "'s",
    "Ünïcödé ½ 日本 \U0001f600",
    "\r\n\ttab",
    "####",
]


@pytest.mark.parametrize("answer", AWKWARD)
def test_prompt_ids_then_completion_ids_are_the_ids_of_the_whole_conversation(
    tokenizer: PreTrainedTokenizerFast, answer: str
) -> None:
    messages = chat("Ada has 3 shells.\nHow many?", answer)
    whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=True, return_dict=False, add_generation_prompt=True)
    [(prompt_ids, completion_ids)] = encode_chats(tokenizer, [messages])
    assert prompt_ids == prompt
    assert prompt_ids + completion_ids == whole
    assert completion_ids == tokenizer(answer + END, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", AWKWARD)
def test_text_survives_encoding_and_decoding(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_digits_and_line_breaks_are_tokens_of_their_own(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenizer.tokenize("has 123\n\n45 ½")
    assert [token for token in tokens if token in set("12345")] == list("12345")
    assert tokens.count("Ċ") == 2


def test_eos_ends_the_assistant_message_and_pad_is_another_token(tokenizer: PreTrainedTokenizerFast) -> None:
    [(_, completion_ids)] = encode_chats(tokenizer, [chat("a", "b")])
    assert completion_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token == END
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


def test_a_story_takes_about_63_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    stories = list(itertools.islice(generate_stories("test", 0), 300))
    rows = encode_chats(tokenizer, [chat(story.prompt, story.answer) for story in stories])
    assert len(tokenizer) <= 512
    assert 58 < sum(len(prompt) + len(completion) for prompt, completion in rows) / len(rows) < 68
    assert 20 < sum(len(completion) for _, completion in rows) / len(rows) < 28
    assert max(len(completion) for _, completion in rows) <= 56
