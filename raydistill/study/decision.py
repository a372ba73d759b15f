"""The table that decides: every model beside the best plain quantization of the student's width, compared row by row.

Seeds of an arm become one line: each test row's values are averaged over them first, so the standard error and the test are
about the rows, and the spread between seeds stands beside them. Differences are to one reference, chosen before the test
rows were looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from raydistill.evaluate.paired import EXACT_MATCH, KL, PairedDifference, RowValues, paired_test
from raydistill.report.verdict import Compare, Difference, difference
from raydistill.results.tables import Role, SummaryRow, format_bytes, format_kl

if TYPE_CHECKING:
    from rich.table import Table

Values = Mapping[str, Mapping[str, RowValues]]
"""Model -> measure -> values of the test rows."""
SMALLEST_P = 0.001  # below it the digits mean nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of the table; `row` is None where there is no model, and `reason` says why."""

    name: str
    role: Role
    row: SummaryRow | None
    reason: str | None = None
    tests: Mapping[str, PairedDifference] = field(default_factory=dict)  # by measure, against the reference
    kl_sd: float | None = None  # between seeds
    num_seeds: int = 1
    device_seconds: Mapping[str, float] | None = None  # by stage; of a mean run where there are several seeds

    @property
    def cost(self) -> float | None:
        """Device-seconds in all."""
        return None if self.device_seconds is None else sum(self.device_seconds.values())

    def to_json(self) -> dict[str, Any]:
        """Plain values, full precision."""
        row = {} if self.row is None else asdict(self.row)
        return {
            **row,
            "name": self.name,
            "role": self.role,
            "reason": self.reason,
            "tests": {measure: asdict(test) for measure, test in self.tests.items()},
            "kl_sd": self.kl_sd,
            "num_seeds": self.num_seeds,
            "device_seconds": None if self.device_seconds is None else dict(self.device_seconds),
        }


def merge_seeds(
    rows: Sequence[SummaryRow], values: Values, seeds: Mapping[str, Sequence[str]]
) -> tuple[list[SummaryRow], dict[str, Mapping[str, RowValues]], dict[str, float]]:
    """(rows, values, standard deviation of the KL between seeds by name) with one entry for each arm.

    seeds: arm -> names of its models; any other model stays as it is.
    """
    arm_of = {name: arm for arm, names in seeds.items() for name in names}
    merged_values: dict[str, Mapping[str, RowValues]] = {}
    merged_rows: list[SummaryRow] = []
    spread: dict[str, float] = {}
    for row in rows:
        arm = arm_of.get(row.name, row.name)
        if arm in merged_values:
            continue
        names = seeds.get(arm, [row.name])
        of_arm = [one for one in rows if one.name in names]
        merged_values[arm] = _mean_values([values[one.name] for one in of_arm])
        merged_rows.append(_mean_row(arm, of_arm, merged_values[arm]))
        if len(of_arm) > 1:
            spread[arm] = float(np.std([one.kl_nats for one in of_arm if one.kl_nats is not None], ddof=1))
    return merged_rows, merged_values, spread


def _mean_values(every: Sequence[Mapping[str, RowValues]]) -> Mapping[str, RowValues]:
    return {
        measure: RowValues(
            row_ids=first.row_ids,
            values_R=np.mean([one[measure].values_R for one in every], axis=0),
            weights_R=first.weights_R,
        )
        for measure, first in every[0].items()
    }


def _mean_row(name: str, rows: Sequence[SummaryRow], values: Mapping[str, RowValues]) -> SummaryRow:
    if len(rows) == 1:
        return replace(rows[0], name=name)
    match = values.get(EXACT_MATCH)
    return replace(
        rows[0],
        name=name,
        bytes=round(float(np.mean([row.bytes for row in rows]))),
        kl_nats=values[KL].mean,
        kl_se=values[KL].standard_error,
        perplexity=_mean([row.perplexity for row in rows]),
        exact_match=match.mean if match else None,
        exact_match_se=match.standard_error if match else None,
    )


def _mean(numbers: Sequence[float | None]) -> float | None:
    known = [number for number in numbers if number is not None]
    return float(np.mean(known)) if known else None


def compare_rows(
    rows: Sequence[SummaryRow],
    values: Values,
    reference: str | None,
    spread: Mapping[str, float],
    num_seeds: Mapping[str, int],
    device_seconds: Mapping[str, Mapping[str, float]],
) -> list[Line]:
    """The lines of models that were measured, each against the reference. The teacher is compared with nobody."""
    lines = []
    for row in rows:
        tests: dict[str, PairedDifference] = {}
        if reference is not None and row.name != reference and row.role != "teacher":
            shared = values[row.name].keys() & values[reference].keys()
            tests = {name: paired_test(values[row.name][name], values[reference][name]) for name in sorted(shared)}
        lines.append(
            Line(
                name=row.name,
                role=row.role,
                row=row,
                tests=tests,
                kl_sd=spread.get(row.name),
                num_seeds=num_seeds.get(row.name, 1),
                device_seconds=device_seconds.get(row.name),
            )
        )
    return lines


def paired_compare(values: Values) -> Compare:
    """Exact match of two rows compared answer by answer, for the verdict; as two samples where that cannot be."""

    def compare(first: SummaryRow, second: SummaryRow) -> Difference | None:
        one, other = (values.get(row.name, {}).get(EXACT_MATCH) for row in (first, second))
        if one is None or other is None:
            return difference(first, second)
        found = paired_test(one, other)
        return Difference(value=found.difference, se=found.se, p_value=found.p_value)

    return compare


def decision_table(lines: Sequence[Line], reference: str | None, is_narrow: bool = False) -> Table:
    """For the terminal; students are bold, what is not there is dim. is_narrow: 80 columns wide, without the differences and
    with fewer standard errors."""
    from rich.box import HEAVY_HEAD, SIMPLE_HEAD
    from rich.table import Table

    columns = _columns(lines, reference)
    title = "Held-out test rows"
    if is_narrow:
        columns = _narrow_columns(columns, reference)
        title += "" if reference is None else f" (p: of no difference to {reference})"
    table = Table(title=title, box=SIMPLE_HEAD if is_narrow else HEAVY_HEAD)
    for heading, _ in columns:
        table.add_column(heading, justify="left" if heading == "model" else "right", no_wrap=True)
    for line in lines:
        style = "dim" if line.row is None else "bold" if line.role == "student" else None
        table.add_row(*(cell(line) for _, cell in columns), style=style)
    return table


def decision_markdown(lines: Sequence[Line], reference: str | None) -> str:
    """For a report; a model that is not there is a line of dashes, and its reason stands below."""
    columns = _columns(lines, reference)
    headings = [heading for heading, _ in columns]
    text = ["| " + " | ".join(headings) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    for line in lines:
        cells = [cell(line).replace("|", "\\|") for _, cell in columns]
        text.append("| " + " | ".join(f"**{cell}**" if line.role == "student" else cell for cell in cells) + " |")
    return "\n".join(text) + "\n"


def missing_lines(lines: Sequence[Line]) -> list[str]:
    """`NAME: reason` of every model that is not there."""
    return [f"{line.name}: {line.reason}" for line in lines if line.row is None]


Column = tuple[str, Callable[[Line], str]]


def _columns(lines: Sequence[Line], reference: str | None) -> list[Column]:
    """(heading, its cell of a line)."""
    has_match = any(line.row is not None and line.row.exact_match is not None for line in lines)
    columns: list[Column] = [("model", _name_cell), ("size", _size_cell), ("KL (nats/token)", _kl_cell)]
    if reference is not None:
        columns += [(f"against {reference}", _kl_change), ("p", lambda line: _p_cell(line.tests.get(KL)))]
    if has_match:
        columns.append(("exact match", _match_cell))
    if has_match and reference is not None:
        columns += [(f"against {reference}", _match_change), ("p", lambda line: _p_cell(line.tests.get(EXACT_MATCH)))]
    return [*columns, ("perplexity", _perplexity_cell), ("device-s", _cost_cell)]


def _narrow_columns(columns: Sequence[Column], reference: str | None) -> list[Column]:
    short: dict[str, Column] = {
        "model": ("model", lambda line: line.name),
        "KL (nats/token)": ("KL", lambda line: _kl_cell(line).partition(" ±")[0]),
    }
    left_out = (f"against {reference}", "perplexity")
    return [short.get(heading, (heading, cell)) for heading, cell in columns if heading not in left_out]


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
    return "-" if line.row is None or line.row.perplexity is None else f"{line.row.perplexity:.3f}"


def _cost_cell(line: Line) -> str:
    return "-" if line.cost is None else f"{line.cost:.0f}"


def _p_cell(test: PairedDifference | None) -> str:
    if test is None:
        return "-"
    return f"<{SMALLEST_P:g}" if test.p_value < SMALLEST_P else f"{test.p_value:.2g}"
