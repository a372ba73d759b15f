"""Reads the results store: runs with their last metrics, best first, and two of them side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from raydistill.errors import UserError
from raydistill.results.provenance import scrub
from raydistill.results.store import RECORD_ID_TAG, open_client, sqlite_path

DEFAULT_SORT = "evaluate/kl_nats"
_HIGHER_IS_BETTER = (
    *("exact_match", "accuracy", "per_s", "recovered"),
    *("last_number", "acc", "acc_norm", "strict-match", "flexible-extract"),  # of `evaluate --record`
)
_PAGE = 500


def list_runs(
    uri: str, experiment: str | None = None, sort: str = DEFAULT_SORT, limit: int | None = None
) -> list[dict[str, Any]]:
    """Runs with their last metrics, best first by `sort`; runs without that metric come last, newest first."""
    database = sqlite_path(uri)
    if database and not database.exists():
        raise UserError(
            f"there are no results at {database} yet; name the folder of your runs with --output, or start one with "
            "`raydistill demo`"
        )
    client = open_client(uri)
    experiments = list(client.search_experiments())
    if experiment is not None:
        names = sorted(one.name for one in experiments)
        experiments = [one for one in experiments if one.name == experiment]
        if not experiments:
            raise UserError(f"no experiment {experiment!r} at {scrub(uri)}; there are: {', '.join(names)}")
    ids = [one.experiment_id for one in experiments]
    runs: list[dict[str, Any]] = []
    page: str | None = None
    while ids:
        found = client.search_runs(ids, max_results=_PAGE, page_token=page)
        runs += [_row(run) for run in found]
        page = found.token
        if not page:
            break
    return sort_runs(runs, sort)[:limit]


def sort_runs(runs: Sequence[dict[str, Any]], sort: str) -> list[dict[str, Any]]:
    """Best first; what is best follows from the metric's name (exact match up, KL down)."""
    known = {key for run in runs for key in run["metrics"]}
    if runs and sort not in known and sort != DEFAULT_SORT:
        raise UserError(f"no run has the metric {sort!r}; there are: {', '.join(sorted(known))}")
    sign = -1.0 if higher_is_better(sort) else 1.0

    def place(run: dict[str, Any]) -> tuple[float, float]:
        value = run["metrics"].get(sort, math.nan)
        return (math.inf if math.isnan(value) else sign * value, -(run["started_s"] or 0.0))

    return sorted(runs, key=place)


def higher_is_better(metric: str) -> bool:
    """True for exact match, accuracy and speeds; false for KL, loss, perplexity and times."""
    return metric.endswith(_HIGHER_IS_BETTER)


def compare_runs(uri: str, first: str, second: str, experiment: str | None = None) -> dict[str, Any]:
    """Two runs by name or id (a unique beginning of it is enough): settings that differ, metrics side by side."""
    runs = list_runs(uri, experiment)
    return compare(_find(runs, first), _find(runs, second))


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that differ and all metrics, each as (first, second); None where a run lacks one."""

    def pairs(part: str) -> dict[str, tuple[Any, Any]]:
        keys = sorted(set(first[part]) | set(second[part]))
        return {key: (first[part].get(key), second[part].get(key)) for key in keys}

    settings = {key: pair for key, pair in pairs("params").items() if pair[0] != pair[1]}
    return {"runs": (first["name"], second["name"]), "settings": settings, "metrics": pairs("metrics")}


def _row(run: Any) -> dict[str, Any]:
    info, data = run.info, run.data
    tags = {key: value for key, value in data.tags.items() if not key.startswith("mlflow.") and key != RECORD_ID_TAG}
    return {
        "name": info.run_name,
        "id": info.run_id,
        "status": info.status.lower(),
        "started_s": info.start_time / 1000 if info.start_time else None,
        "seconds": (info.end_time - info.start_time) / 1000 if info.end_time and info.start_time else None,
        "metrics": dict(data.metrics),
        "params": dict(data.params),
        "tags": tags,
    }


def _find(runs: Sequence[dict[str, Any]], wanted: str) -> dict[str, Any]:
    found = [run for run in runs if run["name"] == wanted] or [run for run in runs if run["id"].startswith(wanted)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{len(found)} runs are called {wanted!r}; give an id: {', '.join(run['id'] for run in found)}")
    names = ", ".join(sorted(run["name"] for run in runs)) or "none"
    raise UserError(f"no run is called {wanted!r}; there are: {names}")
