"""Keeps the results store up to date with the records of runs, in a process of its own: training never waits for it.

`start_delivery` is what a driver calls; `python -m raydistill.results.deliver runs/NAME` delivers (again) by hand.
A store that is down is tried again with growing pauses; the record stays, so nothing is lost but time.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from raydistill.results.courier import Courier, Destination, retry_command
from raydistill.results.delivery import STATE_FILE, Store, log, read_state
from raydistill.results.provenance import HIDDEN, scrub
from raydistill.results.record_lines import start_of
from raydistill.results.run_folders import record_folders
from raydistill.results.sinks import SINKS, sink_state_file
from raydistill.results.store import QUIET_ENVIRONMENT, ResultsStore, default_uri

__all__ = ["DeliveryHandle", "deliver", "deliver_all", "retry_command", "start_delivery"]
GIVE_UP_S = 120.0  # how long a store may stay down once no more lines will come
LOG_FILE = "delivery.log"
FINISH_S = 60.0  # how long a driver waits for the rest of its record to be delivered
_TERMINATE_S = 5.0


def deliver(
    folder: Path,
    uri: str,
    experiment: str,
    follow: bool = False,
    *,
    sinks: Sequence[str] = (),
    writer_gone: threading.Event | None = None,
    open_store: Callable[[], Store] | None = None,
    give_up_s: float = GIVE_UP_S,
) -> bool:
    """Bring the store and the sinks up to date with one run's record; True if they are.

    `follow` goes on until the record's `end` line, or until `writer_gone` is set (the driver died: the run is marked
    KILLED). Only one process delivers a run at a time; a second one waits for the first.
    """
    destination = Destination(uri=uri, experiment=experiment, sinks=tuple(sinks), artifacts=_artifacts(folder))
    return Courier(
        lambda: [folder],
        lambda _: destination,
        lambda _: open_store() if open_store else _open(destination),
        follow=follow,
        many=False,
        writer_gone=writer_gone or threading.Event(),
        give_up_s=give_up_s,
    ).run()


def deliver_all(
    under: Path,
    uri: str | None = None,
    follow: bool = False,
    *,
    writer_gone: threading.Event | None = None,
    family_of: Path | None = None,
    open_store: Callable[[Destination], Store] | None = None,
    give_up_s: float = GIVE_UP_S,
) -> bool:
    """The same for every run folder in `under` (or in its `runs/` and `sweeps/`), each to the store that its own record names.

    `uri` is for the records that name none, or that name this one without its password. `follow` also takes up the runs
    that are still to come, until `writer_gone` is set. family_of: the folder of a record; only it and those that belong to
    it (their `parent` is its record id) are delivered.
    """
    skipped: set[Path] = set()

    def destination_of(folder: Path) -> Destination | None:
        try:
            return destination_in_record(folder, uri)
        except ValueError as error:
            if folder not in skipped:
                log(f"left out: {error}")
            skipped.add(folder)
            return None

    return Courier(
        _Family(family_of, under).folders if family_of else lambda: record_folders(under),
        destination_of,
        open_store or _open,
        follow=follow,
        many=True,
        writer_gone=writer_gone or threading.Event(),
        give_up_s=give_up_s,
    ).run()


class _Family:
    """A record's folder, and those of the runs in a folder that belong to it."""

    def __init__(self, head: Path, under: Path) -> None:
        self._head, self._under = head, under
        self._belongs: dict[Path, bool] = {}  # a start line does not change

    def folders(self) -> list[Path]:
        head = start_of(self._head)
        if head is None:
            return []
        for folder in record_folders(self._under):
            if folder not in self._belongs and (start := start_of(folder)) is not None:
                self._belongs[folder] = start.get("parent") == head["record_id"]
        return [self._head, *(folder for folder, belongs in self._belongs.items() if belongs)]


def destination_in_record(folder: Path, uri: str | None = None) -> Destination | None:
    """Where a run's record says that it goes; None where it has no start line yet, ValueError where it cannot be known."""
    start = start_of(folder)
    if start is None:
        return None
    chosen = start.get("config", {}).get("results", {})
    named = chosen.get("uri")
    if named is None or named == scrub(uri):
        named = uri or default_uri(folder.parent.parent)
    if HIDDEN in named:
        raise ValueError(
            f"the record of {folder} does not keep the password of {named}; give the whole address with --uri"
        )
    experiment = chosen.get("experiment") or "raydistill"
    sinks = tuple(chosen.get("sinks") or ())
    return Destination(uri=named, experiment=experiment, sinks=sinks, artifacts=_artifacts(folder))


def _artifacts(folder: Path) -> Path:
    """Beside `runs/`: without a place of its own, MLflow would write into whatever folder the driver was started in."""
    return folder.absolute().parent.parent / "artifacts"


def _open(destination: Destination) -> Store:
    return ResultsStore(destination.uri, destination.experiment, destination.artifacts)


@dataclass(slots=True)
class DeliveryHandle:
    """The running delivery process of one run, or of all runs in a folder."""

    folder: Path
    process: subprocess.Popen[str]
    is_late: bool = False  # `finish` has ended it before it was done

    @property
    def problem(self) -> str | None:
        """Why the store (or a sink) is behind, one line; None while all is well."""
        return self._told or self._silent

    @property
    def _told(self) -> str | None:
        files = [STATE_FILE, *(sink_state_file(name) for name in SINKS)]
        states = [read_state(folder, file) for folder in (self.folder, *record_folders(self.folder)) for file in files]
        return next((state.problem for state in states if state.problem), None)

    @property
    def _silent(self) -> str | None:
        """The same of a process that has ended without a word in any run's folder."""
        if self.is_late:
            return "not all was there in time"
        code = self.process.poll()
        return f"its process ended with exit code {code}, see {self.folder / LOG_FILE}" if code else None

    def finish(self, timeout_s: float = FINISH_S) -> bool:
        """Say that the records are complete, wait for the rest to be delivered; False if it was not in time.

        After False the records are still whole: `retry_command(folder)` delivers what is missing.
        """
        if self.process.stdin and not self.process.stdin.closed:
            with suppress(OSError):  # it has ended already
                self.process.stdin.close()
        try:
            return self.process.wait(timeout_s) == 0
        except subprocess.TimeoutExpired:
            self.is_late = True
            self.process.terminate()
            try:
                self.process.wait(min(_TERMINATE_S, timeout_s))
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            return False


def start_delivery(
    folder: Path,
    uri: str,
    experiment: str,
    sinks: Sequence[str] = (),
    under: bool = False,
    family_of: Path | None = None,
) -> DeliveryHandle:
    """Start the process that follows this run's record; it ends by itself when the driver ends or dies.

    With `under` it follows every run in `folder` (or in its `runs/`) as they appear, or with `family_of` its record and
    those that belong to it: one process, and one import of mlflow, for all trials of a sweep. Experiment and sinks are then
    those that each record names. The URI goes through the pipe and not on the command line, where every user of the machine
    could read a password.
    """
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    packages = str(Path(__file__).resolve().parents[2])
    paths = [packages, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | QUIET_ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(paths)}
    what = ["--under", str(folder)] if under else [str(folder)]
    with (folder / LOG_FILE).open("a") as log_file:
        process = subprocess.Popen(
            [sys.executable, "-m", "raydistill.results.deliver", *what, "--from-driver"],
            stdin=subprocess.PIPE,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=folder,  # the driver's own may go away: Ray unpacks a job's folder again for each node of one machine
            start_new_session=True,  # Ctrl-C reaches the driver only; this one sees its pipe close
        )
    assert process.stdin is not None
    told = asdict(Destination(uri=uri, experiment=experiment, sinks=tuple(sinks)))
    process.stdin.write(json.dumps(told | {"family_of": str(family_of.absolute()) if family_of else None}) + "\n")
    process.stdin.flush()
    return DeliveryHandle(folder, process)


def _watch_pipe(writer_gone: threading.Event) -> None:
    sys.stdin.read()  # returns when the driver closes its end or dies
    writer_gone.set()


def main(argv: Sequence[str] | None = None) -> int:
    """Deliver records from the command line; exit code 0 if the store has all of it."""
    arguments = _parser().parse_args(argv)
    if (arguments.folder is None) == (arguments.under is None):
        print("give the folder of a run (outputs/runs/NAME), or --under and a folder of many", file=sys.stderr)
        return 2
    folder: Path = (arguments.under or arguments.folder).absolute()
    writer_gone, follow = threading.Event(), arguments.follow or arguments.from_driver
    family_of: str | None = None
    if arguments.from_driver:
        os.nice(5)  # training comes first
        told = json.loads(sys.stdin.readline())
        family_of = told.pop("family_of")
        to = Destination(**told)
        threading.Thread(target=_watch_pipe, args=(writer_gone,), daemon=True).start()
    elif not arguments.under:
        try:
            found = destination_in_record(folder, arguments.uri)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        if found is None:
            print(f"{folder} holds no record.jsonl; give the folder of a run: outputs/runs/NAME", file=sys.stderr)
            return 2
        uri, experiment = arguments.uri or found.uri, arguments.experiment or found.experiment
        to = Destination(uri=uri, experiment=experiment, sinks=found.sinks)
    if arguments.under:
        uri = to.uri if arguments.from_driver else arguments.uri
        family = Path(family_of) if family_of else None
        done = deliver_all(folder, uri, follow, writer_gone=writer_gone, family_of=family)
    else:
        done = deliver(folder, to.uri, to.experiment, follow, sinks=to.sinks, writer_gone=writer_gone)
    log(f"{'delivered' if done else 'not delivered'}: {folder.name}")
    return 0 if done else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m raydistill.results.deliver",
        description="Fill the results store (and results.sinks) from the records of runs. Doing it again is harmless: "
        "nothing is stored twice.",
    )
    parser.add_argument(
        "folder", type=Path, nargs="?", help="the run's folder, which holds record.jsonl: outputs/runs/NAME"
    )
    parser.add_argument(
        "--under",
        type=Path,
        metavar="FOLDER",
        help="every run in FOLDER (or in its runs/ and sweeps/), each to its own store",
    )
    parser.add_argument("--uri", help="MLflow tracking URI; default: the one of the run")
    parser.add_argument("--experiment", help="MLflow experiment; default: the one of the run")
    parser.add_argument("--follow", action="store_true", help="go on until the run ends; with --under until Ctrl-C")
    parser.add_argument("--from-driver", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    atexit.register(gc.freeze)  # as in raydistill.cli
    sys.exit(main())
