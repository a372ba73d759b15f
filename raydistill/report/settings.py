"""The settings of a run, or of all trials of a sweep, as tables of a page."""

from __future__ import annotations

from collections.abc import Collection
from itertools import groupby

from raydistill.config.fields import config_fields, config_sections
from raydistill.report.page import PageTable, table_of
from raydistill.report.run_view import RunView


def changed_table(view: RunView, without: Collection[str] = ()) -> PageTable:
    """Settings that are not the default; `without` names dotted fields that are left out."""
    rows = [
        {"setting": name, "value": value, "default": default, "meaning": _meaning(name)}
        for name, value, default in view.changed_settings
        if name not in without
    ]
    return table_of(rows, ("setting", "value", "default", "meaning"), caption="Settings that are not the default")


def all_settings(view: RunView, without: Collection[str] = ()) -> list[PageTable]:
    """One table for each section."""
    flat = {name: value for name, value in view.settings.items() if name not in without}
    order = {section: place for place, section in enumerate(config_sections())}
    by_section = groupby(
        sorted(flat, key=lambda name: order.get(name.partition(".")[0], len(order))), lambda n: n.partition(".")[0]
    )
    return [
        table_of(
            [{"setting": name, "value": flat[name], "meaning": _meaning(name)} for name in names],
            ("setting", "value", "meaning"),
            caption=section,
        )
        for section, names in by_section
    ]


def _meaning(name: str) -> str:
    field = config_fields().get(name) or config_fields().get(".".join(name.split(".")[:2]))
    return field.description if field else ""
