"""The results store: MLflow behind a few plain methods. SQLite file by default, a tracking server on a cluster.

Only the delivery process and the listing use this; training never waits for it. mlflow is imported on opening.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from filelock import FileLock

from raydistill.results.translate import Parcel, Point

if TYPE_CHECKING:
    from mlflow import MlflowClient

Item = TypeVar("Item")
SQLITE = "sqlite:///"
RECORD_ID_TAG = "raydistill.record_id"
PARENT_TAG = "mlflow.parentRunId"
MAX_POINTS = 1000  # MLflow's limits of one log_batch
MAX_PARAMS = 100
_LOCK_TIMEOUT_S = 180  # a first opening takes seconds (migrations), more when many wait on a busy machine
QUIET_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the delivery has its own retry, in one place
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


def default_uri(output: Path) -> str:
    """The store of an output folder: one SQLite file in it; files go to `<output>/artifacts`."""
    return f"{SQLITE}{output.absolute()}/results.db"


def sqlite_path(uri: str) -> Path | None:
    """The file behind a `sqlite:///` URI, None for any other store."""
    return Path(uri.removeprefix(SQLITE).split("?")[0]) if uri.startswith(SQLITE) else None


class ResultsStore:
    """One open store and one experiment in it."""

    def __init__(self, uri: str, experiment: str, artifacts: Path | None = None) -> None:
        """`artifacts` is where a new experiment of a plain database keeps its files; a tracking server has its own place."""
        self.client = open_client(uri)
        with _opening_lock(uri):
            self.experiment_id = self._find_or_create_experiment(uri, experiment, artifacts)

    def open_run(self, record_id: str, name: str, start_ms: int) -> str:
        """The id of the run that holds this record; created where there is none."""
        found = self._run_of(record_id)
        if found is not None:
            return found
        tags = {RECORD_ID_TAG: record_id, "mlflow.user": "raydistill", "mlflow.source.name": "raydistill"}
        return str(
            self.client.create_run(self.experiment_id, start_time=start_ms, tags=tags, run_name=name).info.run_id
        )

    def link(self, run_id: str, parent: str) -> bool:
        """Put a run below the one that holds the record `parent`; False where that one is not there yet."""
        found = self._run_of(parent)
        if found is not None:
            self.client.set_tag(run_id, PARENT_TAG, found)
        return found is not None

    def adopt(self, run_id: str, replaced: str) -> None:
        """Put the runs that lie below `replaced` below this one."""
        below = f"tags.`{PARENT_TAG}` = '{replaced}'"
        # A page at a time: those that moved are not found again.
        while found := self.client.search_runs([self.experiment_id], below):
            for run in found:
                self.client.set_tag(run.info.run_id, PARENT_TAG, run_id)

    def has_run(self, run_id: str) -> bool:
        """True if the run is in this store, in this experiment and not deleted."""
        from mlflow.exceptions import MlflowException

        try:
            info = self.client.get_run(run_id).info
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise
        return info.lifecycle_stage == "active" and info.experiment_id == self.experiment_id

    def delete_run(self, run_id: str) -> None:
        """Hide a run that no longer tells what its record tells."""
        self.client.delete_run(run_id)

    def refuses(self, error: Exception) -> bool:
        """True if the store will never take what caused this error, so that trying again is no use."""
        return getattr(error, "error_code", None) == "INVALID_PARAMETER_VALUE"

    def put(self, run_id: str, parcel: Parcel, end_ms: int | None = None) -> None:
        """Write a parcel; writing the same one again changes nothing (MLflow keeps equal points once)."""
        from mlflow.entities import Param, RunTag

        for params in _pieces(list(parcel.params.items()), MAX_PARAMS):
            self.client.log_batch(run_id, params=[Param(key, value) for key, value in params])
        for tags in _pieces(list(parcel.tags.items()), MAX_PARAMS):
            self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags])
        for points in _pieces(parcel.points, MAX_POINTS):
            self._put_points(run_id, points)
        for path, text in parcel.texts.items():
            self.client.log_text(run_id, text, path)
        for file in parcel.files.values():
            if file.is_file():  # it may be gone by now: the record keeps its path
                self.client.log_artifact(run_id, str(file))
        if parcel.status == "RUNNING":
            self.client.update_run(run_id, status="RUNNING")
        elif parcel.status:
            self.client.set_terminated(run_id, status=parcel.status, end_time=end_ms)

    def _run_of(self, record_id: str) -> str | None:
        found = self.client.search_runs([self.experiment_id], f"tags.`{RECORD_ID_TAG}` = '{record_id}'", max_results=1)
        return str(found[0].info.run_id) if found else None

    def _put_points(self, run_id: str, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(point.key, point.value, point.time_ms, point.step) for point in points]
        self.client.log_batch(run_id, metrics=metrics)

    def _find_or_create_experiment(self, uri: str, name: str, artifacts: Path | None) -> str:
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(name)
        if found is None:
            database = sqlite_path(uri)
            folder = database.absolute().parent / "artifacts" if database else artifacts
            place = None if folder is None or uri.startswith("http") else str(folder)
            try:
                return str(self.client.create_experiment(name, artifact_location=place))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = self.client.get_experiment_by_name(name)
        assert found is not None
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)


def open_client(uri: str) -> MlflowClient:
    """An MLflow client whose store exists; simultaneous first openings of one database wait for each other."""
    for key, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import logging

    logging.getLogger("alembic").setLevel(logging.WARNING)
    from mlflow import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.ERROR)
    with _opening_lock(uri):
        client = MlflowClient(uri)
        client.search_experiments(max_results=1)  # creates the tables of a new database
    return client


@contextmanager
def _opening_lock(uri: str) -> Iterator[None]:
    """One process at a time: two that create the tables of one database together crash in MLflow's migration."""
    if uri.startswith("http"):
        yield  # a server opens its database itself
        return
    database = sqlite_path(uri)
    if database:
        database.parent.mkdir(parents=True, exist_ok=True)
        lock_file = database.with_name(database.name + ".lock")
    else:
        digest = hashlib.sha256(uri.encode()).hexdigest()[:16]
        lock_file = Path(tempfile.gettempdir()) / f"raydistill-results-{digest}.lock"
    with FileLock(lock_file, timeout=_LOCK_TIMEOUT_S):
        yield


def _pieces(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
