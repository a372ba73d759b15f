"""Perplexity and bits per byte of a running text, in either of the two conventions of the field.

Texts of one file are joined by a blank line and tokenised once. The text's first token is given, never scored, unless
the tokenizer puts a begin-of-sequence token before texts: then that is given and every token of the text is scored.

    sliding   windows of `window` tokens, each `stride` further on; a window scores the tokens that no window before it
              held, with everything before them in the window as context: each token is scored exactly once
    blocks    windows that lie side by side, nothing carried over: the first token of each is not scored, a shorter one
              at the end is left out (GPTQ's and most quantization papers' tables, with 2048 tokens)
"""

# Shape letters: T tokens of the text.
from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from raydistill.errors import DataError
from raydistill.evaluate.answerers import Answerer, OnDone
from raydistill.evaluate.measured import Measured
from raydistill.evaluate.paired import RowValues
from raydistill.results.tables import Measure

Convention = Literal["sliding", "blocks"]
BLANK_LINE = "\n\n"
ROW_FILES = (".jsonl", ".json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A tokenised text."""

    name: str
    ids_T: np.ndarray  # int32
    bytes_T: np.ndarray | None  # int64, UTF-8 bytes of each token's text; None where the tokenizer cannot tell


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Tokens `begin` to `first` are context, `first` to `end` are scored; positions in the text."""

    begin: int
    first: int
    end: int


def read_text(path: Path, column: str) -> str:
    """A text file as it stands; the texts in one column of a JSONL or Parquet file, joined by a blank line.

    `.gz` after the ending is unpacked. DataError if there is no text.
    """
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    try:
        if kind == ".parquet":
            text = BLANK_LINE.join(_parquet_texts(path, column))
        elif kind in ROW_FILES:
            text = BLANK_LINE.join(_row_texts(path, column))
        else:
            with _open(path) as file:
                text = str(file.read())
        text.encode()  # half a character cannot be counted in bytes
    except (OSError, UnicodeError) as error:
        raise DataError(f"--text {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not text.strip():
        raise DataError(f"--text {path} holds no text; give a text file, or JSONL or Parquet with a column {column!r}")
    return text


def tokenize(name: str, text: str, tokenizer: Any) -> Text:
    """Ids of the whole text with its begin-of-sequence token, if this tokenizer puts one before texts."""
    is_fast = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=is_fast, verbose=False)
    ids, sizes = list(encoded["input_ids"]), None
    if is_fast:
        sizes = _bytes_of_tokens(text, [start for start, _ in encoded["offset_mapping"]])
    bos = tokenizer.bos_token_id
    if bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]:
        ids, sizes = [bos, *ids], None if sizes is None else np.concatenate([[0], sizes])
    return Text(name=name, ids_T=np.array(ids, np.int32), bytes_T=sizes)


def windows_of(num_tokens: int, convention: Convention, window: int, stride: int) -> list[Window]:
    """The windows of a text. Property tested: sliding ones score every token but the first exactly once."""
    if convention == "blocks":
        starts = range(0, num_tokens - window + 1, window)
        return [Window(begin=begin, first=begin + 1, end=begin + window) for begin in starts]
    windows = [Window(begin=0, first=1, end=min(window, num_tokens))]
    while windows[-1].end < num_tokens:
        begin, first = windows[-1].begin + stride, windows[-1].end
        windows.append(Window(begin=begin, first=first, end=min(begin + window, num_tokens)))
    return windows


class TextPerplexity:
    """The measurement of one text."""

    def __init__(self, text: Text, convention: Convention, window: int, stride: int) -> None:
        self._text = text
        self._windows = windows_of(text.ids_T.size, convention, window, stride)
        if not self._windows or self._windows[0].end < 2:
            raise DataError(
                f"--text {text.name} has {text.ids_T.size} tokens, too few to score "
                + (f"a block of {window}; lower --window, or leave out --blocks" if convention == "blocks" else "one")
            )
        self.what = f"perplexity of {text.name}"
        self.num_sequences = len(self._windows)
        self.max_tokens = window

    @property
    def num_scored(self) -> int:
        """Tokens that are scored."""
        return sum(window.end - window.first for window in self._windows)

    @property
    def num_bytes(self) -> int | None:
        """UTF-8 bytes of exactly those tokens."""
        sizes = self._text.bytes_T
        return None if sizes is None else sum(int(sizes[w.first : w.end].sum()) for w in self._windows)

    def summary(self) -> str:
        """One line that says what is counted."""
        size = "" if self.num_bytes is None else f", {self.num_bytes:,} bytes"
        return f"{self._text.name}: {self.num_scored:,} of {self._text.ids_T.size:,} tokens scored{size}"

    def measure(self, model: Answerer, on_done: OnDone | None = None) -> Measured:
        """See `Measurement`. Each window is a row of the sample behind the standard errors."""
        ids_T = self._text.ids_T
        pairs = [(ids_T[w.begin : w.first], ids_T[w.first : w.end]) for w in self._windows]
        nats = [-found.total for found in model.likelihoods(pairs, on_done)]
        tokens = [w.end - w.first for w in self._windows]
        rows = RowValues(
            row_ids=tuple(f"tokens {w.first}-{w.end - 1}" for w in self._windows),
            values_R=np.array(nats, np.float64),
            weights_R=np.array(tokens, np.float64),
        )
        (perplexity, perplexity_error), error = rows.perplexity, rows.standard_error
        name = self._text.name
        measures = {f"{name} perplexity": Measure(value=perplexity, se=perplexity_error, is_share=False)}
        if self.num_bytes:
            tokens_per_byte = self.num_scored / self.num_bytes / math.log(2)  # and bits per nat
            measures[f"{name} bits/byte"] = Measure(
                value=rows.mean * tokens_per_byte, se=None if error is None else error * tokens_per_byte, is_share=False
            )
        return Measured(measures=measures, rows={f"{name} nats": rows})


def _bytes_of_tokens(text: str, starts: Sequence[int]) -> np.ndarray:
    """UTF-8 bytes from where each token starts to where the next one does; they add up to the whole text's.

    Tokens that share a character start at the same place: its bytes count for the last of them.
    """
    code_points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    sizes = 1 + sum((code_points >= limit).astype(np.int64) for limit in (0x80, 0x800, 0x10000))
    ends = np.concatenate([[0], np.cumsum(sizes)])
    borders = np.array([0, *starts[1:], len(text)])
    return np.diff(ends[borders])


def _open(path: Path) -> Any:
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


def _row_texts(path: Path, column: str) -> Iterator[str]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"--text {path}, line {number} is not JSON: {error}") from error
            if not isinstance(row, dict) or not isinstance(row.get(column), str):
                there = ", ".join(row) if isinstance(row, dict) else "no columns"
                raise DataError(
                    f"--text {path}, line {number} has no text in column {column!r}; it has {there}: name one with "
                    "--text-column"
                )
            yield row[column]


def _parquet_texts(path: Path, column: str) -> list[str]:
    import pyarrow.parquet as parquet
    from pyarrow import ArrowInvalid

    try:
        names = parquet.read_schema(path).names
    except ArrowInvalid as error:
        raise DataError(f"--text {path} is no Parquet file: {error}") from error
    if column not in names:
        raise DataError(
            f"--text {path} has no column {column!r}; it has {', '.join(names)}: name one with --text-column"
        )
    texts = parquet.read_table(path, columns=[column])[column].to_pylist()
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise DataError(
                f"--text {path}, row {number} has no text in column {column!r} but {text!r}; leave such rows out, or name "
                "another column with --text-column"
            )
    return texts
