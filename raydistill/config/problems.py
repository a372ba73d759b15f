"""What is said about a bad setting: one line each with its place, the field, the value and a way out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches

from pydantic_core import ErrorDetails

from raydistill.config.fields import ConfigField, config_fields, config_sections, did_you_mean, nearest_fields
from raydistill.config.files import ConfigFile

COMMAND_LINE = "command line"
DEFAULT = "default"
SEE_FIELDS = "`raydistill config --fields` lists them all"


def unknown_field(where: str, name: str) -> str:
    parent = ".".join(name.split(".")[:2])
    if parent != name and parent in config_fields():
        return f"{where}: unknown field `{name}`: `{parent}` takes {config_fields()[parent].allowed}, it has no parts"
    if name in config_sections():
        return f"{where}: `{name}` is a section; set one of its fields, as in --{name}.<field> <value>"
    return f"{where}: unknown field `{name}`; {did_you_mean(nearest_fields(name), SEE_FIELDS)}"


def unknown_section(file: ConfigFile, section: str, fields: object) -> Iterator[str]:
    """One line for a mistyped section; one per field where the fields themselves tell what was meant."""
    where = file.where(section)
    if not isinstance(fields, dict):
        yield f"{where}: unknown field `{section}`; {did_you_mean(nearest_fields(section), SEE_FIELDS)}"
        return
    near = [nearest_fields(f"{section}.{leaf}") for leaf in fields]
    homes = {names[0].partition(".")[0] for names in near if names}
    if len(homes) == 1 and all(names and names[0].partition(".")[2] in fields for names in near):
        yield f"{where}: unknown section `{section}`; {did_you_mean([f'[{homes.pop()}]'], SEE_FIELDS)}"
    elif not fields:
        yield f"{where}: unknown section `{section}`; the sections are {', '.join(config_sections())}"
    else:
        for leaf in fields:
            yield unknown_field(file.where(section, leaf), f"{section}.{leaf}")


def describe_problem(details: ErrorDetails, sources: Mapping[str, str]) -> str:
    """One line for one pydantic error: field, value, origin, what is allowed."""
    location = [str(part) for part in details["loc"]]
    if len(location) < 2:
        return _combination_problem(details["msg"].removeprefix("Value error, "), sources)
    name = ".".join(location[:2])
    spec = config_fields()[name]
    shown = ".".join(location[:3]) if spec.is_table else name
    where = sources.get(shown, sources.get(name, DEFAULT))
    allowed = "text in quotes, a number, true or false" if spec.is_table and len(location) > 2 else spec.allowed
    value = details["input"]
    near = did_you_mean(_near_choices(spec, value), "")
    default = "unset" if spec.default is None else json.dumps(spec.default)
    return (
        f"{where}: {shown}={json.dumps(value, default=str)} is not allowed; use {allowed} (default {default}; "
        f"{spec.description})" + (f"; {near}" if near else "")
    )


def _near_choices(spec: ConfigField, value: object) -> list[str]:
    texts = [str(choice) for choice in spec.choices]
    return get_close_matches(str(value).lower(), texts, n=1, cutoff=0.5)


def _combination_problem(message: str, sources: Mapping[str, str]) -> str:
    """The message of a validator of ours, with the origin of every field that it names."""
    named = [name for name in dict.fromkeys(re.findall(r"\b[a-z]+\.[a-z_]+\b", message)) if name in config_fields()]
    origins = [f"{name}: {sources.get(name, DEFAULT)}" for name in named]
    return f"{message} [{'; '.join(origins)}]" if origins else message
