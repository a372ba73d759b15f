"""Tiny random models and students for the tests of the quant room; tests/conftest.py hands them on as `tiny`."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen3Config,
)

from raydistill.quant.formats import WeightFormat
from raydistill.quant.student import (
    LoraSettings,
    Mode,
    adapter_state,
    load_adapter_state,
    other_trained,
    prepare_student,
    rebuild_weight,
)

SHAPE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 64, "vocab_size": 61, "max_position_embeddings": 64, "dtype": "float32",
}  # fmt: skip
TARGETS = ("q_proj", "v_proj", "o_proj", "down_proj")
LORA = LoraSettings(rank=4, alpha=8, targets=TARGETS)
INT2 = WeightFormat(bits=2, group_size=16, symmetric=False, scale="searched")
INT4 = WeightFormat(bits=4, group_size=32, symmetric=True, scale="absmax")
FAMILIES: dict[str, PretrainedConfig] = {
    "qwen3": Qwen3Config(**SHAPE, tie_word_embeddings=True),
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=False, attention_bias=True),
    "gemma3": Gemma3TextConfig(**SHAPE, tie_word_embeddings=True, sliding_window=16),
}


def rebuilt_weights(
    base_weights: Mapping[str, torch.Tensor],
    adapter: Mapping[str, torch.Tensor],
    fmt: WeightFormat | None,
    scaling: float,
    mode: Mode,
) -> dict[str, torch.Tensor]:
    """What an engine of one rank writes into its model, by parameter name."""
    weights = {
        f"{name}.weight": rebuild_weight(name, weight, adapter, fmt, scaling, mode)
        for name, weight in base_weights.items()
    }
    return weights | (dict(other_trained(base_weights, adapter)) if mode == "none" else {})


class Tiny:
    """Model families, formats and adapters small enough for a unit test."""

    families = tuple(FAMILIES)
    lora = LORA
    int2 = INT2
    int4 = INT4
    rebuilt_weights = staticmethod(rebuilt_weights)

    @staticmethod
    def model(family: str = "qwen3", dtype: torch.dtype = torch.float32) -> nn.Module:
        """The same weights at every call; moved from their initial values, so that logits are not all alike."""
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(FAMILIES[family], dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model.eval()

    @staticmethod
    def randomize_adapter(model: nn.Module, seed: int = 3) -> None:
        """A fresh adapter has B = 0, which would hide a wrong product."""
        generator = torch.Generator().manual_seed(seed)
        state = adapter_state(model)
        noise = {key: value + 0.1 * torch.randn(value.shape, generator=generator) for key, value in state.items()}
        load_adapter_state(model, noise)

    @classmethod
    def student(cls, mode: Mode, fmt: WeightFormat | None = INT2, family: str = "qwen3", **kwargs: Any) -> nn.Module:
        """A student whose adapter is not zero."""
        model = cls.model(family, **kwargs)
        student = prepare_student(model, fmt, mode, None if mode == "none" else LORA)
        cls.randomize_adapter(student)
        return student

    @staticmethod
    def ids() -> torch.Tensor:
        return torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1))

    @classmethod
    def logits(cls, model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(cls.ids()).logits
