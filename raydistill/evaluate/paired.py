"""Two models on the same rows: is one better, or is it the rows? Scores row by row, and the test that compares them.

Models that answer the same rows are no independent samples: what is hard for one is hard for the other. Comparing row by
row takes that out, so the same rows tell smaller differences apart than two separate error bars would.

Shape letters: R rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raydistill.errors import DataError

KL, CROSS_ENTROPY, EXACT_MATCH = "kl_nats", "cross_entropy_nats", "exact_match"
"""Names of measures."""
LAST_NUMBER_COLUMN = "last number"
"""Where a table shows exact match by the last number of an answer that marks none."""
MOST_NATS = 80.0  # exp of more leaves the range that a reader or a plot can use
RESAMPLES = 9_999  # random relabellings; a p value of 1e-4 is the smallest that they can show
BATCH = 500  # of them at a time: 2 MB for 500 rows


@dataclass(frozen=True, slots=True, kw_only=True)
class RowValues:
    """One measure of one model, row by row; the measure itself is sum(values) / sum(weights)."""

    row_ids: tuple[str, ...]
    values_R: np.ndarray  # float64; summed over the row's tokens, or 1 and 0 for right and wrong
    weights_R: np.ndarray  # float64; the row's tokens, or 1

    def __post_init__(self) -> None:
        assert len(self.row_ids) == self.values_R.size == self.weights_R.size > 0
        assert (self.weights_R > 0).all()

    @property
    def mean(self) -> float:
        """The measure over all rows: nats per token, or the share of right answers."""
        return float(self.values_R.sum() / self.weights_R.sum())

    @property
    def standard_error(self) -> float | None:
        """Of `mean`, if other rows of the same kind had been drawn; None for a single row."""
        return _standard_error(self.values_R, self.weights_R)

    @property
    def perplexity(self) -> tuple[float, float | None]:
        """exp(`mean`), for values in nats, and its standard error by the delta method: perplexity times that of the mean."""
        perplexity, error = math.exp(min(self.mean, MOST_NATS)), self.standard_error
        return perplexity, None if error is None else perplexity * error

    @property
    def is_yes_or_no(self) -> bool:
        """Whether each row is simply right or wrong."""
        return bool((self.weights_R == 1).all() and np.isin(self.values_R, (0.0, 1.0)).all())


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedDifference:
    """first - second of one measure, on the same rows."""

    difference: float
    se: float | None  # None for a single row
    p_value: float  # two-sided, of no difference

    def __str__(self) -> str:
        se = "" if self.se is None else f" ± {self.se:.2g}"
        return f"{self.difference:+.3g}{se} (p = {self.p_value:.2g})"


def paired_test(first: RowValues, second: RowValues, seed: int = 0) -> PairedDifference:
    """The difference of two models with its standard error and a two-sided p value.

    Right or wrong answers: the exact McNemar test, a binomial test of the rows that only one of the two gets right.
    Anything else, such as the KL: a permutation test that swaps the two models' values row by row (Fisher's, exact where
    the rows allow fewer than RESAMPLES swaps). The standard error is that of a ratio of sums, rows being the sample.
    DataError unless both were measured on the same rows.

    Property tested: swapping the models changes the sign of the difference and nothing else.
    """
    if first.row_ids != second.row_ids or not np.array_equal(first.weights_R, second.weights_R):
        raise DataError(
            f"a paired test needs the same rows on both sides: {len(first.row_ids)} and {len(second.row_ids)} rows, or rows "
            "of other lengths, were measured; measure both models in one `raydistill evaluate`"
        )
    change_R = first.values_R - second.values_R
    p_value = _mcnemar(change_R) if first.is_yes_or_no and second.is_yes_or_no else _permutation(first, second, seed)
    return PairedDifference(
        difference=float(change_R.sum() / first.weights_R.sum()),
        se=_standard_error(change_R, first.weights_R),
        p_value=p_value,
    )


def _mcnemar(change_R: np.ndarray) -> float:
    from scipy.stats import binomtest

    only_first, only_second = int((change_R > 0).sum()), int((change_R < 0).sum())
    if only_first + only_second == 0:
        return 1.0
    return float(binomtest(only_first, only_first + only_second, 0.5).pvalue)


def _permutation(first: RowValues, second: RowValues, seed: int) -> float:
    from scipy.stats import permutation_test

    if np.array_equal(first.values_R, second.values_R) or first.values_R.size < 2:
        return 1.0
    result = permutation_test(
        (first.values_R, second.values_R),
        lambda one, other, axis: (one - other).sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=BATCH,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def _standard_error(values_R: np.ndarray, weights_R: np.ndarray) -> float | None:
    """Of sum(values) / sum(weights) by linearisation: long rows weigh more, and that is counted."""
    count = values_R.size
    if count < 2:
        return None
    rest_R = values_R - values_R.sum() / weights_R.sum() * weights_R
    return float(math.sqrt(count / (count - 1) * float((rest_R**2).sum())) / weights_R.sum())


def write_row_values(path: Path, values: Mapping[str, Mapping[str, RowValues]]) -> None:
    """model -> measure -> values, as JSONL: one line for each model, measure and row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.partial")
    with temporary.open("w", encoding="utf-8") as file:
        for model, measures in values.items():
            for measure, rows in measures.items():
                for row_id, value, weight in zip(rows.row_ids, rows.values_R, rows.weights_R, strict=True):
                    line = {"model": model, "measure": measure, "row_id": row_id}
                    file.write(json.dumps({**line, "value": float(value), "tokens": int(weight)}) + "\n")
    temporary.replace(path)


def read_row_values(path: Path) -> dict[str, dict[str, RowValues]]:
    """The inverse of `write_row_values`."""
    found: dict[tuple[str, str], list[tuple[str, float, float]]] = {}
    for line in _lines(path):
        found.setdefault((line["model"], line["measure"]), []).append((line["row_id"], line["value"], line["tokens"]))
    models: dict[str, dict[str, RowValues]] = {}
    for (model, measure), rows in found.items():
        ids, values, weights = zip(*rows, strict=True)
        models.setdefault(model, {})[measure] = RowValues(
            row_ids=tuple(ids), values_R=np.array(values, np.float64), weights_R=np.array(weights, np.float64)
        )
    return models


def _lines(path: Path) -> Iterator[dict]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
