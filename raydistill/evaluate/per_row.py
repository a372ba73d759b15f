"""Each row's scores as a file, for tests and plots of one's own: `.parquet`, or JSONL under any other ending."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from raydistill.errors import RunError
from raydistill.evaluate.paired import RowValues, write_row_values


def write_per_row(path: Path, values: Mapping[str, Mapping[str, RowValues]]) -> None:
    """model -> measure -> scores, as rows of model, measure, row_id, value, tokens; whole or not at all.

    value: summed over the tokens of the row (nats, bits), or 1 and 0 for right and wrong, with tokens 1.
    """
    try:
        if path.suffix == ".parquet":
            _write_parquet(path, values)
        else:
            write_row_values(path, values)
    except OSError as error:
        raise RunError(
            f"--per-row {path} cannot be written: {error.strerror or error}; the table stands above"
        ) from error


def _write_parquet(path: Path, values: Mapping[str, Mapping[str, RowValues]]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    columns: dict[str, list[object]] = {name: [] for name in ("model", "measure", "row_id", "value", "tokens")}
    for model, measures in values.items():
        for measure, rows in measures.items():
            columns["model"] += [model] * len(rows.row_ids)
            columns["measure"] += [measure] * len(rows.row_ids)
            columns["row_id"] += rows.row_ids
            columns["value"] += rows.values_R.tolist()
            columns["tokens"] += rows.weights_R.astype(int).tolist()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.partial")
    parquet.write_table(pa.table(columns), temporary)
    temporary.replace(path)
