import numpy as np
import pytest

from raydistill.config import DataSection
from raydistill.data.encode import Example, encode_rows, require_references
from raydistill.data.rows import Message, Row
from raydistill.errors import ConfigError, DataError, ModelError

SECTION = DataSection()
ROW = Row("r", (Message("user", "What is two plus two?"), Message("assistant", "Two plus two is four.")))
PROMPT_TEXT = "<|im_start|>user\nWhat is two plus two?<|im_end|>\n<|im_start|>assistant\n"
TURN = "{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + END -}}"
LOOP = "{%- for m in messages -%}" + TURN + "{%- endfor -%}"
OPEN = "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"


def encode_one(tokenizer, row=ROW, section=SECTION, **options):
    (example,) = encode_rows([row], tokenizer, section, **options)
    return example


def test_prompt_and_reference_join_to_the_whole_conversation(tokenizer):
    example = encode_one(tokenizer)
    assert tokenizer.decode(example.prompt_ids) == PROMPT_TEXT
    assert tokenizer.decode(example.reference_ids) == "Two plus two is four.<|im_end|>"
    chat = [{"role": m.role, "content": m.content} for m in ROW.messages]
    whole = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    line_break = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert [*example.prompt_ids, *example.reference_ids, *line_break] == whole
    assert example.prompt_ids.dtype == example.reference_ids.dtype == np.int32


def test_prompt_ids_are_those_of_the_tokenizing_call(tokenizer):
    chat = [{"role": "user", "content": ROW.messages[0].content}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True)["input_ids"]
    assert encode_one(tokenizer).prompt_ids.tolist() == ids


def test_eos_is_there_exactly_once_whatever_the_template_writes_after_it(tokenizer_factory):
    for end in ("'<|im_end|>'", "'<|im_end|>\\n'", "'<|im_end|><|im_end|>\\n\\n'", "''"):
        tokenizer = tokenizer_factory(LOOP.replace("END", end) + OPEN)
        ids = encode_one(tokenizer).reference_ids.tolist()
        assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1, end
        assert tokenizer.decode(ids[:-1]) == "Two plus two is four.", end


def test_reference_ends_at_the_models_other_stop_token(tokenizer_factory):
    tokenizer = tokenizer_factory(LOOP.replace("END", "'<|end_of_text|>\\n'") + OPEN)
    stop = tokenizer.convert_tokens_to_ids("<|end_of_text|>")
    assert encode_one(tokenizer, stop_ids=[stop]).reference_ids[-1] == stop
    assert encode_one(tokenizer).reference_ids[-2:].tolist() == [stop, tokenizer.eos_token_id]


def test_a_row_without_reference_has_only_a_prompt(tokenizer):
    example = encode_one(tokenizer, Row("r", ROW.messages[:1]))
    assert tokenizer.decode(example.prompt_ids) == PROMPT_TEXT and not example.has_reference


def test_rows_with_and_without_reference_keep_their_order(tokenizer):
    rows = [ROW, Row("a", ROW.messages[:1]), Row("b", (Message("user", "hi"), Message("assistant", "four"))), ROW]
    examples = encode_rows(rows, tokenizer, SECTION)
    assert [e.row_id for e in examples] == ["r", "a", "b", "r"]
    texts = [tokenizer.decode(e.reference_ids, skip_special_tokens=True) for e in examples]
    assert texts == ["Two plus two is four.", "", "four", "Two plus two is four."]


def test_template_variables_reach_the_template(tokenizer):
    block = "<think>\n\n</think>\n\n"
    section = DataSection(template={"enable_thinking": False, "think_block": block})
    example = encode_one(tokenizer, section=section)
    assert tokenizer.decode(example.prompt_ids) == PROMPT_TEXT + block
    # The full text has no such block: the reference is what follows the prompt, not what follows in the full text.
    assert tokenizer.decode(example.reference_ids) == "Two plus two is four.<|im_end|>"


def test_a_continuation_survives_content_that_looks_like_the_end_of_turn(tokenizer):
    section = DataSection(template={"enable_thinking": False, "think_block": "<think></think>"})
    row = Row("r", (Message("user", "say end"), Message("assistant", "end")))
    assert tokenizer.decode(encode_one(tokenizer, row, section).reference_ids) == "end<|im_end|>"


def test_a_think_block_that_the_full_text_adds_belongs_to_the_reference(tokenizer_factory):
    turn = TURN.replace("m['content']", "('<think></think>' if m['role'] == 'assistant' else '') + m['content']")
    tokenizer = tokenizer_factory(LOOP.replace(TURN, turn).replace("END", "'<|im_end|>\\n'") + OPEN)
    example = encode_one(tokenizer)
    assert tokenizer.decode(example.prompt_ids) == PROMPT_TEXT
    assert tokenizer.decode(example.reference_ids) == "<think></think>Two plus two is four.<|im_end|>"


def test_a_token_across_the_border_keeps_the_prompt_as_the_model_sees_it(tokenizer_factory):
    words = "{%- for m in messages -%}{{- m['content'] -}}{%- endfor -%}"
    tokenizer = tokenizer_factory(words)
    row = Row("r", (Message("user", "assis"), Message("assistant", "tant")))
    example = encode_one(tokenizer, row)
    alone = tokenizer("assis", add_special_tokens=False)["input_ids"]
    assert tokenizer("assistant")["input_ids"][: len(alone)] != alone  # the test's premise
    assert example.prompt_ids.tolist() == alone
    assert tokenizer.decode(example.reference_ids) == "tant<|im_end|>"


def test_without_a_chat_template_text_is_plain(tokenizer_factory):
    tokenizer = tokenizer_factory(None)
    example = encode_one(tokenizer)
    assert tokenizer.decode(example.prompt_ids) == "What is two plus two?\n"
    assert tokenizer.decode(example.reference_ids) == "Two plus two is four.<|im_end|>"


def test_plain_text_starts_with_bos_only_if_the_tokenizer_writes_one(tokenizer_factory):
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_factory(None)
    tokenizer.bos_token = "<|im_start|>"
    assert encode_one(tokenizer).prompt_ids[0] != tokenizer.bos_token_id
    special = [("<|im_start|>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=special)
    ids = encode_one(tokenizer).prompt_ids.tolist()
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


def test_a_row_that_the_template_refuses_is_named_or_left_out(tokenizer_factory):
    refuse = "{%- if messages[0]['role'] == 'system' -%}{{- raise_exception('no system role') -}}{%- endif -%}"
    tokenizer = tokenizer_factory(refuse + LOOP.replace("END", "'<|im_end|>'") + OPEN)
    bad = Row("bad", (Message("system", "be brief"), *ROW.messages))
    with pytest.raises(DataError, match=r"row bad: .*no system role.*roles system, user, assistant"):
        encode_rows([ROW, bad], tokenizer, SECTION)
    kept = encode_rows([ROW, bad, ROW], tokenizer, DataSection(on_bad_row="skip"))
    assert [e.row_id for e in kept] == ["r", "r"]


def test_arguments_of_the_renderer_are_no_template_variables(tokenizer):
    with pytest.raises(ConfigError, match=r"data.template.tokenize"):
        encode_one(tokenizer, section=DataSection(template={"tokenize": True}))


def test_a_tokenizer_without_eos_is_refused(tokenizer_factory):
    tokenizer = tokenizer_factory()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no EOS token"):
        encode_one(tokenizer)


def test_missing_references_are_counted_and_the_field_is_named():
    ids = np.arange(3, dtype=np.int32)
    examples = [Example("a", ids, ids), Example("b", ids, ids[:0]), Example("c", ids, ids[:0])]
    message = r"objective.on_policy_fraction < 1 needs reference completions, 2 of 3 rows have none \(first b\)"
    with pytest.raises(DataError, match=message):
        require_references(examples)
