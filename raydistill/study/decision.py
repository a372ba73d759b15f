"""The table that decides: every model beside the best plain quantization of the student's width, compared row by row.

Seeds of an arm become one line: each test row's values are averaged over them first, so the standard error and the test are
about the rows, and the spread between seeds stands beside them. Differences are to one reference, chosen before the test
rows were looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from raydistill.evaluate.paired import (
    CROSS_ENTROPY,
    EXACT_MATCH,
    KL,
    PairedDifference,
    RowValues,
    paired_test,
)
from raydistill.report.verdict import Compare, Difference, difference
from raydistill.results.tables import Measure, Role, SummaryRow

Values = Mapping[str, Mapping[str, RowValues]]
"""Model -> measure -> values of the test rows."""


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
    match, text = values.get(EXACT_MATCH), values.get(CROSS_ENTROPY)
    perplexity, perplexity_se = text.perplexity if text else (None, None)
    return replace(
        rows[0],
        name=name,
        bytes=round(float(np.mean([row.bytes for row in rows]))),
        kl_nats=values[KL].mean,
        kl_se=values[KL].standard_error,
        perplexity=perplexity,
        perplexity_se=perplexity_se,
        exact_match=match.mean if match else None,
        exact_match_se=match.standard_error if match else None,
        measures={column: _mean_measure(column, rows, values) for column in rows[0].measures},
    )


def _mean_measure(column: str, rows: Sequence[SummaryRow], values: Mapping[str, RowValues]) -> Measure:
    """Of a share row by row, as above; of anything else the error is the mean of the seeds', which theirs cannot exceed."""
    every = [row.measures[column] for row in rows]
    errors = [measure["se"] for measure in every if measure["se"] is not None]
    error = float(np.mean(errors)) if len(errors) == len(every) else None
    if every[0]["is_share"] and column in values:
        error = values[column].standard_error
    value = float(np.mean([measure["value"] for measure in every]))
    return Measure(value=value, se=error, is_share=every[0]["is_share"])


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
