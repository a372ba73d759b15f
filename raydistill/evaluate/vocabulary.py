"""What a model's folder says about its inputs: what the token ids mean, and how many fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from raydistill.data.encode import Example
from raydistill.errors import ModelError
from raydistill.evaluate.targets import Target

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def check_vocabulary(target: Target, tokenizer: Any, examples: Sequence[Example]) -> None:
    """ModelError unless the model's ids are those of `tokenizer`. Ids that only one side has are padding."""
    size = int(AutoConfig.from_pretrained(target.folder).get_text_config().vocab_size)
    largest = max((int(max(e.prompt_ids.max(), e.reference_ids.max())) for e in examples), default=-1)
    if largest >= size:
        raise ModelError(
            f"{target.name} ({target.folder}) has a vocabulary of {size:,}, but the rows use id {largest:,}. "
            "Choose models that share a tokenizer"
        )
    if not has_tokenizer(target.folder):
        return
    mine = {i: token for token, i in AutoTokenizer.from_pretrained(target.folder).get_vocab().items()}
    theirs = {i: token for token, i in tokenizer.get_vocab().items()}
    shared = mine.keys() & theirs.keys()
    wrong = sorted(i for i in shared if mine[i] != theirs[i])
    if wrong or not shared:
        where = f", first at id {wrong[0]}: {theirs[wrong[0]]!r} vs {mine[wrong[0]]!r}" if wrong else ""
        raise ModelError(
            f"the rows' tokenizer and {target.name} ({target.folder}) disagree on {len(wrong):,} of {len(shared):,} "
            f"token ids{where}. Choose models that share a tokenizer"
        )


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder says what its token ids mean."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def positions_of(folder: Path) -> int:
    """Tokens of the longest sequence that a model knows; ModelError for a folder that is no model."""
    try:
        config = AutoConfig.from_pretrained(folder).get_text_config()
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} is no model: {str(error).strip().splitlines()[0]}") from error
    return int(getattr(config, "max_position_embeddings", None) or 2**31)
