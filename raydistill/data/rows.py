"""Reads JSONL rows into one shape: a list of chat messages with an id.

Accepted rows: `{"messages": [{"role", "content"}, ...]}`, or a prompt ("prompt" or "question") with or without a
completion ("completion", "response" or "answer"). Messages may hold a system prompt and any number of turns: a last message
of the assistant is the reference completion, everything before it is the prompt. Earlier turns of the assistant are context
only; to train on each of them, write one row for each. A row whose last message is another's can only be used on-policy. A
folder of `*.jsonl` files is read in the order of their names.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from raydistill.errors import DataError

PROMPT_FIELDS = ("prompt", "question")
COMPLETION_FIELDS = ("completion", "response", "answer")
SHAPES = '{"messages": [{"role", "content"}, ...]} or {"question" or "prompt", "answer", "completion" or "response"}'
UNREAD_FIELDS = ("reasoning_content", "reasoning", "tool_calls")
"""Text of a message that would be lost: templates write it, rows hold role and content only."""
JSON_NAMES = {dict: "an object", list: "a list", str: "text", bool: "true/false", type(None): "null"}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation; its last message is the reference completion if the assistant wrote it."""

    row_id: str
    messages: tuple[Message, ...]

    @property
    def prompt(self) -> tuple[Message, ...]:
        return self.messages[:-1] if self.reference is not None else self.messages

    @property
    def reference(self) -> Message | None:
        return self.messages[-1] if self.messages[-1].role == "assistant" else None


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFile:
    """The rows of one file or folder, in file order."""

    rows: tuple[Row, ...]
    num_bad: int  # malformed rows that were skipped
    fingerprint: str  # changes when an id or a text changes, not with line ends or blank lines


class _BadRowError(Exception):
    """What is wrong with one row; the reader adds file and line."""


def read_rows(path: Path, on_bad_row: Literal["error", "skip"] = "error", max_rows: int | None = None) -> RowFile:
    """Read rows, at most `max_rows` good ones; a malformed one raises DataError or is counted."""
    rows: list[Row] = []
    num_bad, first_bad = 0, ""
    digest = hashlib.sha256()
    for file, number, line in _lines(_files(path)):
        try:
            row = _parse(line)
        except _BadRowError as problem:
            text = f"{file}, line {number}: {problem}"
            if on_bad_row == "error":
                way_out = "Correct the line, or count and skip such rows with data.on_bad_row='skip'."
                raise DataError(f"{text}. {way_out}") from problem
            num_bad, first_bad = num_bad + 1, first_bad or text
            continue
        rows.append(row)
        digest.update(json.dumps([row.row_id, [(m.role, m.content) for m in row.messages]]).encode())
        if len(rows) == max_rows:
            break
    if not rows and num_bad:
        raise DataError(f"{path}: all {num_bad} rows are malformed, the first is {first_bad}. Rows look like {SHAPES}.")
    if not rows:
        raise DataError(f"{path} holds no rows. Write one JSON object per line: {SHAPES}.")
    return RowFile(rows=tuple(rows), num_bad=num_bad, fingerprint=digest.hexdigest()[:16])


def text_key(messages: Sequence[Message]) -> str:
    """Hash of the conversation's text; white space and Unicode composition do not count."""
    parts = [f"{m.role}\x1f{' '.join(unicodedata.normalize('NFC', m.content).split())}" for m in messages]
    return hashlib.sha256("\x1e".join(parts).encode()).hexdigest()[:24]


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(p for p in path.glob("*.jsonl") if p.is_file())
        if not files:
            raise DataError(f"{path} is a folder without *.jsonl files. Give a JSONL file or a folder that holds some.")
        return files
    if path.exists():
        return [path]
    folder = path.absolute().parent
    if not folder.is_dir():
        raise DataError(f"{path} does not exist, nor does its folder {folder}. Correct the path.")
    near = get_close_matches(path.name, sorted(p.name for p in folder.iterdir()), n=1, cutoff=0.4)
    offer = (
        f"Did you mean {path.parent / near[0]}?"
        if near
        else f"Nothing in {folder} has a similar name; give a JSONL file."
    )
    raise DataError(f"{path} does not exist. {offer}")


def _lines(files: Sequence[Path]) -> Iterator[tuple[Path, int, bytes]]:
    """Lines that hold something, split at the byte \\n only: text may hold other characters that end lines."""
    for file in files:
        try:
            with file.open("rb") as stream:
                for number, line in enumerate(stream, start=1):
                    content = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).strip()
                    if content:
                        yield file, number, content
        except OSError as error:
            raise DataError(
                f"{file} cannot be read: {error.strerror or error}. Check the path and its rights."
            ) from error


def _parse(line: bytes) -> Row:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _BadRowError("not UTF-8 text (is the file compressed or binary?)") from error
    except json.JSONDecodeError as error:
        hint = "; a JSON array is not JSONL, write one object per line" if line.startswith(b"[") else ""
        raise _BadRowError(f"malformed JSON at column {error.colno} ({error.msg}){hint}") from error
    except RecursionError as error:
        raise _BadRowError("malformed JSON (nested too deep)") from error
    if not isinstance(value, dict):
        raise _BadRowError(f"a row should be an object, this is {_kind(value)}")
    messages = _chat(value["messages"]) if "messages" in value else _pair(value)
    if all(not m.content.strip() for m in messages):
        raise _BadRowError("the row has no text")
    if len(messages) == 1 and messages[0].role == "assistant":
        raise _BadRowError("the row has a completion but no prompt")
    given = value.get("id")
    has_id = isinstance(given, str | int) and not isinstance(given, bool) and given != ""
    return Row(_text(str(given), "id") if has_id else text_key(messages), messages)


def _chat(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise _BadRowError(f"'messages' should be a list, it is {_kind(value)}")
    if not value:
        raise _BadRowError("'messages' is empty")
    messages = []
    for place, item in enumerate(value):
        if not isinstance(item, dict):
            raise _BadRowError(f"messages[{place}] should be an object, it is {_kind(item)}")
        missing = [name for name in ("role", "content") if name not in item]
        if missing:
            raise _BadRowError(f"messages[{place}] has no '{missing[0]}'")
        unread = [name for name in UNREAD_FIELDS if item.get(name)]
        if unread:
            raise _BadRowError(f"messages[{place}] has '{unread[0]}', which is not read; write its text into 'content'")
        role = _text(item["role"], f"messages[{place}].role")
        messages.append(Message(role, _text(item["content"], f"messages[{place}].content")))
    return tuple(messages)


def _pair(row: dict[str, Any]) -> tuple[Message, ...]:
    prompt, completion = _one_of(row, PROMPT_FIELDS), _one_of(row, COMPLETION_FIELDS)
    if prompt is None:
        names = ", ".join(sorted(row)[:8]) or "no fields"
        raise _BadRowError(f"unknown shape with {names}; expected {SHAPES}")
    messages = (Message("user", _text(row[prompt], prompt)),)
    return messages if completion is None else (*messages, Message("assistant", _text(row[completion], completion)))


def _one_of(row: dict[str, Any], names: Sequence[str]) -> str | None:
    found = [name for name in names if name in row]
    if len(found) > 1:
        raise _BadRowError(f"the row has both '{found[0]}' and '{found[1]}', keep one")
    return found[0] if found else None


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _BadRowError(f"'{name}' should be text, it is {_kind(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _BadRowError(f"'{name}' holds half a character (a broken \\u escape)") from error
    return value


def _kind(value: Any) -> str:
    return JSON_NAMES.get(type(value), "a number")
