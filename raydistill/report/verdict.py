"""Is the student worth shipping? Said in one sentence, against the best plain quantization, with its uncertainty.

Exact match is compared as two independent samples with 95 % intervals, unless the caller brings a paired comparison of the
rows' answers (`compare`). The models answer the same test rows, so the true uncertainty of a difference is usually smaller
than that of two samples: a "no" without pairing can be an honest "not shown with this many rows".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from raydistill.results.tables import SummaryRow, format_bytes, format_kl, recovered_share

Z_95 = 1.96
ALPHA = 0.05  # the same of a p value
SAME_SIZE = 1.01  # a merged student's scales may round a few bytes above the PTQ model's
SMALLER_KL = (
    0.8  # the share of the other's to which a KL must fall to be worth a training run, however sure the difference
)
_MOST_RECOVERED = 0.8
_MAX_WORTHWHILE_ROWS = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """first - second, in exact match, with its standard error (None: unknown)."""

    value: float
    se: float | None
    p_value: float | None = None  # of a paired test; None: judged by the standard error

    @property
    def is_real(self) -> bool:
        if self.p_value is not None:
            return self.p_value < ALPHA
        return self.se is not None and abs(self.value) > Z_95 * self.se

    def __str__(self) -> str:
        if self.se is None:
            return f"{100 * self.value:+.1f} points, no error bar"
        return f"{100 * self.value:+.1f} ± {100 * Z_95 * self.se:.1f} points"


Compare = Callable[[SummaryRow, SummaryRow], Difference | None]
"""How the exact match of two rows differs; None where one was not measured."""


def difference(first: SummaryRow, second: SummaryRow) -> Difference | None:
    """Two-sample difference of exact match; None where one was not measured."""
    if first.exact_match is None or second.exact_match is None:
        return None
    errors = [_standard_error(row) for row in (first, second)]
    known = [error for error in errors if error is not None]
    se = math.hypot(*known) if len(known) == 2 else None
    return Difference(value=first.exact_match - second.exact_match, se=se)


def verdict(rows: Sequence[SummaryRow], compare: Compare = difference) -> str:
    """One sentence: student against the best PTQ that is not larger, and what a larger PTQ would do instead."""
    student = best_of(rows, "student", compare)
    if student is None:
        return "There is no student in this table, so nothing can be said about shipping one."
    ptq = [row for row in rows if row.role == "ptq"]
    if not ptq:
        return f"{student.name} has no plain quantization beside it: measure the PTQ baselines before shipping it."
    fitting = [row for row in ptq if row.bytes <= student.bytes * SAME_SIZE]
    rival = _best(fitting, compare)
    sentence = _against_same_size(student, rival, compare) if rival else _without_rival(student)
    alternative = _larger_that_would_do(student, [row for row in ptq if row not in fitting], compare)
    return f"{sentence}{alternative}."


def next_steps(rows: Sequence[SummaryRow], compare: Compare = difference) -> str:
    """What to try next, from what limits this comparison."""
    student, teacher = best_of(rows, "student", compare), best_of(rows, "teacher", compare)
    ptq = [row for row in rows if row.role == "ptq"]
    if student is None or not ptq:
        return "Add the missing rows (PTQ baselines on the same grid and a student), then compare again."
    rival = _best([row for row in ptq if row.bytes <= student.bytes * SAME_SIZE], compare) or _best(ptq, compare)
    assert rival is not None
    if rival.bytes * SAME_SIZE < student.bytes and _not_worse(rival, student, compare) and _kl(rival) <= _kl(student):
        return (
            f"{rival.name} is smaller and as good: use adapter.mode='merged' (adds no byte), a lower rank, fewer bits."
        )
    hints = []
    if teacher and (gap := compare(teacher, rival)) and gap.se is not None and not gap.is_real:
        hints.append(
            f"exact match cannot move here ({rival.name} is within noise of the teacher): judge by KL or try fewer bits"
        )
    elif (rows_needed := _rows_to_resolve(student, rival, compare)) is not None:
        hints.append(f"evaluate on about {rows_needed:,} rows to tell {student.name} from {rival.name}")
    share = _kl_recovered(student, rival)
    if share is not None and share < _MOST_RECOVERED:
        hints.append(
            f"{max(share, 0):.0%} of the KL gap is closed: train longer (trainer.num_steps), raise adapter.rank or "
            "the learning rate"
        )
    return "; ".join(hints) + "." if hints else "Nothing stands out: ship it, or repeat with other seeds to be sure."


def best_of(rows: Sequence[SummaryRow], role: str, compare: Compare = difference) -> SummaryRow | None:
    """The best row of a role: by KL among those within noise of the highest exact match."""
    return _best([row for row in rows if row.role == role], compare)


def _best(rows: Sequence[SummaryRow], compare: Compare) -> SummaryRow | None:
    if not rows:
        return None
    top = max(rows, key=lambda row: (row.exact_match if row.exact_match is not None else -1.0, -_kl(row)))
    as_good = [
        row for row in rows if (d := compare(top, row)) is None or row is top or (d.se is not None and not d.is_real)
    ]
    return min(as_good, key=_kl)


def _against_same_size(student: SummaryRow, rival: SummaryRow, compare: Compare) -> str:
    size = "of the same size" if rival.bytes * SAME_SIZE >= student.bytes else f"of only {format_bytes(rival.bytes)}"
    gap, kl = compare(student, rival), f"KL {_kl_text(student)} against {_kl_text(rival)} nats"
    kl_falls = _kl(student) <= SMALLER_KL * _kl(rival)
    versus = f"the best PTQ {size} ({rival.name})"
    if gap is None:
        if kl_falls:
            return f"Worth shipping by KL alone: {student.name} beats {versus}, {kl}, exact match not measured"
        share = _kl_recovered(student, rival)
        if share is not None and share > 0:
            return f"Hardly worth shipping: {student.name} is closer to the teacher than {versus} by {share:.0%} only, {kl}"
        return f"Not shown to be worth shipping: {student.name} is no closer to the teacher than {versus}, {kl}"
    if gap.is_real and gap.value < 0:
        return f"Do not ship {student.name}: {versus} answers more rows correctly ({gap}), {kl}"
    if gap.is_real:
        also = "" if _kl(student) <= _kl(rival) else ", though its KL is larger"
        return f"Worth shipping: {student.name} beats {versus} by {gap} of exact match, {kl}{also}"
    if rival.bytes * SAME_SIZE < student.bytes and gap.se is not None and not kl_falls:
        return f"Do not ship {student.name}: {versus} is smaller and within noise of it ({gap}), {kl}"
    unclear = "differs by no more than noise" if gap.se is not None else "cannot be judged"
    if kl_falls:
        return (
            f"Comparable in exact match, closer to the teacher: against {versus}, {student.name} {unclear} ({gap}), "
            f"but {kl}; ship it if closeness matters"
        )
    return f"Not shown to be worth shipping: against {versus}, {student.name} {unclear} ({gap}), {kl}"


def _without_rival(student: SummaryRow) -> str:
    return f"No PTQ model fits into {format_bytes(student.bytes)}, so {student.name} stands alone at its size"


def _larger_that_would_do(student: SummaryRow, larger: Sequence[SummaryRow], compare: Compare) -> str:
    """The smallest larger PTQ model that is not worse than the student, if there is one."""
    enough = sorted((row for row in larger if _not_worse(row, student, compare)), key=lambda row: (row.bytes, _kl(row)))
    if not enough:
        return ""
    row = enough[0]
    by = "" if _kl(row) <= _kl(student) / SMALLER_KL else " by exact match alone"
    return (
        f"; but if {format_bytes(row.bytes)} ({row.bytes / student.bytes:.2g}x the bytes) are affordable, plain "
        f"{row.name} needs no training and would do{by}{_quality(row)}"
    )


def _not_worse(row: SummaryRow, student: SummaryRow, compare: Compare) -> bool:
    """True if `row` is at least as good: exact match not really below, and KL within the margin."""
    gap = compare(row, student)
    if gap is None:
        return _kl(row) <= _kl(student) / SMALLER_KL
    return gap.value >= 0 or (gap.se is not None and not gap.is_real)


def _quality(row: SummaryRow) -> str:
    match = "" if row.exact_match is None else f"exact match {row.exact_match:.1%}, "
    return f" ({match}KL {_kl_text(row)})"


def _kl_recovered(student: SummaryRow, rival: SummaryRow) -> float | None:
    if student.kl_nats is None or rival.kl_nats is None:
        return None
    return recovered_share(0.0, rival.kl_nats, student.kl_nats)


def _rows_to_resolve(first: SummaryRow, second: SummaryRow, compare: Compare) -> int | None:
    """Rows that would make the seen difference real; None if it is, or if it is too small to chase."""
    gap = compare(first, second)
    if gap is None or gap.se is None or gap.is_real or not gap.value or not (first.num_rows and second.num_rows):
        return None
    rows = math.ceil(min(first.num_rows, second.num_rows) * (Z_95 * gap.se / gap.value) ** 2 / 100) * 100
    return rows if rows <= _MAX_WORTHWHILE_ROWS else None


def _standard_error(row: SummaryRow) -> float | None:
    """The given one; with the number of rows known, one that is not 0 at 0 % and 100 % (Agresti-Caffo)."""
    if row.num_rows and row.exact_match is not None:
        share = (row.exact_match * row.num_rows + 1) / (row.num_rows + 2)
        return max(row.exact_match_se or 0.0, math.sqrt(share * (1 - share) / (row.num_rows + 2)))
    return row.exact_match_se or None  # 0 says only that all rows were alike: no error bar


def _kl(row: SummaryRow) -> float:
    return math.inf if row.kl_nats is None or math.isnan(row.kl_nats) else row.kl_nats


def _kl_text(row: SummaryRow) -> str:
    return "unknown" if row.kl_nats is None else format_kl(row.kl_nats)
