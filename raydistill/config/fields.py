"""Which fields the configuration tree has, what each one accepts, and what a mistyped name probably meant.

Everything here is derived from the schema of `config.Config`, so a new field needs no second entry.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any

from raydistill.config.schema import Config

UNSET_WORDS = ("none", "null")
"""What a file (as a string) or a command line writes to unset an optional field; TOML itself has no null."""

ALIASES: Mapping[str, tuple[str, ...]] = {
    "lambda": ("objective.on_policy_fraction",),
    "lmbda": ("objective.on_policy_fraction",),
    "on_policy": ("objective.on_policy_fraction",),
    "kl": ("objective.beta",),
    "lr": ("trainer.learning_rate",),
    "steps": ("trainer.num_steps",),
    "max_steps": ("trainer.num_steps",),
    "epochs": ("trainer.num_steps",),
    "num_epochs": ("trainer.num_steps",),
    "num_train_epochs": ("trainer.num_steps",),
    "batch_size": ("trainer.sequences_per_step", "trainer.sequences_per_micro_batch"),
    "train_batch_size": ("trainer.sequences_per_step",),
    "global_batch_size": ("trainer.sequences_per_step",),
    "gradient_accumulation_steps": ("trainer.sequences_per_step", "trainer.sequences_per_micro_batch"),
    "micro_batch_size": ("trainer.sequences_per_micro_batch",),
    "per_device_train_batch_size": ("trainer.sequences_per_micro_batch",),
    "warmup": ("trainer.warmup_fraction",),
    "warmup_ratio": ("trainer.warmup_fraction",),
    "warmup_steps": ("trainer.warmup_fraction",),
    "grad_clip": ("trainer.max_grad_norm",),
    "workers": ("trainer.num_workers",),
    "world_size": ("trainer.num_workers",),
    "zero": ("trainer.zero_stage",),
    "r": ("adapter.rank",),
    "lora_r": ("adapter.rank",),
    "lora_rank": ("adapter.rank",),
    "lora_alpha": ("adapter.alpha",),
    "lora_dropout": ("adapter.dropout",),
    "target_modules": ("adapter.targets",),
    "bits": ("quant.format",),
    "num_bits": ("quant.format",),
    "groupsize": ("quant.group_size",),
    "zero_point": ("quant.symmetric",),
    "k": ("objective.top_k",),
    "max_tokens": ("rollout.max_new_tokens",),
    "max_seq_length": ("data.max_length",),
    "max_seq_len": ("data.max_length",),
    "max_model_len": ("data.max_length",),
    "dataset": ("data.path",),
    "tp": ("rollout.tensor_parallel_size",),
    "staleness": ("sync.max_staleness",),
    "output_dir": ("run.output",),
}
"""Names that other programs give to our fields."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigField:
    """One leaf of the configuration tree, as the schema describes it."""

    name: str
    """Dotted: `trainer.learning_rate`."""
    description: str
    default: Any
    """As TOML and JSON would write it; None where the field is unset."""
    schema: Mapping[str, Any]
    options: tuple[Mapping[str, Any], ...]
    """The alternatives of the schema without `null`; one, for most fields."""
    is_optional: bool

    @property
    def is_bool(self) -> bool:
        return self.options[0].get("type") == "boolean"

    @property
    def is_list(self) -> bool:
        return self.options[0].get("type") == "array"

    @property
    def is_table(self) -> bool:
        return self.options[0].get("type") == "object"

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values of a Literal, or () where the field is more than a Literal."""
        return tuple(value for option in self.options for value in _choices(option))

    @property
    def takes_text(self) -> bool:
        """Whether any text is a value (so that `5` on the command line stays text)."""
        return any(option.get("type") == "string" and not _choices(option) for option in self.options)

    @property
    def allowed(self) -> str:
        """What the field accepts, in words: `a whole number, at least 1`."""
        words = " or ".join(_describe(option) for option in self.options)
        return f"{words}, or none" if self.is_optional else words


def _choices(option: Mapping[str, Any]) -> tuple[Any, ...]:
    return (option["const"],) if "const" in option else tuple(option.get("enum", ()))


def _describe(option: Mapping[str, Any]) -> str:
    if choices := _choices(option):
        words = ", ".join(json.dumps(value) for value in choices)
        return words if len(choices) == 1 else f"one of {words}"
    kind = option.get("type")
    if kind == "array":
        if "prefixItems" in option:
            return f"a list of {len(option['prefixItems'])}, each {_describe(option['prefixItems'][0])}"
        return "a list of strings"
    if kind == "object":
        return "a table"
    words = {"string": "text", "integer": "a whole number", "number": "a number", "boolean": "true or false"}[str(kind)]
    if option.get("format") == "path":
        words = "a path"
    if "minimum" in option and "maximum" in option:
        return f"{words} from {option['minimum']:g} to {option['maximum']:g}"
    bounds = [
        f"{text} {option[key]:g}"
        for key, text in (
            ("minimum", "at least"),
            ("exclusiveMinimum", "above"),
            ("maximum", "at most"),
            ("exclusiveMaximum", "below"),
        )
        if key in option
    ]
    return ", ".join([words, " and ".join(bounds)]) if bounds else words


@cache
def config_fields() -> Mapping[str, ConfigField]:
    """Every field by its dotted name, in the order of the schema."""
    schema = Config.model_json_schema()
    defaults = Config().model_dump(mode="json")
    fields: dict[str, ConfigField] = {}
    for section, reference in schema["properties"].items():
        properties = schema["$defs"][reference["$ref"].rpartition("/")[2]]["properties"]
        for leaf, spec in properties.items():
            options = [option for option in spec.get("anyOf", [spec]) if option.get("type") != "null"]
            fields[f"{section}.{leaf}"] = ConfigField(
                name=f"{section}.{leaf}",
                description=spec.get("description", ""),
                default=defaults[section][leaf],
                schema=spec,
                # A bound of an optional number stands outside its `anyOf`.
                options=tuple({**_bounds(spec), **option} for option in options),
                is_optional=len(options) < len(spec.get("anyOf", [spec])),
            )
    return fields


def _bounds(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {key: spec[key] for key in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum") if key in spec}


@cache
def config_sections() -> tuple[str, ...]:
    """The names of the sections, in the order of the schema."""
    return tuple(Config.model_fields)


def nearest_fields(name: str) -> list[str]:
    """The fields that an unknown dotted name probably meant, best first, at most three.

    Tried in this order, the first that finds something wins: other spelling (`learning-rate`), the same last part in
    another section, the name that other programs use (`lr`), similar letters.
    """
    fields = list(config_fields())
    name = name.lower().replace("-", "_")
    section, _, leaf = name.rpartition(".")
    if name in fields:
        return [name]
    if same_leaf := [field for field in fields if field.rpartition(".")[2] == leaf]:
        return _closest_section_first(section, same_leaf)[:3]
    if leaf in ALIASES:
        return list(ALIASES[leaf])
    within = [field for field in fields if field.startswith(f"{section}.")]
    if similar := get_close_matches(name, within, n=2, cutoff=0.75):
        return similar
    leaves = {field.rpartition(".")[2] for field in fields}
    if similar := get_close_matches(leaf, leaves, n=1, cutoff=0.75):
        same_leaf = [field for field in fields if field.rpartition(".")[2] == similar[0]]
        return _closest_section_first(section, same_leaf)[:3]
    return get_close_matches(name, fields, n=2, cutoff=0.7)


def _closest_section_first(section: str, names: Iterable[str]) -> list[str]:
    close = get_close_matches(section, config_sections(), n=1, cutoff=0.6)
    return sorted(names, key=lambda name: name.partition(".")[0] not in close)


def did_you_mean(names: Iterable[str], otherwise: str) -> str:
    """The end of an error message: the nearest names, or where to look them up."""
    offers = " or ".join(f"`{name}`" for name in names)
    return f"did you mean {offers}?" if offers else otherwise
