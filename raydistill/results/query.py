"""Reads the results store: runs with their last metrics, best first, and one of them by name."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from raydistill.errors import UserError
from raydistill.results.names import Names
from raydistill.results.provenance import scrub
from raydistill.results.reachable import silence_of
from raydistill.results.runs import RUN_TAG, RunRow, typed_setting
from raydistill.results.store import PARENT_TAG, RECORD_ID_TAG, open_client, sqlite_path
from raydistill.results.tables import SHARES

if TYPE_CHECKING:
    from mlflow import MlflowClient

DEFAULT_SORT = "evaluate/kl_nats"
_HIGHER_IS_BETTER = ("accuracy", "last_number", "per_s", "recovered")
_SHARE = re.compile(rf"(?:^|[_/])(?:{'|'.join(SHARES)})(?:_norm|_bytes|_mutual_info)*(?:\.[\w-]+)?$(?<!_se)")
"""One of lm-eval's at the end of a metric's name, and the filter that chose the answers: gsm8k_exact_match.strict-match."""
_PAGE = 500
LONGEST_REASON = 160  # libraries repeat themselves: the cause comes first


def list_runs(uri: str, experiment: str | None = None) -> list[RunRow]:
    """All runs of a store (of one experiment) with their last metrics. UserError where the store does not answer."""
    require_store(uri)
    with _answering(uri):
        return _list_runs(open_client(uri), uri, experiment)


def _list_runs(client: MlflowClient, uri: str, experiment: str | None) -> list[RunRow]:
    experiments = list(client.search_experiments())
    if experiment is not None:
        names = sorted(one.name for one in experiments)
        experiments = [one for one in experiments if one.name == experiment]
        if not experiments:
            raise UserError(f"no experiment {experiment!r} at {scrub(uri)}; there are: {', '.join(names)}")
    ids = [one.experiment_id for one in experiments]
    found: list[Any] = []
    page: str | None = None
    while ids:
        some = client.search_runs(ids, max_results=_PAGE, page_token=page)
        found += some
        page = some.token
        if not page:
            break
    run_names = {run.info.run_id: run.info.run_name for run in found}
    return [_row(run, run_names) for run in found]


@contextmanager
def _answering(uri: str) -> Iterator[None]:
    """What libraries raise about a store that is down, or that they do not know, as one line."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    def refusal(reason: str) -> UserError:
        said = shorten(scrub(reason), LONGEST_REASON, placeholder=" ...")
        return UserError(
            f"the results store {scrub(uri)} does not answer ({said}); start it, or name another one with --uri"
        )

    # MLflow knocks at a database for minutes. A server may be behind a proxy, which only its library knows.
    silence = None if uri.startswith("http") else silence_of(uri)
    if silence is not None:
        raise refusal(silence)
    try:
        yield
    except (MlflowException, SQLAlchemyError, ImportError) as error:
        raise refusal(_cause(error)) from error


def _cause(error: BaseException) -> str:
    """What the system said (`Connection refused`) of an error that libraries wrapped, else its first line."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError) and inner.strerror:
            return str(inner.strerror)
        inner = inner.__cause__ or inner.__context__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def require_store(uri: str) -> None:
    """UserError if this is a database file that does not exist: reading must not create it."""
    database = sqlite_path(uri)
    if database and not database.exists():
        raise UserError(
            f"there are no results at {database} yet; name the folder of your runs with --output, or start one with "
            "`raydistill demo`"
        )


def sort_runs(runs: Sequence[RunRow], sort: str) -> list[RunRow]:
    """Best first; what is best follows from the metric's name (exact match up, KL down). Dates: newest first.

    Runs without the value come last, newest first.
    """
    if not runs:
        return []
    names = Names(runs)
    if sort == DEFAULT_SORT and sort not in names.metrics:
        return sorted(runs, key=_age)
    field = names.find(sort)
    if field.kind == "fact" and field.key == "started":
        return sorted(runs, key=_age)
    sign = -1.0 if field.kind == "metric" and higher_is_better(field.key) else 1.0

    def place(run: RunRow) -> tuple[int, float, str, float]:
        value = field.of(run)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return (2, 0.0, "", _age(run))
        if isinstance(value, (int, float)):
            return (0, sign * value, "", _age(run))
        return (1, 0.0, str(value), _age(run))

    return sorted(runs, key=place)


def higher_is_better(metric: str) -> bool:
    """True for exact match, accuracy, other shares and speeds; false for KL, loss, perplexity and times."""
    return metric.endswith(_HIGHER_IS_BETTER) or _SHARE.search(metric) is not None


def find_run(runs: Sequence[RunRow], wanted: str) -> RunRow:
    """A run by name or by the beginning of its id; UserError with the ids where several have the name."""
    found = [run for run in runs if run.name == wanted] or [run for run in runs if run.id.startswith(wanted)]
    if len(found) == 1:
        return found[0]
    if found:
        ids = ", ".join(f"{run.id} ({run.started}, {run.status})" for run in found)
        raise UserError(f"{len(found)} runs are called {wanted!r}; give an id: {ids}")
    names = ", ".join(sorted({run.name for run in runs})) or "none"
    raise UserError(f"no run is called {wanted!r}; there are: {names}")


def _age(run: RunRow) -> float:
    return -(run.started_s or 0.0)


def _row(run: Any, run_names: Mapping[str, str]) -> RunRow:
    info, data = run.info, run.data
    kept = {key: text for key, text in data.tags.items() if not key.startswith("mlflow.") and key != RECORD_ID_TAG}
    return RunRow(
        name=info.run_name,
        id=info.run_id,
        record_id=data.tags.get(RECORD_ID_TAG, ""),
        status=info.status.lower(),
        started_s=info.start_time / 1000 if info.start_time else None,
        seconds=(info.end_time - info.start_time) / 1000 if info.end_time and info.start_time else None,
        parent=run_names.get(data.tags.get(PARENT_TAG, "")),
        settings={name: typed_setting(name, text) for name, text in data.params.items()},
        metrics=dict(data.metrics),
        tags=kept,
        folder=Path(kept[RUN_TAG]) if RUN_TAG in kept else None,
    )
