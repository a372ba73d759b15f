"""The comparison table of a run: teacher, plain quantization (PTQ), student, controls; as text, markdown and JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.table import Table

Role = Literal["teacher", "ptq", "student", "control"]
_MOST_PLACES = 7
_COLUMNS = ("model", "role", "exact match", "KL (nats/token)", "perplexity", "size")


@dataclass(frozen=True, slots=True, kw_only=True)
class SummaryRow:
    """One model in the comparison; None where a number was not measured."""

    name: str
    role: Role
    kl_nats: float | None  # to the teacher, per token; 0 for the teacher
    bytes: int  # of what is served: weights, scales, adapter
    exact_match: float | None = None  # 0..1
    exact_match_se: float | None = None
    num_rows: int | None = None  # test rows behind exact_match
    perplexity: float | None = None
    extras: dict[str, float | str] = field(default_factory=dict)


def recovered_share(teacher: float, ptq: float, student: float) -> float | None:
    """How much of the gap between PTQ and teacher the student closed: 1 all, 0 none, negative worse; None: no gap."""
    gap = teacher - ptq
    return (student - ptq) / gap if gap and math.isfinite(gap) else None


def comparison_table(rows: Sequence[SummaryRow], title: str | None = None) -> Table:
    """A rich table; the student's row is bold."""
    from rich.table import Table

    extras = _extra_names(rows)
    table = Table(title=title)
    for column in (*_COLUMNS, *extras):
        table.add_column(column, justify="left" if column in _COLUMNS[:2] else "right")
    for row in rows:
        table.add_row(*_cells(row, extras), style="bold" if row.role == "student" else None)
    return table


def comparison_markdown(rows: Sequence[SummaryRow]) -> str:
    """The same table for a README or a report."""
    extras = _extra_names(rows)
    lines = ["| " + " | ".join((*_COLUMNS, *extras)) + " |"]
    lines.append("|" + "|".join(["---"] * 2 + ["---:"] * (len(_COLUMNS) - 2 + len(extras))) + "|")
    for row in rows:
        cells = [cell.replace("|", "\\|") for cell in _cells(row, extras)]
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


def comparison_columns(rows: Sequence[SummaryRow]) -> list[str]:
    """The columns of the comparison, with the extra ones of these rows."""
    return [*_COLUMNS, *_extra_names(rows)]


def comparison_cells(row: SummaryRow, rows: Sequence[SummaryRow]) -> list[tuple[str, float | None]]:
    """One row as (text, number to sort by) for each column of `rows`."""
    extras = _extra_names(rows)
    numbers: list[Any] = [None, None, row.exact_match, row.kl_nats, row.perplexity, row.bytes]
    numbers += [row.extras.get(name) for name in extras]
    kept = [float(number) if isinstance(number, (int, float)) else None for number in numbers]
    return list(zip(_cells(row, extras), kept, strict=True))


def _cells(row: SummaryRow, extras: Sequence[str]) -> list[str]:
    match = "-" if row.exact_match is None else f"{row.exact_match:.1%}"
    if row.exact_match is not None and row.exact_match_se is not None:
        match += f" ± {row.exact_match_se:.1%}"
    cells = [
        row.name,
        row.role,
        match,
        "-" if row.kl_nats is None else format_kl(row.kl_nats),
        "-" if row.perplexity is None else f"{row.perplexity:.3f}",
        format_bytes(row.bytes),
    ]
    for name in extras:
        value = row.extras.get(name, "-")
        cells.append(value if isinstance(value, str) else f"{value:.4g}")
    return cells


def _extra_names(rows: Sequence[SummaryRow]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.extras))
