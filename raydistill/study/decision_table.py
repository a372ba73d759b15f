"""How the lines of the table that decides look: in a terminal, as wide as it is, and as markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from raydistill.evaluate.paired import CROSS_ENTROPY, EXACT_MATCH, KL, LAST_NUMBER_COLUMN, PairedDifference
from raydistill.results.tables import format_bytes, format_kl, format_perplexity, with_error
from raydistill.study.decision import Line

if TYPE_CHECKING:
    from rich.box import Box
    from rich.console import Console
    from rich.table import Table

SMALLEST_P = 0.001  # below it the digits mean nothing
_TITLE = "Held-out test rows"


def decision_tables(lines: Sequence[Line], reference: str | None, out: Console) -> list[Table]:
    """For a terminal; students are bold, what is not there is dim. One table where `out` is wide enough, else one without
    the differences and with fewer standard errors, and the tasks in tables of their own."""
    from rich.box import HEAVY_HEAD, SIMPLE_HEAD

    whole = _table(lines, _whole(lines, reference), _TITLE, HEAVY_HEAD)
    if _width(whole, out) <= out.width:
        return [whole]
    p_of = "" if reference is None else f" (p: of no difference to {reference})"
    short = [column for column in [*_columns(lines, reference, is_narrow=True), _COST] if not column.is_left_out]
    tables = [_table(lines, short, f"{_TITLE}{p_of}", SIMPLE_HEAD)]
    packed: list[list[Column]] = []
    for columns in _task_columns(lines):
        if packed and _width(_table(lines, [*packed[-1], *columns], "", SIMPLE_HEAD), out) <= out.width:
            packed[-1] += columns
        else:
            packed.append([short[0], *columns])
    return [*tables, *(_table(lines, columns, f"Tasks{p_of}", SIMPLE_HEAD) for columns in packed)]


def decision_markdown(lines: Sequence[Line], reference: str | None) -> str:
    """For a report; a model that is not there is a line of dashes, and its reason stands below."""
    columns = _whole(lines, reference)
    headings = [column.heading.replace("|", "\\|") for column in columns]
    text = ["| " + " | ".join(headings) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    for line in lines:
        cells = [column.cell(line).replace("|", "\\|") for column in columns]
        text.append("| " + " | ".join(f"**{cell}**" if line.role == "student" else cell for cell in cells) + " |")
    return "\n".join(text) + "\n"


def missing_lines(lines: Sequence[Line]) -> list[str]:
    """`NAME: reason` of every model that is not there."""
    return [f"{line.name}: {line.reason}" for line in lines if line.row is None]


def task_measures(lines: Sequence[Line]) -> list[str]:
    """The main measure of each task, in order: acc_norm where a task has it (choices of unequal length), else the first that
    it lists. All others are in the JSON."""
    of_task: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for line in lines if line.row is not None for name in line.row.measures):
        if name != LAST_NUMBER_COLUMN:
            of_task.setdefault(name.partition(" ")[0], []).append(name)
    return [next((name for name in names if name.endswith(" acc_norm")), names[0]) for names in of_task.values()]


def num_tests(lines: Sequence[Line]) -> int:
    """How many p values the table shows."""
    shown = (KL, EXACT_MATCH, CROSS_ENTROPY, *task_measures(lines))
    return sum(measure in line.tests for line in lines for measure in shown)


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column of the table."""

    heading: str
    cell: Callable[[Line], str]
    is_left_out: bool = False  # on a narrow terminal


def _whole(lines: Sequence[Line], reference: str | None) -> list[Column]:
    return [*_columns(lines, reference), *(column for some in _task_columns(lines) for column in some), _COST]


def _columns(lines: Sequence[Line], reference: str | None, is_narrow: bool = False) -> list[Column]:
    """All but tasks and cost."""
    against = f"against {reference}"
    columns = [
        Column(heading="model", cell=(lambda line: line.name) if is_narrow else _name_cell),
        Column(heading="size", cell=_size_cell),
        Column(heading="KL", cell=lambda line: _kl_cell(line).partition(" ±")[0])
        if is_narrow
        else Column(heading="KL (nats/token)", cell=_kl_cell),
    ]
    if reference is not None:
        columns += [Column(heading=against, cell=_kl_change, is_left_out=True), _p_column(KL)]
    if any(line.row is not None and line.row.exact_match is not None for line in lines):
        columns.append(Column(heading="exact match", cell=_match_cell))
        if reference is not None:
            columns += [Column(heading=against, cell=_match_change, is_left_out=True), _p_column(EXACT_MATCH)]
    columns.append(Column(heading="perplexity", cell=_perplexity_cell, is_left_out=True))
    if any(CROSS_ENTROPY in line.tests for line in lines):
        columns.append(_p_column(CROSS_ENTROPY, is_left_out=True))
    return columns


def _task_columns(lines: Sequence[Line]) -> list[list[Column]]:
    """Those of each task: its value, and p where it was compared document by document."""
    return [
        [
            Column(heading=name, cell=partial(_measure_cell, name)),
            *([_p_column(name)] if any(name in line.tests for line in lines) else []),
        ]
        for name in task_measures(lines)
    ]


def _p_column(measure: str, is_left_out: bool = False) -> Column:
    return Column(heading="p", cell=lambda line: _p_cell(line.tests.get(measure)), is_left_out=is_left_out)


def _table(lines: Sequence[Line], columns: Sequence[Column], title: str, box: Box) -> Table:
    from rich.table import Table

    table = Table(title=title, box=box)
    for column in columns:
        table.add_column(column.heading, justify="left" if column.heading == "model" else "right", no_wrap=True)
    for line in lines:
        style = "dim" if line.row is None else "bold" if line.role == "student" else None
        table.add_row(*(column.cell(line) for column in columns), style=style)
    return table


def _width(table: Table, out: Console) -> int:
    """Columns of the terminal that a table takes where nothing is cut."""
    from rich.measure import Measurement

    return Measurement.get(out, out.options.update(width=10_000), table).maximum


def _name_cell(line: Line) -> str:
    return line.name if line.num_seeds == 1 else f"{line.name} ({line.num_seeds} seeds)"


def _size_cell(line: Line) -> str:
    return "-" if line.row is None else format_bytes(line.row.bytes)


def _kl_cell(line: Line) -> str:
    if line.row is None or line.row.kl_nats is None:
        return "-"
    if line.role == "teacher":
        return format_kl(line.row.kl_nats)
    se = "" if line.row.kl_se is None else f" ± {format_kl(line.row.kl_se)}"
    return f"{format_kl(line.row.kl_nats)}{se}" + ("" if line.kl_sd is None else f" (sd {format_kl(line.kl_sd)})")


def _kl_change(line: Line) -> str:
    test = line.tests.get(KL)
    if test is None:
        return "-"
    se = "" if test.se is None else f" ± {format_kl(test.se)}"
    return f"{'-' if test.difference < 0 else '+'}{format_kl(abs(test.difference))}{se}"


def _match_cell(line: Line) -> str:
    if line.row is None or line.row.exact_match is None:
        return "-"
    se = "" if line.row.exact_match_se is None else f" ± {100 * line.row.exact_match_se:.1f}"
    return f"{100 * line.row.exact_match:.1f}{se} %"


def _match_change(line: Line) -> str:
    test = line.tests.get(EXACT_MATCH)
    if test is None:
        return "-"
    return f"{100 * test.difference:+.1f}" + ("" if test.se is None else f" ± {100 * test.se:.1f}")


def _perplexity_cell(line: Line) -> str:
    return "-" if line.row is None else format_perplexity(line.row.perplexity, line.row.perplexity_se)


def _measure_cell(name: str, line: Line) -> str:
    measure = None if line.row is None else line.row.measures.get(name)
    if measure is None:
        return "-"
    if not measure["is_share"]:
        return with_error(measure["value"], measure["se"])
    se = "" if measure["se"] is None else f" ± {100 * measure['se']:.1f}"
    return f"{100 * measure['value']:.1f}{se} %"


def _cost_cell(line: Line) -> str:
    return "-" if line.cost is None else f"{line.cost:.0f}"


def _p_cell(test: PairedDifference | None) -> str:
    if test is None:
        return "-"
    return f"<{SMALLEST_P:g}" if test.p_value < SMALLEST_P else f"{test.p_value:.2g}"


_COST = Column(heading="device-s", cell=_cost_cell)
