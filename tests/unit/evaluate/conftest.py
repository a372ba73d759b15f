"""A tiny world: a real tokenizer, two random models that share it, and rows of arithmetic stories."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from raydistill.data.encode import Example
from raydistill.data.rows import read_rows
from raydistill.demo.stories import Story, generate_stories
from raydistill.demo.tokenizer import train_tokenizer
from raydistill.evaluate.rows import file_section

STORIES = list(islice(generate_stories("test", 0), 24))


def make_model(tokenizer: Any, seed: int, tied: bool = True, vocab_size: int | None = None) -> Qwen3ForCausalLM:
    """Random weights far from initialisation, so that distributions are not all alike."""
    config = Qwen3Config(
        vocab_size=vocab_size or len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=256,
        tie_word_embeddings=tied, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, dtype="float32",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config).float()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def write_rows(path: Path, stories: Sequence[Story] = STORIES) -> Path:
    path.write_text("".join(json.dumps(story.chat_row()) + "\n" for story in stories))
    return path


@dataclass(frozen=True)
class TinyWorld:
    tokenizer: Any
    teacher: Path
    other: Path  # other weights, same tokenizer
    rows: Path
    examples: tuple[Example, ...]


def save(model: Any, tokenizer: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    from raydistill.data.encode import encode_rows

    folder = tmp_path_factory.mktemp("tiny_world")
    tokenizer = train_tokenizer([f"{s.prompt}\n{s.answer}" for s in STORIES], vocab_size=320)
    rows = write_rows(folder / "rows.jsonl")
    return TinyWorld(
        tokenizer=tokenizer,
        teacher=save(make_model(tokenizer, 1), tokenizer, folder / "teacher"),
        other=save(make_model(tokenizer, 2), tokenizer, folder / "other"),
        rows=rows,
        examples=encode_rows(read_rows(rows).rows, tokenizer, file_section(256)),
    )


@pytest.fixture
def teacher(world: TinyWorld) -> Qwen3ForCausalLM:
    return make_model(world.tokenizer, 1)


@pytest.fixture
def other(world: TinyWorld) -> Qwen3ForCausalLM:
    return make_model(world.tokenizer, 2)


@pytest.fixture
def parrot(world: TinyWorld) -> Qwen3ForCausalLM:
    """A model that answers every prompt with `#### 7`: its layers add nothing, its head maps each token to the next."""
    tokenizer = world.tokenizer
    model = make_model(tokenizer, 3, tied=False)
    chain = tokenizer.encode("\n#### 7<|im_end|>", add_special_tokens=False)
    assert len(set(chain)) == len(chain), "the chain needs different tokens"
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.norm.weight.fill_(1.0)
        embeddings = torch.nn.functional.normalize(torch.randn(model.model.embed_tokens.weight.shape), dim=1)
        model.model.embed_tokens.weight.copy_(embeddings)
        model.lm_head.weight.zero_()
        for token, following in pairwise(chain):
            model.lm_head.weight[following] = 10 * embeddings[token]
    return model
