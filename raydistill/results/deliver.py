"""Keeps the results store up to date with a run's record, in a process of its own: training never waits for it.

`start_delivery` is what the driver calls; `python -m raydistill.results.deliver runs/NAME` delivers (again) by hand.
A store that is down is tried again with growing pauses; the record stays, so nothing is lost but time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from raydistill.results.delivery import Delivery, Store, log, read_state
from raydistill.results.provenance import HIDDEN, scrub
from raydistill.results.record_lines import read_record
from raydistill.results.store import QUIET_ENVIRONMENT, ResultsStore, default_uri

POLL_S = 1.0
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
GIVE_UP_S = 120.0  # how long a store may stay down once no more lines will come
LOG_FILE = "delivery.log"
_TERMINATE_S = 5.0


def deliver(
    folder: Path,
    uri: str,
    experiment: str,
    follow: bool = False,
    *,
    writer_gone: threading.Event | None = None,
    open_store: Callable[[], Store] | None = None,
    give_up_s: float = GIVE_UP_S,
) -> bool:
    """Bring the store up to date with the record; True if it is.

    `follow` goes on until the record's `end` line, or until `writer_gone` is set (the driver died: the run is marked
    KILLED). Only one process delivers a run at a time; a second one waits for the first.
    """
    writer_gone = writer_gone or threading.Event()
    digest = hashlib.sha256(f"{uri}\n{experiment}".encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "delivered.lock", timeout=2 * give_up_s):
            delivery = Delivery(folder, digest, open_store or (lambda: ResultsStore(uri, experiment)))
            return _keep_delivering(delivery, follow, writer_gone, give_up_s)
    except Timeout:
        log(f"another process is still delivering {folder}; leaving it to that one")
        return False


def _keep_delivering(delivery: Delivery, follow: bool, writer_gone: threading.Event, give_up_s: float) -> bool:
    pause_s, failing_since, problem = FIRST_PAUSE_S, None, None
    while True:
        no_more_lines = writer_gone.is_set() or not follow  # asked before reading: lines written since are read below
        try:
            has_ended = delivery.advance()
            if has_ended or not follow:
                return True
            if no_more_lines:
                delivery.mark_killed()
                return True
            pause_s, failing_since, problem = FIRST_PAUSE_S, None, None
            writer_gone.wait(POLL_S)
        except Exception as error:  # any failure of store, driver or network: the record is safe, try again
            failing_since = failing_since or time.monotonic()
            text = delivery.failed(error)
            if text != problem:
                log(f"the results store does not answer, trying again: {text}")
                problem = text
            if no_more_lines and time.monotonic() - failing_since > give_up_s:
                log(f"giving up; deliver it later with: {retry_command(delivery.folder)}")
                return False
            _pause(min(pause_s, give_up_s), writer_gone)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def _pause(seconds: float, writer_gone: threading.Event) -> None:
    """Sleep, but not long once the driver waits for us."""
    if writer_gone.is_set():
        time.sleep(min(seconds, 5.0))
    else:
        writer_gone.wait(seconds)


def retry_command(folder: Path) -> str:
    """What a user types to deliver a record later."""
    return f"python -m raydistill.results.deliver {folder}"


@dataclass(slots=True)
class DeliveryHandle:
    """The running delivery process of one run."""

    folder: Path
    process: subprocess.Popen[str]

    @property
    def problem(self) -> str | None:
        """Why the store is behind, one line; None while all is well."""
        return read_state(self.folder).problem

    def finish(self, timeout_s: float = 60.0) -> bool:
        """Say that the record is complete, wait for the rest to be delivered; False if it was not in time.

        After False the record is still whole: `retry_command(folder)` delivers what is missing.
        """
        if self.process.stdin and not self.process.stdin.closed:
            with suppress(OSError):  # it has ended already
                self.process.stdin.close()
        try:
            return self.process.wait(timeout_s) == 0
        except subprocess.TimeoutExpired:
            self.process.terminate()
            try:
                self.process.wait(_TERMINATE_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            return False


def start_delivery(folder: Path, uri: str, experiment: str) -> DeliveryHandle:
    """Start the process that follows this run's record; it ends by itself when the driver ends or dies.

    The URI goes through the pipe and not on the command line, where every user of the machine could read a password.
    """
    folder.mkdir(parents=True, exist_ok=True)
    packages = str(Path(__file__).resolve().parents[2])
    paths = [packages, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | QUIET_ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(paths)}
    with (folder / LOG_FILE).open("a") as log_file:
        process = subprocess.Popen(
            [sys.executable, "-m", "raydistill.results.deliver", str(folder), "--from-driver"],
            stdin=subprocess.PIPE,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the driver only; this one sees its pipe close
        )
    assert process.stdin is not None
    process.stdin.write(json.dumps({"uri": uri, "experiment": experiment}) + "\n")
    process.stdin.flush()
    return DeliveryHandle(folder, process)


def _watch_pipe(writer_gone: threading.Event) -> None:
    sys.stdin.read()  # returns when the driver closes its end or dies
    writer_gone.set()


def main(argv: Sequence[str] | None = None) -> int:
    """Deliver one run's record from the command line; exit code 0 if the store has all of it."""
    parser = argparse.ArgumentParser(
        prog="python -m raydistill.results.deliver",
        description="Fill the results store from a run's record. Doing it again is harmless: nothing is stored twice.",
    )
    parser.add_argument("folder", type=Path, help="the run's folder, which holds record.jsonl: outputs/runs/NAME")
    parser.add_argument("--uri", help="MLflow tracking URI; default: the one of the run")
    parser.add_argument("--experiment", help="MLflow experiment; default: the one of the run")
    parser.add_argument("--follow", action="store_true", help="go on until the run ends")
    parser.add_argument("--from-driver", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    folder: Path = arguments.folder.absolute()
    uri, experiment, writer_gone = arguments.uri, arguments.experiment, threading.Event()
    if arguments.from_driver:
        os.nice(5)  # training comes first
        told = json.loads(sys.stdin.readline())
        uri, experiment = told["uri"], told["experiment"]
        threading.Thread(target=_watch_pipe, args=(writer_gone,), daemon=True).start()
    else:
        start = next(read_record(folder), None)
        if start is None:
            print(f"{folder} holds no record.jsonl; give the folder of a run: outputs/runs/NAME", file=sys.stderr)
            return 2
        chosen = start.get("config", {}).get("results", {})
        uri = uri or chosen.get("uri") or default_uri(folder.parent.parent)
        experiment = experiment or chosen.get("experiment") or "raydistill"
        if HIDDEN in uri:
            print(f"the record does not keep the password of {uri}; give the whole address with --uri", file=sys.stderr)
            return 2
    done = deliver(folder, uri, experiment, arguments.follow or arguments.from_driver, writer_gone=writer_gone)
    log(f"{'delivered' if done else 'not delivered'}: {folder.name} -> {scrub(uri)}")
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
