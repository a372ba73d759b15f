"""From `@file.toml` and `--section.field value` arguments to a validated `Config`, knowing where each value came from.

Every verb and every entry point calls `load_config` with its arguments. Files stack: each later file wins over the
earlier ones, a file's `extends` comes before the file itself, and command-line overrides win over all files. A table
(`data.template`, `results.tags`, `world.recipe`) is merged key by key with its default; `none` removes a key, empties
a table and unsets an optional field. Relative paths, in files too, are relative to the current directory.

All mistakes found are reported together, one line each, as one `ConfigError`.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from raydistill.config.fields import UNSET_WORDS, ConfigField, config_fields, config_sections
from raydistill.config.files import EXTENDS, ConfigFile, read_stack
from raydistill.config.problems import COMMAND_LINE, DEFAULT, describe_problem, unknown_field, unknown_section
from raydistill.config.schema import Config
from raydistill.errors import ConfigError

BOOL_WORDS = ("true", "false", "yes", "no", "on", "off", "1", "0", "t", "f", "y", "n")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedConfig:
    """A validated configuration and the origin of every value."""

    config: Config
    sources: Mapping[str, str]
    """Dotted field (`trainer.num_steps`, `results.tags.owner`) -> `configs/x.toml:12`, `command line` or `default`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Setting:
    """One value from one place, not yet validated. `key` is the entry of a table field."""

    field: str
    key: str | None
    value: Any
    source: str


@dataclass(slots=True)
class _Draft:
    """Settings applied so far, in order, and the problems met on the way."""

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def apply(self, setting: _Setting) -> None:
        name, value = setting.field, setting.value
        if not config_fields()[name].is_table:
            self.values[name], self.sources[name] = value, setting.source
            return
        if not isinstance(self.values.get(name), dict):
            self.values[name] = dict(config_fields()[name].default)
        table = self.values[name]
        self.sources[name] = setting.source  # of a table: the last place that changed it
        if setting.key is None:
            self.values[name] = {} if value is None else value
        elif value is None:
            table.pop(setting.key, None)
            self.sources[f"{name}.{setting.key}"] = setting.source
        else:
            table[setting.key] = value
            self.sources[f"{name}.{setting.key}"] = setting.source

    def tree(self) -> dict[str, dict[str, Any]]:
        """The nested form that `Config` validates."""
        nested: dict[str, dict[str, Any]] = {}
        for name, value in self.values.items():
            section, _, leaf = name.partition(".")
            nested.setdefault(section, {})[leaf] = value
        return nested


def load_config(args: Sequence[str]) -> LoadedConfig:
    """Read `@file.toml` and `--section.field value` arguments; raise one `ConfigError` that lists every mistake."""
    draft = _Draft()
    files = [arg for arg in args if arg.startswith("@")]
    for file in files:
        if file == "@":
            raise ConfigError("command line: `@` needs a file name right behind it, as in @configs/demo.toml")
        for config_file in read_stack(Path(file[1:])):
            for setting in _file_settings(config_file, draft.problems):
                draft.apply(setting)
    for setting in _override_settings([arg for arg in args if arg not in files], draft.problems):
        draft.apply(setting)
    return _validate(draft)


def with_values(config: Config, values: Mapping[str, Any], source: str) -> Config:
    """The config with some dotted fields set anew, checked as a whole; ConfigError says that they came from `source`."""
    draft = _Draft()
    for section, fields in config.model_dump().items():
        for leaf, value in fields.items():
            draft.values[f"{section}.{leaf}"] = value
    for name, value in values.items():
        section, _, rest = name.partition(".")
        leaf, _, key = rest.partition(".")
        if f"{section}.{leaf}" not in config_fields():
            draft.problems.append(unknown_field(source, name))
        else:
            draft.apply(_Setting(field=f"{section}.{leaf}", key=key or None, value=_unset(value), source=source))
    return _validate(draft).config


def require_inputs(config: Config) -> None:
    """Refuse a configuration that names no model or no data: the two things without a default."""
    if config.world.name != "none":
        return
    problems = []
    if config.student.model is None:
        problems.append("student.model is not set; give --student.model <folder or hub id>, or --world.name stories")
    if config.data.path is None:
        problems.append("data.path is not set; give --data.path <rows.jsonl>, or --world.name stories")
    if problems:
        raise ConfigError("\n".join(problems))


def _file_settings(file: ConfigFile, problems: list[str]) -> Iterator[_Setting]:
    for section, fields in file.tables.items():
        if section == EXTENDS:
            continue
        if section not in config_sections():
            problems.extend(unknown_section(file, section, fields))
        elif not isinstance(fields, dict):
            problems.append(f"{file.where(section)}: `{section}` is a section, not a value; write [{section}]")
        else:
            for leaf, value in fields.items():
                yield from _file_field(file, section, leaf, value, problems)


def _file_field(file: ConfigFile, section: str, leaf: str, value: object, problems: list[str]) -> Iterator[_Setting]:
    name, where = f"{section}.{leaf}", file.where(section, leaf)
    spec = config_fields().get(name)
    if spec is None:
        problems.append(unknown_field(where, name))
    elif spec.is_table and isinstance(value, dict):
        for key, entry in value.items():
            yield _Setting(field=name, key=key, value=_unset(entry), source=file.where(section, leaf, key))
    elif isinstance(value, dict):
        problems.append(f"{where}: `{name}` is a single value, not a table; it takes {spec.allowed}")
    else:
        value = _unset(value) if spec.is_table or spec.is_optional else value
        yield _Setting(field=name, key=None, value=value, source=where)


def _unset(value: object) -> object:
    return None if isinstance(value, str) and value.lower() in UNSET_WORDS else value


def _override_settings(args: Sequence[str], problems: list[str]) -> Iterator[_Setting]:
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        if not arg.startswith("--") or arg == "--":
            advice = (
                f"for a config file write @{arg}" if arg.endswith(".toml") else "overrides are --section.field value"
            )
            problems.append(f"{COMMAND_LINE}: `{arg}` belongs to no option; {advice}")
            continue
        name, has_value, text = arg[2:].partition("=")
        section, _, leaf = name.partition(".")
        leaf, _, key = leaf.partition(".")
        spec = config_fields().get(f"{section}.{leaf}")
        is_flag = spec is not None and spec.is_bool
        if not has_value and rest and _is_value_of(rest[0], is_flag):
            has_value, text = "=", rest.pop(0)
        if spec is None or (key and not spec.is_table):
            problems.append(unknown_field(COMMAND_LINE, name))
        elif not has_value and not is_flag:
            problems.append(f"{COMMAND_LINE}: --{name} needs a value: {spec.allowed}")
        else:
            yield from _override(spec, key, text if has_value else "true", problems)


def _is_value_of(arg: str, is_flag: bool) -> bool:
    return arg.lower() in BOOL_WORDS if is_flag else not arg.startswith(("--", "@"))


def _override(spec: ConfigField, key: str, text: str, problems: list[str]) -> Iterator[_Setting]:
    if key:
        takes_text = spec.schema["additionalProperties"].get("type") == "string"
        value = None if text.lower() in UNSET_WORDS else _scalar(text, takes_text)
        yield _Setting(field=spec.name, key=key, value=value, source=COMMAND_LINE)
        return
    value = _parse(spec, text)
    if not spec.is_table or value is None:
        yield _Setting(field=spec.name, key=None, value=value, source=COMMAND_LINE)
    elif isinstance(value, dict):
        for entry, inner in value.items():
            yield _Setting(field=spec.name, key=entry, value=_unset(inner), source=COMMAND_LINE)
    else:
        problems.append(
            f"{COMMAND_LINE}: --{spec.name} is a table; write --{spec.name}.<key> <value> or --{spec.name} '{{...}}'"
        )


def _parse(spec: ConfigField, text: str) -> Any:
    """The value that a text means for this field; a text that fits nothing is left for the validation to refuse."""
    if text.lower() in UNSET_WORDS and (spec.is_optional or spec.is_table):
        return None
    if spec.is_list:
        if text.strip().startswith("["):
            return _structure(text)
        return [] if text.lower() in UNSET_WORDS else [part.strip() for part in text.split(",") if part.strip()]
    if spec.is_table:
        return _structure(text)
    if text in spec.choices:
        return text
    return _scalar(text, spec.takes_text)


def _structure(text: str) -> Any:
    """A list or table written as JSON or as TOML."""
    try:
        return json.loads(text)
    except ValueError:
        return _toml_value(text)


def _scalar(text: str, takes_text: bool) -> Any:
    value = _toml_value(text)
    if isinstance(value, str):  # text in quotes of its own, as '"none"'
        return value
    return value if isinstance(value, (bool, int, float)) and not takes_text else text


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _validate(draft: _Draft) -> LoadedConfig:
    problems = list(draft.problems)
    try:
        config = Config.model_validate(draft.tree())
    except ValidationError as error:
        # With a name unknown, a combination may look wrong only because its other half was left out.
        field_errors = [details for details in error.errors() if len(details["loc"]) >= 2]
        told = field_errors if problems else error.errors()
        problems += list(dict.fromkeys(describe_problem(details, draft.sources) for details in told))
    if problems:
        raise ConfigError("\n".join(problems))
    return LoadedConfig(config=config, sources=_all_sources(config, draft.sources))


def _all_sources(config: Config, given: Mapping[str, str]) -> dict[str, str]:
    sources: dict[str, str] = {}
    for name, spec in config_fields().items():
        sources[name] = given.get(name, DEFAULT)
        if spec.is_table:
            section, _, leaf = name.partition(".")
            for key in {**spec.default, **getattr(getattr(config, section), leaf)}:  # also what was removed
                sources[f"{name}.{key}"] = given.get(f"{name}.{key}", DEFAULT)
    return sources
