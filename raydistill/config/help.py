"""The configuration in words: the resolved tree as TOML, a JSON schema for editors, a listing that teaches."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from raydistill.config.fields import UNSET_WORDS, ConfigField, config_fields, config_sections, did_you_mean
from raydistill.config.files import EXTENDS
from raydistill.config.load import LoadedConfig
from raydistill.config.schema import Config
from raydistill.errors import ConfigError

SOURCE_COLUMN_LIMIT = 56
"""A longer statement has its comment where it ends: one long list must not push all of them off the screen."""

UNSET = UNSET_WORDS[0]


def format_resolved(loaded: LoadedConfig) -> str:
    """The whole tree as TOML, each value with its origin as a comment; loading it again gives an equal `Config`."""
    tree = loaded.config.model_dump(mode="json")
    rows = [(name, statement) for name in config_fields() for name, statement in _statements(name, tree)]
    column = max(len(statement) for _, statement in rows if len(statement) <= SOURCE_COLUMN_LIMIT)
    lines: list[str] = []
    section = ""
    for name, statement in rows:
        if name.partition(".")[0] != section:
            section = name.partition(".")[0]
            lines += ["", f"[{section}]"] if lines else [f"[{section}]"]
        lines.append(f"{statement:<{column}}  # {loaded.sources.get(name, 'default')}")
    return "\n".join(lines) + "\n"


def _statements(name: str, tree: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """`field = value`; for a table one line per entry, and `none` for an entry of its default that was removed."""
    section, _, leaf = name.partition(".")
    value = tree[section][leaf]
    if not config_fields()[name].is_table:
        yield name, f"{leaf} = {_toml(value)}"
        return
    removed = {key: None for key in config_fields()[name].default if key not in value}
    for key, entry in {**value, **removed}.items():
        yield f"{name}.{key}", f"{leaf}.{_toml_key(key)} = {_toml(entry)}"


def _toml(value: Any) -> str:
    """A TOML value. JSON's strings are TOML's, but for the one control character that JSON does not escape."""
    if value is None:
        return json.dumps(UNSET)
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml(key)


def json_schema() -> dict[str, Any]:
    """A JSON schema of config files, for editors that complete and check TOML."""
    schema = Config.model_json_schema()
    for section, reference in schema["properties"].items():
        definition = schema["$defs"][reference["$ref"].rpartition("/")[2]]
        definition["title"] = section
        for leaf, spec in definition["properties"].items():
            field = config_fields()[f"{section}.{leaf}"]
            spec["title"] = field.name
            spec["default"] = UNSET if field.default is None else field.default
            # TOML has no null: files write "none".
            spec.update({"anyOf": [_without_null(option) for option in spec["anyOf"]]} if "anyOf" in spec else {})
    schema["properties"][EXTENDS] = {
        "title": EXTENDS,
        "description": "config file, or list of them, that this file builds on; paths relative to this file",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "raydistill configuration"}


def _without_null(option: Mapping[str, Any]) -> dict[str, Any]:
    return {"const": UNSET} if option.get("type") == "null" else dict(option)


def field_help(section: str | None = None) -> str:
    """Every field (of one section) with its default, what it means and what it accepts."""
    if section is not None and section not in config_sections():
        near = get_close_matches(section, config_sections(), n=1)
        raise ConfigError(
            f"unknown section `{section}`; {did_you_mean(near, 'the sections are ' + ', '.join(config_sections()))}"
        )
    blocks = []
    for name in [section] if section else config_sections():
        about = (Config.model_fields[name].annotation.__doc__ or "").strip()  # the section's class docstring
        fields = [field for field in config_fields().values() if field.name.startswith(f"{name}.")]
        blocks.append("\n".join([f"[{name}] {about}", *(_field_lines(field) for field in fields)]))
    return "\n\n".join(blocks) + "\n"


def _field_lines(field: ConfigField) -> str:
    text = f"{field.description}. Takes {field.allowed}."
    body = textwrap.fill(text, width=110, initial_indent="      ", subsequent_indent="      ")
    default = "{}" if field.default == {} else ("none" if field.default is None else _default_text(field.default))
    return f"  {field.name} = {default}\n{body}"


def _default_text(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_toml_key(key)} = {_toml(entry)}" for key, entry in value.items()) + " }"
    return _toml(value)
