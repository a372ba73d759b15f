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
    """For a terminal; students are bold, what is not there is dim. One table where `out` is wide enough; else as few as hold
    everything but the differences, tasks apart, and without what several seeds add to a cell where that saves a table."""
    from rich.box import HEAVY_HEAD, SIMPLE_HEAD

    whole = _table(lines, _whole(lines, reference), _TITLE, HEAVY_HEAD)
    if _width(whole, out) <= out.width:
        return [whole]

    def packed(name: Column, groups: Sequence[Sequence[Column]]) -> list[list[Column]]:
        tables: list[list[Column]] = []
        for group in groups:
            if tables and _width(_table(lines, [*tables[-1], *group], "", SIMPLE_HEAD), out) <= out.width:
                tables[-1] += group
            else:
                tables.append([name, *group])
        return tables

    styles = ((_NAME, _KL), (_SHORT_NAME, _SHORT_KL))
    found = min((packed(name, [*_held_out(lines, reference, kl), [_COST]]) for name, kl in styles), key=len)
    first = _TITLE if reference is None else f"{_TITLE} (p: of no difference to {reference})"
    titles = [first, *[_TITLE] * (len(found) - 1)]
    tasks = packed(_SHORT_NAME, _task_columns(lines))
    titled = zip([*titles, *["Tasks"] * len(tasks)], [*found, *tasks], strict=True)
    return [_table(lines, columns, title, SIMPLE_HEAD) for title, columns in titled]


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


def _whole(lines: Sequence[Line], reference: str | None) -> list[Column]:
    groups = [[_NAME], *_held_out(lines, reference, _KL, with_differences=True), *_task_columns(lines), [_COST]]
    return [column for group in groups for column in group]


def _held_out(
    lines: Sequence[Line], reference: str | None, kl: Column, *, with_differences: bool = False
) -> list[list[Column]]:
    """What the test rows tell, a group for each measure with its tests."""

    def tests(measure: str, change: Callable[[Line], str]) -> list[Column]:
        if reference is None:
            return []
        difference = [Column(heading=f"against {reference}", cell=change)] if with_differences else []
        return [*difference, _p_column(measure)]

    groups = [[Column(heading="size", cell=_size_cell), kl, *tests(KL, _kl_change)]]
    if any(line.row is not None and line.row.exact_match is not None for line in lines):
        groups.append([Column(heading="exact match", cell=_match_cell), *tests(EXACT_MATCH, _match_change)])
    p = [_p_column(CROSS_ENTROPY)] if any(CROSS_ENTROPY in line.tests for line in lines) else []
    return [*groups, [Column(heading="perplexity", cell=_perplexity_cell), *p]]


def _task_columns(lines: Sequence[Line]) -> list[list[Column]]:
    """Those of each task: its value, and p where it was compared document by document."""
    return [
        [
            Column(heading=name, cell=partial(_measure_cell, name)),
            *([_p_column(name)] if any(name in line.tests for line in lines) else []),
        ]
        for name in task_measures(lines)
    ]


def _p_column(measure: str) -> Column:
    return Column(heading="p", cell=lambda line: _p_cell(line.tests.get(measure)))


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


_NAME = Column(heading="model", cell=_name_cell)
_SHORT_NAME = Column(heading="model", cell=lambda line: line.name)
_KL = Column(heading="KL (nats/token)", cell=_kl_cell)
_SHORT_KL = Column(heading="KL", cell=lambda line: _kl_cell(line).partition(" (sd")[0])
_COST = Column(heading="device-s", cell=_cost_cell)
