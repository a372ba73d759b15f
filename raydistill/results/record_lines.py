"""The lines of a run's record: how they are written, read back and cut."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from difflib import get_close_matches
from io import FileIO
from pathlib import Path
from typing import Any

from raydistill.errors import UserError
from raydistill.messages import Span

RECORD_FILE = "record.jsonl"
Line = dict[str, Any]
_NOT_FINITE = {"float:nan": math.nan, "float:inf": math.inf, "float:-inf": -math.inf}


def read_record(folder: Path) -> Iterator[Line]:
    """The whole lines of a run's record in order, numbers that are not finite restored; nothing where there is none."""
    path = folder / RECORD_FILE
    if not path.exists():
        return
    with path.open("rb") as file:
        for raw in file:
            if raw.endswith(b"\n") and raw.strip():
                yield decode_line(raw)


def start_of(folder: Path) -> Line | None:
    """The start line of a run's record (name, settings, provenance, seed, data fingerprint); None where there is none."""
    return next((line for line in read_record(folder) if line["kind"] == "start"), None)


def require_start(folder: Path) -> Line:
    """The same; UserError, with the name that comes near, if `folder` is no run's."""
    start = start_of(folder)
    if start is None:
        siblings = [path.name for path in folder.absolute().parent.glob("*") if path.name != folder.name]
        near = get_close_matches(folder.name, siblings, n=1)
        hint = f"did you mean {folder.parent / near[0]}?" if near else "give the folder of a run (outputs/runs/NAME)"
        raise UserError(f"{folder} holds no run's record; {hint}")
    return start


def decode_line(raw: bytes) -> Line:
    """One line of a record as written by `RunRecord`."""
    line: Line = _map_leaves(
        json.loads(raw), lambda leaf: _NOT_FINITE.get(leaf, leaf) if isinstance(leaf, str) else leaf
    )
    return line


def read_spans(folder: Path) -> list[Span]:
    """All spans of a record by start, each once."""
    return spans_of(read_record(folder))


def evaluations_of(folder: Path) -> dict[int, dict[str, float]]:
    """Version -> metrics of every held-out evaluation in a record."""
    return {line["version"]: line["metrics"] for line in read_record(folder) if line["kind"] == "evaluation"}


def spans_of(lines: Iterable[Mapping[str, Any]]) -> list[Span]:
    """All spans of some lines by start, each once (an evaluation's may stand in its report and among the spans)."""
    spans: set[Span] = set()
    for line in lines:
        if line["kind"] == "spans":
            spans |= {Span(**span) for span in line["spans"]}
        elif line["kind"] == "evaluation" and line.get("span"):
            spans.add(Span(**line["span"]))
    return sorted(spans, key=lambda span: (span.start_s, span.actor))


def encode_line(line: Line) -> bytes:
    """One line as bytes with its newline; JSON has no NaN, so numbers that are not finite become strings."""
    plain = _map_leaves(line, _plain_leaf)
    return json.dumps(plain, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def _plain_leaf(leaf: Any) -> Any:
    if hasattr(leaf, "item") and not isinstance(leaf, (str, bytes)):  # a numpy or torch number
        leaf = leaf.item()
    if isinstance(leaf, float) and not math.isfinite(leaf):
        return f"float:{leaf}"
    if leaf is None or isinstance(leaf, (bool, int, float, str)):
        return leaf
    return str(leaf)


def _map_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _map_leaves(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map_leaves(item, change) for item in value]
    return change(value)


def cut_line(line: Line, step: int) -> Line | None:
    """The line as it stands after a resume at `step`; None if it is done again."""
    kind = line["kind"]
    if kind == "step":
        return line if line["step"] < step else None
    if kind == "sync":
        return line if line["version"] < step else None
    if kind in ("evaluation", "samples"):
        return line if line["version"] <= step else None
    if kind == "spans":
        kept = [span for span in line["spans"] if span["step"] < step]
        return {**line, "spans": kept} if kept else None
    return None if kind in ("end", "table") else line


def open_after_last_line(path: Path) -> FileIO:
    """Open for appending after the last whole line; unbuffered, so that a failed write leaves nothing behind."""
    file = FileIO(path, "a+")
    size = file.seek(0, os.SEEK_END)
    end = size
    while end > 0:
        start = max(0, end - 65536)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        file.truncate(end)
    file.seek(0, os.SEEK_END)
    return file


def write_whole(file: FileIO, data: bytes) -> None:
    """Append all of `data` or, where the disk is full, nothing."""
    good_end = os.fstat(file.fileno()).st_size
    try:
        left = memoryview(data)
        while left:
            left = left[file.write(left) :]
    except OSError:
        with suppress(OSError):  # the next opening drops a torn last line as well
            file.truncate(good_end)
        raise
