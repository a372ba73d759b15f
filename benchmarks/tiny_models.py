"""Tiny random models of the tested architectures, with the tokenizer and the rows of the demo's world.

`make_world` writes rows and a tokenizer once; `write_model` writes a model folder of one architecture. head_dim is 32, the
smallest that vLLM's CPU attention serves. Used by benchmarks/architectures.py and by the tests of architectures.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

VOCAB_SIZE = 448  # of the tokenizer
PADDED_VOCAB_SIZE = 512  # of the Llama's embedding and head: ids from 448 on mean nothing
SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 256, "dtype": "float32", "bos_token_id": None,
}  # fmt: skip
NOISE = 0.15
"""Added to initial weights, so that next-token distributions are not all alike and quantization loses something."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """A tokenizer and chat rows, without a model."""

    tokenizer: Any
    train_path: Path
    validation_path: Path


def make_world(folder: Path, num_train: int = 400, num_validation: int = 24) -> Rows:
    """Arithmetic stories and a tokenizer trained on them, in `folder`."""
    from raydistill.demo.stories import write_splits
    from raydistill.demo.tokenizer import train_tokenizer

    paths = write_splits(folder, num_train, num_validation, 1)
    with paths.train.open(encoding="utf-8") as lines:
        chats = [json.loads(line)["messages"] for line in islice(lines, num_train)]
    texts = [message["content"] for chat in chats for message in chat]
    tokenizer = train_tokenizer(texts, VOCAB_SIZE, SHAPE["max_position_embeddings"])
    return Rows(tokenizer=tokenizer, train_path=paths.train, validation_path=paths.validation)


def qwen3(**common: Any) -> Any:
    """Norms on queries and keys, tied head."""
    from transformers import Qwen3Config

    return Qwen3Config(**common, num_hidden_layers=2, tie_word_embeddings=True)


def llama(**common: Any) -> Any:
    """Untied head, grouped-query attention, a vocabulary that is padded beyond the tokenizer's."""
    from transformers import LlamaConfig

    common["vocab_size"] = PADDED_VOCAB_SIZE
    return LlamaConfig(**common, num_hidden_layers=2, tie_word_embeddings=False)


def gemma3(**common: Any) -> Any:
    """Sliding-window and global layers, norms before and after each block, scaled embeddings, tied head.

    The window is shorter than most rows, so that it decides what is computed.
    """
    from transformers import Gemma3TextConfig

    layers = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    return Gemma3TextConfig(
        **common,
        num_hidden_layers=len(layers),
        layer_types=layers,
        sliding_window=32,
        query_pre_attn_scalar=common["head_dim"],
        tie_word_embeddings=True,
    )


ARCHITECTURES: dict[str, Callable[..., Any]] = {"qwen3": qwen3, "llama": llama, "gemma3": gemma3}


def write_model(architecture: str, tokenizer: Any, folder: Path, seed: int = 0) -> Path:
    """A random model with its tokenizer; the same weights for the same seed."""
    import torch
    from transformers import AutoModelForCausalLM

    config = ARCHITECTURES[architecture](
        **SHAPE,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(NOISE * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))
    return folder
