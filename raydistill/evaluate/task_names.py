"""Which tasks lm-eval brings, and where each one's definition lies; found without importing lm-eval.

lm-eval's own index parses its 14,000 files, which takes 20 seconds; here only their names are read, which takes one.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from raydistill.errors import UserError

_NAMED = re.compile(r"^[\"']?(task|group|tag)[\"']?:[ \t]*(.*(?:\n[ \t]*-[ \t]*\S+)*)", re.MULTILINE)
_SEPARATOR = re.compile(r"\n[ \t]*-")
Places = Mapping[str, list[Path]]
"""Name of a task, group or tag -> the files that define it or belong to it."""


@cache
def bundled_names() -> Places:
    """What the installed lm-eval brings."""
    package = importlib.util.find_spec("lm_eval")
    if package is None or not package.submodule_search_locations:
        raise UserError("--tasks runs lm-eval, which is not installed here; install the pinned packages (make setup)")
    found: dict[str, list[Path]] = {}
    for path in sorted((Path(package.submodule_search_locations[0]) / "tasks").rglob("*.yaml")):
        for name in _names_in(path.read_text(encoding="utf-8", errors="replace")):
            found.setdefault(name, []).append(path)
    return found


def names_under(folder: Path) -> Places:
    """What the YAML files of a folder of your own define; UserError for one that is no YAML."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Takes no notice of lm-eval's !function."""

    Loader.add_multi_constructor("", lambda *_: None)
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*.yaml")):
        try:
            config = yaml.load(path.read_text(encoding="utf-8"), Loader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
        for name in _defined(config) if isinstance(config, dict) else ():
            found.setdefault(name, []).append(path)
    return found


def _defined(config: Mapping[str, Any]) -> Iterator[str]:
    tags = config.get("tag") or []
    yield from [tags] if isinstance(tags, str) else tags
    # a group lists its members where a task has its name
    yield from (name for name in (config.get("group"), config.get("task")) if isinstance(name, str))


def _names_in(text: str) -> Iterator[str]:
    """The same of a file in the form that lm-eval's own have."""
    for key, value in _NAMED.findall(text):
        names = [name.strip().strip("\"'") for name in _SEPARATOR.split(value)]
        if key == "tag" or len(names) == 1:
            yield from (name for name in names if name and " " not in name)


def check_names(names: Iterable[str], known: Places) -> None:
    """UserError with the nearest name for one that is not known."""
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "`lm_eval ls tasks` lists them"
            raise UserError(f"lm-eval has no task {name!r}; {hint}")


def folders_of(names: Iterable[str], known: Places) -> list[Path]:
    """The folders that define these names, each once."""
    return sorted({path.parent for name in names for path in known[name]})
