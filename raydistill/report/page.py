"""What HTML pages are made of: templates, pictures for light and dark windows, tables that sort.

A page is one file: its style, its script and its pictures stand inside, and its content security policy lets it load and run
nothing else. Everything that comes from a run is escaped by the templates.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydistill import __version__
from raydistill.report.plot_style import DARK, LIGHT, drawn_on

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A PNG drawn twice, as data URIs."""

    alt: str
    light: str
    dark: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One cell of a table: what is shown, and what it is sorted by where that is a number."""

    text: str
    value: float | None = None
    is_strong: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PageTable:
    """A table whose columns sort by a click on their header."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""

    @property
    def is_number(self) -> tuple[bool, ...]:
        """Which columns hold numbers, beside empty cells."""
        return tuple(
            any(row[k].value is not None for row in self.rows)
            and all(row[k].value is not None or row[k].text in ("", "-") for row in self.rows)
            for k in range(len(self.columns))
        )


def table_of(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None, caption: str = "") -> PageTable:
    """Plain rows as a table; all keys in the order of their appearance where no columns are named."""
    keys = list(columns) if columns is not None else list(dict.fromkeys(key for row in rows for key in row))
    cells = tuple(tuple(cell(row.get(key)) for key in keys) for row in rows)
    return PageTable(columns=tuple(keys), rows=cells, caption=caption)


def cell(value: Any, text: str | None = None, is_strong: bool = False) -> Cell:
    """A value as a cell; `text` is shown in its place."""
    number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
    if number is not None and not math.isfinite(number):
        number = None
    return Cell(text=plain(value) if text is None else text, value=number, is_strong=is_strong)


def plain(value: Any) -> str:
    """A value in a few characters: numbers to four digits, lists by comma, `-` for nothing."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(item) for item in value) or "-"
    if isinstance(value, dict):
        return ", ".join(f"{key}={plain(item)}" for key, item in value.items()) or "-"
    return str(value)


def picture(alt: str, draw: Callable[[Path], Path]) -> Picture:
    """What `draw` draws to a path, once for light windows and once for dark ones."""
    with tempfile.TemporaryDirectory() as there:
        uris = []
        for on in (LIGHT, DARK):
            with drawn_on(on):
                raw = draw(Path(there) / "picture.png").read_bytes()
            uris.append(f"data:image/png;base64,{base64.b64encode(raw).decode()}")
    return Picture(alt=alt, light=uris[0], dark=uris[1])


def render(template: str, **content: Any) -> str:
    """A page from a template of this package."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["plain"] = plain
    script = (_TEMPLATES / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    about = {"version": __version__, "written": time.strftime("%Y-%m-%d %H:%M")}
    return environment.get_template(template).render(script=script, script_digest=digest, about=about, **content)


def write_whole_text(path: Path, text: str) -> Path:
    """Write a file that a reader finds whole, old or new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path
