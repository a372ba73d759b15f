"""Config files: TOML, stacked through `extends`, with the line of every key kept for error messages and sources.

tomllib reports no lines, so `key_lines` reads the text a second time, statement by statement.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from raydistill.errors import ConfigError

EXTENDS = "extends"

KeyPath = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFile:
    """One TOML file: its tables and the line on which each key stands."""

    path: Path
    tables: Mapping[str, Any]
    lines: Mapping[KeyPath, int]

    def where(self, *key: str) -> str:
        """`configs/x.toml:12` for a key, or for the table nearest to it."""
        while key and key not in self.lines:
            key = key[:-1]
        return f"{self.path}:{self.lines[key]}" if key else str(self.path)


def read_stack(path: Path) -> list[ConfigFile]:
    """A file and all that it extends, base first."""
    return list(_stack(path, asked_by=()))


def _stack(path: Path, asked_by: tuple[ConfigFile, ...]) -> Iterator[ConfigFile]:
    if any(path.resolve() == file.path.resolve() for file in asked_by):
        chain = " -> ".join(str(file.path) for file in asked_by)
        raise ConfigError(f"{asked_by[-1].where(EXTENDS)}: {chain} -> {path} extend each other; remove one `extends`")
    file = read_file(path, asked_by[-1].where(EXTENDS) if asked_by else "")
    bases = file.tables.get(EXTENDS, [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f'{file.where(EXTENDS)}: extends must be a file name or a list of them, as "base.toml"')
    for base in bases:
        yield from _stack(_tidy(path.parent / base), (*asked_by, file))
    yield file


def read_file(path: Path, asked_by: str = "") -> ConfigFile:
    """Read one TOML file; `asked_by` says which line named it."""
    path = _tidy(path.expanduser())
    prefix = f"{asked_by}: " if asked_by else ""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{prefix}config file {path} does not exist; {_nearest_file(path)}") from None
    except IsADirectoryError:
        raise ConfigError(f"{prefix}{path} is a folder; name one of its files: {_nearest_file(path / 'x')}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{prefix}{path} is not UTF-8 text (byte {error.start}); is it a TOML file?") from None
    except OSError as error:
        raise ConfigError(f"{prefix}config file {path} cannot be read: {error.strerror}") from None
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(prefix + _malformed(path, text, str(error))) from None
    return ConfigFile(path=path, tables=tables, lines=key_lines(text))


def key_lines(text: str) -> dict[KeyPath, int]:
    """The line (from 1) of every key and table of a valid TOML text."""
    found: dict[KeyPath, int] = {}
    header: KeyPath = ()
    statement, start = "", 0
    for number, line in enumerate(text.split("\n"), 1):
        start = start if statement else number
        statement += line + "\n"
        try:
            parsed = tomllib.loads(statement)
        except tomllib.TOMLDecodeError:
            continue  # a value that goes on in the next line
        keys = list(_key_paths(parsed))
        if statement.lstrip().startswith("["):
            header = max(keys, key=len)
            keys = [header[: end + 1] for end in range(len(header))]
        else:
            keys = [header + key for key in keys]
        for key in keys:
            found.setdefault(key, start)
        statement = ""
    return found


def _key_paths(value: object) -> Iterator[KeyPath]:
    if isinstance(value, list):  # [[table]]
        for item in value:
            yield from (path for path in _key_paths(item) if path)
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield (key,)
            yield from ((key, *path) for path in _key_paths(inner))


def _malformed(path: Path, text: str, reason: str) -> str:
    lines = text.splitlines() or [""]
    position = re.search(r" \(at (?:line (\d+), column (\d+)|end of document)\)$", reason)
    line = int(position[1]) if position and position[1] else len(lines)
    column = int(position[2]) if position and position[2] else len(lines[-1]) + 1
    reason = reason[: position.start()] if position else reason
    shown = lines[min(line, len(lines)) - 1].strip()
    advice = "; text needs quotes" if reason == "Invalid value" else ""
    return f"{path}:{line}:{column}: not valid TOML: {reason.lower()} in `{shown}`{advice}"


def _nearest_file(path: Path) -> str:
    """Offer existing config files: beside the path that was asked for, in the current folder, in configs/."""
    candidates: dict[str, Path] = {}
    for folder in (path.parent, Path("."), Path("configs")):
        for file in sorted(folder.glob("*.toml")):
            if file.name != "pyproject.toml":
                candidates.setdefault(file.name, file)
    name = path.name if path.suffix == ".toml" else f"{path.name}.toml"
    if close := get_close_matches(name, candidates, n=1, cutoff=0.5):
        return f"did you mean {candidates[close[0]]}?"
    if candidates:
        return "there are " + ", ".join(str(file) for file in list(candidates.values())[:6])
    return "name a TOML file, as in @configs/demo.toml"


def _tidy(path: Path) -> Path:
    """`configs/../base.toml` as `base.toml`, below the current folder without its absolute part."""
    absolute = Path(os.path.abspath(path))
    return absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else Path(os.path.normpath(path))
