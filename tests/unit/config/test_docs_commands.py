"""The commands that README and docs show take the settings that they show."""

import re
import shlex
from pathlib import Path

import pytest

from raydistill.config.load import load_config

ROOT = Path(__file__).parents[3]
COMMAND = re.compile(
    r"(?:raydistill (?:train|demo|plan|doctor|compare|sweep)|-m raydistill\.train|tune/sweep\.py) ([^`#]*)"
)


def commands(file: str) -> list[str]:
    """What stands behind each command of a page, lines that go on put together."""
    text = (ROOT / file).read_text(encoding="utf-8").replace("\\\n", " ")
    return [found.strip() for line in text.splitlines() for found in COMMAND.findall(line) if "..." not in found]


def settings_of(words: list[str]) -> list[str]:
    """Config files and `--section.field value`, without the command's own options; a user's own file is the demo's."""
    kept = []
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("@"):
            kept.append(f"@{ROOT}/configs/demo.toml" if word == "@mine.toml" else word.replace("@", f"@{ROOT}/", 1))
        elif re.match(r"--\w+\.\w", word):
            kept += [word] if "=" in word else [word, following]
    return kept


@pytest.mark.parametrize("file", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_every_command_of_the_pages_has_settings_that_load(file: str) -> None:
    for command in commands(file):
        settings = settings_of(shlex.split(command))
        base = [] if any(word.startswith("@") for word in settings) else [f"@{ROOT}/configs/demo.toml"]
        load_config([*base, *settings])


def test_commands_are_found() -> None:
    assert len(commands("README.md")) >= 8
    assert settings_of(["@mine.toml", "--seeds", "3", "--run.name", "x", "--run.output=y"]) == [
        f"@{ROOT}/configs/demo.toml", "--run.name", "x", "--run.output=y",
    ]  # fmt: skip
