"""Running text: which tokens are scored, with what before them, and how many bytes they are."""

import copy
import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from tokenizers.processors import TemplateProcessing

from raydistill.errors import DataError
from raydistill.evaluate.answerers import HfAnswerer
from raydistill.evaluate.text import TextPerplexity, read_text, tokenize, windows_of

from .conftest import STORIES

TEXT = "\n\n".join(f"{story.prompt}\n{story.answer}" for story in STORIES[:4])


def measured(model: Any, tokenizer: Any, text: str, convention: str, window: int, stride: int) -> Any:
    measurement = TextPerplexity(tokenize("t", text, tokenizer), convention, window, stride)  # type: ignore[arg-type]
    return measurement, measurement.measure(HfAnswerer(model, tokenizer, [2], 256))


def nats(model: Any, ids: np.ndarray) -> np.ndarray:
    """-log-prob of every token but the first, in float64, from one unpadded pass."""
    with torch.no_grad():
        logits = model.double()(input_ids=torch.from_numpy(ids).long()[None]).logits[0, :-1]
    logprobs = torch.log_softmax(logits, -1).gather(1, torch.from_numpy(ids[1:]).long()[:, None])[:, 0]
    model.float()
    return -logprobs.numpy()


@pytest.mark.parametrize("num_tokens", [2, 7, 8, 9, 20, 101])
@pytest.mark.parametrize(("window", "stride"), [(8, 4), (8, 7), (8, 1), (5, 3), (200, 100)])
def test_sliding_windows_score_every_token_but_the_first_exactly_once(num_tokens, window, stride):
    windows = windows_of(num_tokens, "sliding", window, stride)
    scored = [token for w in windows for token in range(w.first, w.end)]
    assert scored == list(range(1, num_tokens))
    assert all(w.end - w.begin <= window for w in windows)
    # behind the first window every token sees at least what the windows share
    assert all(w.first - w.begin >= window - stride for w in windows[1:])


def test_blocks_lie_side_by_side_and_leave_out_their_first_tokens_and_a_shorter_one_at_the_end():
    assert [(w.begin, w.first, w.end) for w in windows_of(11, "blocks", 4, 1)] == [(0, 1, 4), (4, 5, 8)]
    assert windows_of(3, "blocks", 4, 1) == []


def test_a_text_that_fits_one_window_is_scored_by_one_full_pass(world, other):
    measurement, found = measured(other, world.tokenizer, TEXT[:120], "sliding", 256, 128)
    ids = np.array(world.tokenizer.encode(TEXT[:120], add_special_tokens=False))
    losses = nats(other, ids)
    assert measurement.num_scored == len(ids) - 1
    assert found.measures["t perplexity"]["value"] == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    assert found.measures["t perplexity"]["se"] is None  # one window is no sample


def test_each_window_counts_with_its_own_context(world, other):
    """By hand: ids 0-9 | 5-14 | 10-19, of which 1-9, 10-14 and 15-19 are scored."""
    ids = np.array(world.tokenizer.encode(TEXT, add_special_tokens=False))[:20]
    text = world.tokenizer.decode(ids)
    assert world.tokenizer.encode(text, add_special_tokens=False) == ids.tolist()
    measurement, found = measured(other, world.tokenizer, text, "sliding", 10, 5)
    parts = [nats(other, ids[:10]), nats(other, ids[5:15])[4:], nats(other, ids[10:20])[4:]]
    assert [len(part) for part in parts] == [9, 5, 5]
    total = np.concatenate(parts)
    assert measurement.num_scored == 19
    assert found.measures["t perplexity"]["value"] == pytest.approx(math.exp(total.mean()), rel=1e-5)
    size = len(text.encode()) - len(world.tokenizer.decode(ids[:1]).encode())
    assert measurement.num_bytes == size
    assert found.measures["t bits/byte"]["value"] == pytest.approx(total.sum() / math.log(2) / size, rel=1e-5)
    rows = found.rows["t nats"]
    np.testing.assert_allclose(rows.values_R, [part.sum() for part in parts], rtol=1e-5)
    assert found.measures["t perplexity"]["se"] == pytest.approx(math.exp(rows.mean) * rows.standard_error)


def test_blocks_are_the_mean_over_independent_blocks(world, other):
    ids = np.array(world.tokenizer.encode(TEXT, add_special_tokens=False))
    blocks = [ids[start : start + 16] for start in range(0, len(ids) - 15, 16)]
    measurement, found = measured(other, world.tokenizer, TEXT, "blocks", 16, 1)
    expected = math.exp(np.mean([nats(other, block).mean() for block in blocks]))
    assert measurement.num_scored == 15 * len(blocks)
    assert found.measures["t perplexity"]["value"] == pytest.approx(expected, rel=1e-5)


def test_a_model_that_knows_nothing_has_a_perplexity_of_its_vocabulary(world, teacher):
    torch.nn.init.zeros_(teacher.model.norm.weight)  # logits are all 0
    _, found = measured(teacher, world.tokenizer, TEXT, "sliding", 32, 16)
    assert found.measures["t perplexity"]["value"] == pytest.approx(teacher.config.vocab_size, rel=1e-4)


def test_a_tokenizer_with_a_begin_of_sequence_token_has_every_token_of_the_text_scored(world, other):
    tokenizer = copy.deepcopy(world.tokenizer)
    tokenizer.bos_token = "<|im_start|>"
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
    )
    plain = tokenize("t", "ab 12", world.tokenizer)
    text = tokenize("t", "ab 12", tokenizer)
    assert text.ids_T.tolist() == [bos, *plain.ids_T.tolist()]
    measurement = TextPerplexity(text, "sliding", 64, 32)
    assert (measurement.num_scored, measurement.num_bytes) == (len(plain.ids_T), 5)
    alone = TextPerplexity(plain, "sliding", 64, 32)
    assert alone.num_scored == len(plain.ids_T) - 1
    found = measurement.measure(HfAnswerer(other, tokenizer, [2], 256))
    assert found.rows["t nats"].values_R.sum() == pytest.approx(nats(other, text.ids_T).sum(), rel=1e-5)


@pytest.mark.parametrize("text", ["plain 12", "naïve €5 \U0001f600 end", "\n\n  spaces \t", "日本語のテキスト"])
def test_bytes_of_the_tokens_add_up_to_the_text(world, text):
    tokens = tokenize("t", text, world.tokenizer)
    assert tokens.bytes_T is not None
    assert tokens.bytes_T.sum() == len(text.encode())
    assert (tokens.bytes_T >= 0).all()


def test_texts_of_a_file_are_joined_by_a_blank_line(tmp_path: Path) -> None:
    texts = ["one\n", "", "zwei ü"]
    rows = "".join(json.dumps({"text": text, "body": "x"}) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text(rows)
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(rows.encode()))
    parquet.write_table(pa.table({"text": texts}), tmp_path / "c.parquet")
    (tmp_path / "d.txt").write_text("\n\n".join(texts))
    assert {read_text(tmp_path / name, "text") for name in ("a.jsonl", "b.json.gz", "c.parquet", "d.txt")} == {
        "one\n\n\n\n\nzwei ü"
    }
    assert read_text(tmp_path / "a.jsonl", "body") == "x\n\nx\n\nx"


def test_each_file_without_text_is_refused_in_one_line(world: Any, tmp_path: Path) -> None:
    files = {
        "holds no text": ("empty.txt", b" \n\n"),
        "line 2 has no text in column 'text'; it has body: name one with --text-column": (
            "rows.jsonl",
            b'{"text": "a"}\n{"body": "b"}\n',
        ),
        "line 1 is not JSON": ("bad.jsonl", b"oh\n"),
        "is no Parquet file": ("bad.parquet", b"oh"),
        "cannot be read": ("latin.txt", b"\xff\xfe\xfa"),
        "cannot be read: 'utf-8' codec can't encode": ("half.jsonl", b'{"text": "\\ud800"}\n'),
    }
    for message, (name, content) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError) as error:
            read_text(tmp_path / name, "text")
        assert message in str(error.value) and "\n" not in str(error.value)
    for value, kind in ((None, pa.string()), (3, pa.int64())):
        parquet.write_table(pa.table({"text": pa.array([value], kind)}), tmp_path / "odd.parquet")
        with pytest.raises(DataError, match=f"row 1 has no text in column 'text' but {value}; leave such rows out"):
            read_text(tmp_path / "odd.parquet", "text")
    with pytest.raises(DataError, match="has 1 tokens, too few to score one"):
        TextPerplexity(tokenize("t", "1", world.tokenizer), "sliding", 8, 4)
    with pytest.raises(DataError, match="too few to score a block of 64; lower --window, or leave out --blocks"):
        TextPerplexity(tokenize("t", "1 2 3", world.tokenizer), "blocks", 64, 1)
