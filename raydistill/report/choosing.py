"""What the sub-verbs of `raydistill results` share: where the runs are, which of them are meant, their records."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from raydistill.errors import UserError
from raydistill.report.where import matching
from raydistill.results.query import find_run, list_runs, require_store
from raydistill.results.record_lines import RECORD_FILE, Line, read_record, require_start, start_of
from raydistill.results.runs import RunRow, row_of_record
from raydistill.results.store import default_uri, sqlite_path

WHERE_HELP = "only these, for example 'quant.format = \"int2\" and trainer.learning_rate > 1e-4 and kl < 0.01'"


def add_store_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the runs are: `--output`, `--uri`, `--experiment`."""
    parser.add_argument(
        "--output", type=Path, default=Path("outputs"), help="run.output of the runs (default: %(default)s)"
    )
    parser.add_argument("--uri", help="MLflow tracking URI, if results.uri was set; default: results.db under --output")
    parser.add_argument("--experiment", help="only this MLflow experiment (results.experiment of the runs)")


class Runs:
    """The runs that a command line can name; the store is read when the first name needs it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.uri: str = arguments.uri or default_uri(arguments.output)
        self._output: Path = arguments.output
        self._experiment: str | None = arguments.experiment
        self._rows: list[RunRow] | None = None

    def matching(self, where: str | None) -> list[RunRow]:
        """The runs of the store that satisfy a filter."""
        return matching(self._all(), where)

    def find(self, wanted: str) -> RunRow:
        """A run by its folder, or by name or the beginning of its id in the store."""
        if (Path(wanted) / RECORD_FILE).is_file():
            return _row_in(Path(wanted))
        database = sqlite_path(self.uri)
        folder = self._output / "runs" / wanted
        if database and not database.exists() and (folder / RECORD_FILE).is_file():
            return _row_in(folder)  # its delivery has not come so far yet
        if "/" in wanted:
            require_start(Path(wanted))
        return self._with_folder(find_run(self._all(), wanted))

    def record_of(self, run: RunRow) -> list[Line]:
        """All lines of a run's record: from its folder, else from the copy in the store that a run leaves at its end."""
        if run.folder is not None and _holds(run.folder, run.record_id):
            return list(read_record(run.folder))
        require_store(self.uri)
        from raydistill.results.store import open_client

        with tempfile.TemporaryDirectory() as there:
            try:
                open_client(self.uri).download_artifacts(run.id, RECORD_FILE, there)
            except Exception as error:  # each artifact store raises its own
                raise UserError(
                    f"the record of {run.name!r} is not at {run.folder} on this machine, and the store has no copy, which a "
                    f"run leaves at its end (it is {run.status}); give the run's folder where it can be read"
                ) from error
            return list(read_record(Path(there)))

    def _all(self) -> list[RunRow]:
        if self._rows is None:
            self._rows = list_runs(self.uri, self._experiment)
        return self._rows

    def _with_folder(self, run: RunRow) -> RunRow:
        """Where the run's folder lies now: output folders are moved and mounted elsewhere."""
        here = self._output / "runs" / run.name
        moved = not (run.folder and _holds(run.folder, run.record_id)) and _holds(here, run.record_id)
        return replace(run, folder=here.absolute()) if moved else run


def _row_in(folder: Path) -> RunRow:
    require_start(folder)
    return row_of_record(read_record(folder), folder.absolute())


def _holds(folder: Path, record_id: str) -> bool:
    start = start_of(folder)
    return start is not None and start.get("record_id") == record_id
