"""Multi-turn rows, system prompts and thinking switches with templates like those of Qwen3, Llama 3 and Gemma."""

import json

import pytest

from raydistill.config import DataSection
from raydistill.data.encode import encode_rows
from raydistill.data.rows import Message, Row, read_rows
from raydistill.errors import DataError

# Thinking is shown in the last turn only; without thinking the generation prompt holds a closed block.
QWEN3 = """
{%- for m in messages -%}
  {%- if m.role in ('system', 'user') -%}
    {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}
  {%- elif m.role == 'assistant' -%}
    {%- set parts = m.content.split('</think>') -%}
    {%- set thought = parts[0].split('<think>')[-1].strip('\\n') if parts | length > 1 else '' -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- if loop.last -%}{{- '<think>\\n' + thought + '\\n</think>\\n\\n' -}}{%- endif -%}
    {{- parts[-1].lstrip('\\n') + '<|im_end|>\\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
  {%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}
"""
# The generation prompt always opens a thinking block; turns are written without theirs.
REASONER = """
{%- for m in messages -%}
  {%- set text = m.content.split('</think>')[-1] if m.role == 'assistant' else m.content -%}
  {{- '<|im_start|>' + m.role + '\\n' + text + '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- endif -%}
"""
# A system turn that is always there and names a day; texts are trimmed.
LLAMA3 = """
{%- if messages[0].role == 'system' -%}{%- set told = messages[0].content | trim -%}{%- set turns = messages[1:] -%}
{%- else -%}{%- set told = '' -%}{%- set turns = messages -%}{%- endif -%}
{{- '<|head|>system<|/head|>\\n\\nToday: ' + (date_string | default('1 May 2024')) + '\\n\\n' + told + '<|im_end|>' -}}
{%- for m in turns -%}{{- '<|head|>' + m.role + '<|/head|>\\n\\n' + (m.content | trim) + '<|im_end|>' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|head|>assistant<|/head|>\\n\\n' -}}{%- endif -%}
"""
# No system role, turns must alternate, the assistant is called model.
GEMMA = """
{%- if messages[0].role == 'system' -%}{{- raise_exception('System role not supported') -}}{%- endif -%}
{%- for m in messages -%}
  {%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{- raise_exception('roles must alternate') -}}{%- endif -%}
  {{- '<|turn|>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + (m.content | trim) + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|turn|>model\\n' -}}{%- endif -%}
"""
TEMPLATES = {"qwen3": QWEN3, "reasoner": REASONER, "llama3": LLAMA3, "gemma": GEMMA}
THINKING, DIRECT = DataSection(template={"enable_thinking": True}), DataSection()

USER, ANSWER = Message("user", "What is two plus two?"), Message("assistant", "Two plus two is four.")
TURNS = (USER, ANSWER, Message("user", "And three?"), Message("assistant", "It is five."))
SYSTEM = Message("system", "Be brief.")
THOUGHT = Message("assistant", "<think>\nI count.\n</think>\n\nIt is five.")


@pytest.fixture
def texts(tokenizer_factory):
    """(prompt, completion) of one row as text."""

    def texts(template, messages, section=DIRECT):
        tokenizer = tokenizer_factory(template)
        (example,) = encode_rows([Row("r", tuple(messages))], tokenizer, section)
        return tokenizer.decode(example.prompt_ids), tokenizer.decode(example.reference_ids)

    return texts


@pytest.mark.parametrize("name", ["qwen3", "llama3", "gemma"])
@pytest.mark.parametrize("section", [DIRECT, THINKING])
def test_prompt_and_completion_are_what_the_template_writes_for_the_whole(texts, tokenizer_factory, name, section):
    chat = TURNS if name == "gemma" else (SYSTEM, *TURNS)
    prompt, completion = texts(TEMPLATES[name], chat, section)
    messages = [{"role": m.role, "content": m.content} for m in chat]
    whole = tokenizer_factory(TEMPLATES[name]).apply_chat_template(messages, tokenize=False, **section.template)
    assert prompt + completion == whole.rstrip("\n")


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_last_turn_is_the_completion_and_the_others_are_context(texts, name):
    last = THOUGHT if name == "reasoner" else TURNS[-1]
    prompt, completion = texts(TEMPLATES[name], (*TURNS[:3], last))
    assert "Two plus two is four." in prompt and "And three?" in prompt and "It is five." not in prompt
    assert completion.endswith("It is five.<|im_end|>") and "four" not in completion


def test_a_conversation_that_ends_with_the_user_has_no_reference(texts):
    prompt, completion = texts(QWEN3, TURNS[:3])
    assert prompt.endswith("And three?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n") and completion == ""


@pytest.mark.parametrize("name", ["qwen3", "llama3"])
def test_a_system_prompt_reaches_the_model(texts, name):
    assert "system" in texts(TEMPLATES[name], (SYSTEM, *TURNS))[0].split("Be brief.")[0]


def test_a_template_without_a_system_role_says_where_the_text_can_go(texts):
    message = (
        r"row r: .*System role not supported.*\(roles system, user, assistant; a system text .* first user message"
    )
    with pytest.raises(DataError, match=message):
        texts(GEMMA, (SYSTEM, USER, ANSWER))


def test_turns_in_an_order_that_the_template_refuses_are_named(texts):
    with pytest.raises(DataError, match=r"row r: .*roles must alternate.*\(roles user, user, assistant\)"):
        texts(GEMMA, (USER, USER, ANSWER))


def test_a_message_that_the_template_passes_over_is_an_error_or_left_out(texts, tokenizer_factory):
    rows = [Row("bad", (Message("human", "What is two plus two?"), ANSWER)), Row("good", (USER, ANSWER))]
    with pytest.raises(DataError, match=r"row bad: .*it leaves out messages\[0\], whose role is 'human'"):
        encode_rows(rows, tokenizer_factory(QWEN3), DIRECT)
    kept = encode_rows(rows, tokenizer_factory(QWEN3), DataSection(on_bad_row="skip"))
    assert [example.row_id for example in kept] == ["good"]


def test_a_message_that_the_template_quotes_is_not_missing(texts):
    quoting = QWEN3.replace("m.role + '\\n' + m.content", "m.role + '\\n' + (m.content | tojson)")
    assert '\\"two\\"' in texts(quoting, (Message("user", 'What is "two"?'), ANSWER))[0]


def test_without_thinking_the_closed_block_belongs_to_the_prompt(texts):
    prompt, completion = texts(QWEN3, (USER, ANSWER))
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert completion == "Two plus two is four.<|im_end|>"


def test_with_thinking_the_block_belongs_to_the_completion(texts):
    prompt, completion = texts(QWEN3, (*TURNS[:3], THOUGHT), THINKING)
    assert prompt.endswith("<|im_start|>assistant\n")
    assert completion == "<think>\nI count.\n</think>\n\nIt is five.<|im_end|>"


def test_the_thinking_of_earlier_turns_is_context_as_the_template_writes_it(texts):
    prompt, _ = texts(QWEN3, (USER, THOUGHT, Message("user", "Sure?"), ANSWER))
    assert "It is five." in prompt and "I count." not in prompt


def test_a_completion_that_thinks_behind_a_closed_block_is_refused_with_a_way_out(texts, tokenizer_factory):
    with pytest.raises(DataError, match=r"row r: .*does not follow its prompt.*data\.template\.enable_thinking=true"):
        texts(QWEN3, (*TURNS[:3], THOUGHT))
    rows = [Row("bad", (*TURNS[:3], THOUGHT)), Row("good", TURNS)]
    kept = encode_rows(rows, tokenizer_factory(QWEN3), DataSection(on_bad_row="skip"))
    assert [example.row_id for example in kept] == ["good"]


@pytest.mark.parametrize("start", ["<think>\n", "<think>", ""])
def test_a_prompt_that_opens_the_thinking_is_continued_by_it(texts, start):
    answer = Message("assistant", start + "I count.\n</think>\n\nIt is five.")
    prompt, completion = texts(REASONER, (*TURNS[:3], answer))
    assert prompt.endswith("<think>\n")
    assert completion == "I count.\n</think>\n\nIt is five.<|im_end|>"


def test_an_answer_inside_an_open_thinking_block_is_refused(texts):
    with pytest.raises(DataError, match=r"row r: .*open <think>, and its completion has no </think>"):
        texts(REASONER, TURNS)


def test_any_variable_of_the_template_can_be_set(texts):
    assert "Today: 2 June 2025" in texts(LLAMA3, TURNS, DataSection(template={"date_string": "2 June 2025"}))[0]


def test_white_space_around_a_completion_is_no_reason_to_refuse_it(texts):
    opening = "assistant<|/head|>\\n\\n"
    template = LLAMA3.replace(" | trim", "").replace(opening, opening + "<think></think>")
    prompt, completion = texts(template, (USER, Message("assistant", " four ")))
    assert prompt.endswith("<think></think>") and completion == "four<|im_end|>"


@pytest.mark.parametrize("field", ["reasoning_content", "tool_calls"])
def test_text_beside_the_content_is_not_lost_silently(tmp_path, field):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "four", field: ["thoughts"]}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages}))
    with pytest.raises(DataError, match=rf"line 1: messages\[1\] has '{field}', which is not read; .*'content'"):
        read_rows(tmp_path / "rows.jsonl")
