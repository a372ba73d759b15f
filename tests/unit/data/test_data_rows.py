import json

import pytest

from raydistill.data.rows import Message, read_rows
from raydistill.errors import DataError

PAIR = {"question": "1+1?", "answer": "2"}
CHAT = {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]}


@pytest.mark.parametrize(
    "row", [PAIR, CHAT, {"prompt": "1+1?", "completion": "2"}, {"prompt": "1+1?", "response": "2"}]
)
def test_each_shape_becomes_the_same_row(write_jsonl, row):
    (read,) = read_rows(write_jsonl([row])).rows
    assert read.messages == (Message("user", "1+1?"), Message("assistant", "2"))
    assert read.row_id == read_rows(write_jsonl([PAIR])).rows[0].row_id
    assert read.prompt == (Message("user", "1+1?"),) and read.reference == Message("assistant", "2")


def test_a_prompt_alone_has_no_reference(write_jsonl):
    (row,) = read_rows(write_jsonl([{"prompt": "1+1?"}])).rows
    assert row.reference is None and row.prompt == row.messages


def test_a_chat_that_ends_with_the_user_has_no_reference(write_jsonl):
    messages = [*CHAT["messages"], {"role": "user", "content": "sure?"}]
    (row,) = read_rows(write_jsonl([{"messages": messages}])).rows
    assert row.reference is None and len(row.prompt) == 3


def test_row_id_is_the_id_field_or_a_hash_that_ignores_white_space(write_jsonl):
    rows = [PAIR, {"question": " 1+1?\n", "answer": "2 "}, PAIR | {"answer": "3"}, PAIR | {"id": 7}]
    ids = [row.row_id for row in read_rows(write_jsonl(rows)).rows]
    assert ids[0] == ids[1] != ids[2] and ids[3] == "7"


def test_bom_crlf_and_blank_lines_change_nothing(tmp_path, write_jsonl):
    plain = read_rows(write_jsonl([PAIR, CHAT]))
    odd = tmp_path / "odd.jsonl"
    lines = [json.dumps(PAIR), "", "   ", json.dumps(CHAT)]
    odd.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n\r\n")
    assert read_rows(odd) == plain


def test_line_separators_within_text_do_not_end_a_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a\u2028b\x85c"}, ensure_ascii=False), encoding="utf-8")
    assert read_rows(path).rows[0].messages[0].content == "a\u2028b\x85c"


def test_a_folder_of_shards_is_read_in_name_order(tmp_path, write_jsonl):
    write_jsonl([{"prompt": "b"}], "part-2.jsonl")
    write_jsonl([{"prompt": "a"}], "part-1.jsonl")
    (tmp_path / "notes.txt").write_text("not data")
    assert [row.messages[0].content for row in read_rows(tmp_path).rows] == ["a", "b"]


def test_max_rows_limits_good_rows(write_jsonl):
    path = write_jsonl([{"prompt": "a"}, 3, {"prompt": "b"}, {"prompt": "c"}])
    file = read_rows(path, "skip", max_rows=2)
    assert len(file.rows) == 2 and file.num_bad == 1


def test_fingerprint_follows_the_text(write_jsonl):
    first, again = read_rows(write_jsonl([PAIR, CHAT])), read_rows(write_jsonl([PAIR, CHAT]))
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint != read_rows(write_jsonl([PAIR, PAIR | {"answer": "3"}])).fingerprint


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"prompt": "x"', "malformed JSON"),
        ("[1, 2]", "should be an object, this is a list"),
        ("[", "a JSON array is not JSONL"),
        ('"text"', "should be an object, this is text"),
        ('{"text": "x"}', "unknown shape with text"),
        ("{}", "unknown shape with no fields"),
        ('{"messages": []}', "'messages' is empty"),
        ('{"messages": "x"}', "'messages' should be a list, it is text"),
        ('{"messages": [{"role": "user"}]}', "messages[0] has no 'content'"),
        ('{"messages": [{"role": "user", "content": null}]}', "'messages[0].content' should be text, it is null"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "no prompt"),
        ('{"question": 4, "answer": "x"}', "'question' should be text, it is a number"),
        ('{"question": " ", "answer": ""}', "the row has no text"),
        ('{"prompt": "x", "question": "y"}', "both 'prompt' and 'question'"),
        ('{"prompt": "x", "answer": "y", "response": "z"}', "both 'response' and 'answer'"),
        ('{"prompt": "\\ud800"}', "half a character"),
        ("[" * 200_000, "malformed JSON"),
    ],
)
def test_a_bad_row_stops_with_file_and_line_or_is_counted(tmp_path, line, what):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(PAIR)}\n\n{line}\n")
    with pytest.raises(DataError) as caught:
        read_rows(path)
    message = str(caught.value)
    assert f"{path}, line 3: " in message and what in message and "data.on_bad_row='skip'" in message
    assert "\n" not in message
    file = read_rows(path, "skip")
    assert (len(file.rows), file.num_bad) == (1, 1)


def test_only_bad_rows_is_an_error_even_when_skipping(write_jsonl):
    with pytest.raises(DataError, match=r"all 2 rows are malformed, the first is .*line 1"):
        read_rows(write_jsonl([1, 2]), "skip")


def test_a_binary_file_is_named_as_such(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\x1f\x8b\x08\x00\xff\xfe\n")
    with pytest.raises(DataError, match="line 1: not UTF-8 text"):
        read_rows(path)


@pytest.mark.parametrize("content", ["", "\n  \n"])
def test_an_empty_file_says_what_rows_look_like(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"holds no rows.*messages"):
        read_rows(path)


def test_a_missing_file_offers_the_nearest_name(write_jsonl, tmp_path):
    path = write_jsonl([PAIR], "train.jsonl")
    with pytest.raises(DataError, match=f"does not exist. Did you mean {path}"):
        read_rows(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match="nor does its folder"):
        read_rows(tmp_path / "nowhere" / "train.jsonl")
    with pytest.raises(DataError, match="similar name"):
        read_rows(tmp_path / "zzzz")


def test_a_folder_without_jsonl_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"folder without \*.jsonl"):
        read_rows(tmp_path)


def test_gsm8k_reads_whole(gsm8k):
    file = read_rows(gsm8k / "train.jsonl")
    assert len(file.rows) == 7473 and file.num_bad == 0
    assert all("####" in row.reference.content for row in file.rows)
