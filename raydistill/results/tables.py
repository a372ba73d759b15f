"""The comparison table of a run: teacher, plain quantization (PTQ), student, controls; as text, markdown and JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:
    from rich.table import Table

Role = Literal["teacher", "ptq", "student", "control"]
COMPARISON = "comparison"
"""What a record calls this table."""
SHARES = ("acc", "exact_match", "em", "f1", "mc1", "mc2", "pass")
"""How the names of lm-eval's metrics begin that lie between 0 and 1, and are better the higher they are."""
_MOST_PLACES = 7
_COLUMNS = ("model", "role", "exact match", "KL (nats/token)", "perplexity", "size")


class Measure(TypedDict):
    """One more number about a model; a plain mapping, so that a row in JSON is a row again."""

    value: float
    se: float | None  # None where none is known
    is_share: bool  # 0..1, shown in percent


@dataclass(frozen=True, slots=True, kw_only=True)
class SummaryRow:
    """One model in the comparison; None where a number was not measured."""

    name: str
    role: Role
    kl_nats: float | None  # to the teacher, per token; 0 for the teacher
    bytes: int  # of what is served: weights, scales, adapter
    kl_se: float | None = None  # rows being the sample
    exact_match: float | None = None  # 0..1
    exact_match_se: float | None = None
    num_rows: int | None = None  # test rows behind exact_match
    perplexity: float | None = None
    perplexity_se: float | None = None  # rows being the sample
    extras: dict[str, float | str] = field(default_factory=dict)
    measures: dict[str, Measure] = field(default_factory=dict)  # by column: tasks, texts, labels


def recovered_share(teacher: float, ptq: float, student: float) -> float | None:
    """How much of the gap between PTQ and teacher the student closed: 1 all, 0 none, negative worse; None: no gap."""
    gap = teacher - ptq
    return (student - ptq) / gap if gap and math.isfinite(gap) else None


def comparison_table(rows: Sequence[SummaryRow], title: str | None = None) -> Table:
    """A rich table; the student's row is bold."""
    from rich.table import Table

    table = Table(title=title)
    for column in comparison_columns(rows):
        table.add_column(column, justify="left" if column in _COLUMNS[:2] else "right")
    for row, cells in zip(rows, _cells(rows), strict=True):
        table.add_row(*cells, style="bold" if row.role == "student" else None)
    return table


def transposed_table(rows: Sequence[SummaryRow], title: str | None = None) -> Table:
    """The same with a line for each column and a column for each model, for narrow terminals."""
    from rich.table import Table

    table = Table(title=title)
    for name, *cells in zip(comparison_columns(rows), *_cells(rows), strict=True):
        if not table.columns:
            table.add_column(name)
            for row, cell in zip(rows, cells, strict=True):
                table.add_column(cell, justify="right", style="bold" if row.role == "student" else None)
        elif any(cell != "-" for cell in cells):
            table.add_row(name, *cells)
    return table


def comparison_markdown(rows: Sequence[SummaryRow]) -> str:
    """The same table for a README or a report."""
    columns = comparison_columns(rows)
    lines = ["| " + " | ".join(column.replace("|", "\\|") for column in columns) + " |"]
    lines.append("|" + "|".join(["---"] * 2 + ["---:"] * (len(columns) - 2)) + "|")
    for row, cells in zip(rows, _cells(rows), strict=True):
        cells = [cell.replace("|", "\\|") for cell in cells]
        lines.append("| " + " | ".join(f"**{cell}**" if row.role == "student" else cell for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def comparison_json(rows: Sequence[SummaryRow]) -> list[dict[str, Any]]:
    """Plain values, full precision; what `RunRecord.table` takes."""
    return [asdict(row) for row in rows]


def format_bytes(size: float) -> str:
    """`294 KB`, `1.9 GB`; units of 1000."""
    for unit in ("B", "KB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 99.5 else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def format_kl(nats: float) -> str:
    """Two significant digits, never in scientific notation above 1e-5: `0.0034`."""
    if nats == 0:
        return "0"
    if not math.isfinite(nats) or nats < 1e-5:
        return f"{nats:.1e}"
    return f"{nats:.{max(0, 1 - math.floor(math.log10(nats)))}f}"


def with_error(value: float, se: float | None) -> str:
    """A value with its standard error, both to the same place: `0.9883 ± 0.0067`; to four digits where there is none."""
    if se is None or not (math.isfinite(se) and se > 0 and math.isfinite(value)):
        return f"{value:.4g}"
    places = 1 - math.floor(math.log10(se))  # two digits of the error
    if places > _MOST_PLACES:
        return f"{value:.4g} ± {se:.2g}"
    return f"{value:.{max(places, 0)}f} ± {se:.{max(places, 0)}f}"


def format_perplexity(value: float | None, se: float | None) -> str:
    """`6.786 ± 0.053`; `-` for what was not measured."""
    if value is None:
        return "-"
    return f"{value:.3f}" if se is None else with_error(value, se)


def format_measure(measure: Measure | None) -> str:
    """`61.2% ± 0.5%`, `23.41 ± 0.2`; `-` for what was not measured."""
    if measure is None:
        return "-"
    form = ".1%" if measure["is_share"] else ".4g"
    error = "" if measure["se"] is None else f" ± {measure['se']:{form if measure['is_share'] else '.2g'}}"
    return f"{measure['value']:{form}}{error}"


def comparison_columns(rows: Sequence[SummaryRow]) -> list[str]:
    """The columns of the comparison, with the further ones of these rows."""
    return [*_COLUMNS, *_names([row.measures for row in rows]), *_names([row.extras for row in rows])]


def comparison_cells(rows: Sequence[SummaryRow]) -> list[list[tuple[str, float | None]]]:
    """Each row as (text, number to sort by) for every column."""
    measures, extras = _names([row.measures for row in rows]), _names([row.extras for row in rows])
    found = []
    for row, texts in zip(rows, _cells(rows), strict=True):
        numbers: list[Any] = [None, None, row.exact_match, row.kl_nats, row.perplexity, row.bytes]
        numbers += [measure["value"] if (measure := row.measures.get(name)) else None for name in measures]
        numbers += [row.extras.get(name) for name in extras]
        kept = [float(number) if isinstance(number, (int, float)) else None for number in numbers]
        found.append(list(zip(texts, kept, strict=True)))
    return found


def _cells(rows: Sequence[SummaryRow]) -> list[list[str]]:
    measures, extras = _names([row.measures for row in rows]), _names([row.extras for row in rows])
    return [
        [
            *_common_cells(row),
            *(format_measure(row.measures.get(name)) for name in measures),
            *(_extra_cell(row.extras.get(name, "-")) for name in extras),
        ]
        for row in rows
    ]


def _common_cells(row: SummaryRow) -> list[str]:
    match = "-" if row.exact_match is None else f"{row.exact_match:.1%}"
    if row.exact_match is not None and row.exact_match_se is not None:
        match += f" ± {row.exact_match_se:.1%}"
    kl = "-" if row.kl_nats is None else format_kl(row.kl_nats)
    if row.kl_nats and row.kl_se is not None and row.role != "teacher":
        kl += f" ± {format_kl(row.kl_se)}"
    return [
        row.name,
        row.role,
        match,
        kl,
        format_perplexity(row.perplexity, row.perplexity_se),
        format_bytes(row.bytes),
    ]


def _extra_cell(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _names(columns: Sequence[Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(name for row in columns for name in row))
