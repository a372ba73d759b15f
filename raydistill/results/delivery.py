"""One record on its way to one store: what was delivered, what comes next, and what to do when the record was cut.

Reads `record.jsonl` from where it stopped (`delivered.json`), writes in batches, and says in `delivered.json` how far
it came. A point is delivered neither twice (the store keeps equal points once) nor lost (the place moves on only
after the store took everything before it). If a resumed run cut back lines that were already delivered, the old
MLflow run is hidden and a new one is filled from the record, which takes over the runs below it. A run that belongs to
another one is put below it as soon as the store has that one. Retrying is the caller's work (`courier.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

from raydistill.results.provenance import scrub
from raydistill.results.record_lines import RECORD_FILE, Line, decode_line
from raydistill.results.runs import RUN_TAG
from raydistill.results.store import MAX_POINTS
from raydistill.results.translate import Parcel

STATE_FILE = "delivered.json"


class Store(Protocol):
    """What a delivery needs of a results store, or of a sink."""

    def open_run(self, record_id: str, name: str, start_ms: int) -> str: ...
    def link(self, run_id: str, parent: str) -> bool: ...
    def adopt(self, run_id: str, replaced: str) -> None: ...
    def has_run(self, run_id: str) -> bool: ...
    def delete_run(self, run_id: str) -> None: ...
    def refuses(self, error: Exception) -> bool: ...
    def put(self, run_id: str, parcel: Parcel, end_ms: int | None = None) -> None: ...


@dataclass(slots=True, kw_only=True)
class State:
    """How far one record was delivered to one store."""

    store: str = ""  # which store and experiment this is about, as a digest
    run_id: str | None = None
    offset: int = 0
    prefix_sha256: str = hashlib.sha256().hexdigest()  # of the bytes before `offset`: tells a cut record
    num_points: int = 0
    num_warnings: int = 0
    waits_for: str | None = None  # record id of the run that this one belongs to, until the store has it
    replaced: list[str] = field(default_factory=list)  # earlier runs of this record that others may still lie below
    problem: str | None = None


class Delivery:
    """One record on its way to one store."""

    def __init__(
        self, folder: Path, store_digest: str, open_store: Callable[[], Store], state_file: str = STATE_FILE
    ) -> None:
        self.folder = folder
        self._open_store, self._state_file = open_store, state_file
        self._store: Store | None = None
        self._inode: int | None = None
        self._hash = hashlib.sha256()
        self._has_ended = False
        self.state = read_state(folder, state_file)
        if self.state.store != store_digest:
            self.state = State(store=store_digest)

    def advance(self) -> bool:
        """Deliver all whole lines there are; True if the last one ends the run. Raises what the store raises."""
        store = self._opened()
        path = self.folder / RECORD_FILE
        if not path.exists():
            return False
        with path.open("rb") as file:
            self._go_to_place(store, file)
            lines: list[Line] = []
            raw_size, num_points, has_ended = 0, 0, self._has_ended
            for raw in file:
                if not raw.endswith(b"\n"):
                    break
                lines.append(decode_line(raw))
                self._hash.update(raw)
                raw_size += len(raw)
                num_points += len(lines[-1].get("metrics", ()))
                has_ended = lines[-1]["kind"] == "end"
                if num_points >= MAX_POINTS:
                    self._put(store, lines, raw_size)
                    lines, raw_size, num_points = [], 0, 0
            if lines:
                self._put(store, lines, raw_size)
        self._relate(store)
        if self.state.problem:
            self._save(problem=None)
        self._has_ended = has_ended
        return has_ended

    def mark_killed(self) -> None:
        """The writer is gone without an `end` line."""
        if self.state.run_id:
            self._opened().put(self.state.run_id, Parcel(status="KILLED"), int(time.time() * 1000))

    def failed(self, error: Exception) -> str:
        """Note a failed attempt; the next one opens the store anew and starts from the last delivered line."""
        self._store, self._inode = None, None
        first_line = (str(error).strip().splitlines() or [""])[0][:300]
        problem: str = scrub(f"{type(error).__name__}: {first_line}")
        with suppress(
            OSError
        ):  # the full disk may be what failed; the place in memory goes to the file with the next attempt
            self._save(problem=problem)
        return problem

    def _opened(self) -> Store:
        if self._store is None:
            self._store = self._open_store()
            if self.state.run_id and not self._store.has_run(self.state.run_id):
                self._start_over()
        return self._store

    def _go_to_place(self, store: Store, file: BinaryIO) -> None:
        """Move to the first undelivered line; to the beginning if what was delivered is no longer in the record."""
        stat = os.fstat(file.fileno())
        if stat.st_ino == self._inode and stat.st_size >= self.state.offset:
            file.seek(self.state.offset)
            return
        prefix = file.read(self.state.offset)
        self._hash = hashlib.sha256(prefix)
        if len(prefix) < self.state.offset or self._hash.hexdigest() != self.state.prefix_sha256:
            if self.state.run_id:
                store.delete_run(self.state.run_id)
            self._start_over()
            file.seek(0)
        else:  # the `end` may be delivered already, by an earlier process or before a failure
            last = prefix[prefix.rfind(b"\n", 0, -1) + 1 :]
            self._has_ended = bool(last) and decode_line(last)["kind"] == "end"
        self._inode = stat.st_ino

    def _start_over(self) -> None:
        gone = [self.state.run_id] if self.state.run_id else []
        self.state = State(store=self.state.store, replaced=[*self.state.replaced, *gone])
        self._inode, self._hash, self._has_ended = None, hashlib.sha256(), False
        self._save(problem=None)

    def _relate(self, store: Store) -> None:
        """Put this run below the one that it belongs to, and below it what lay below the runs that it took the place of."""
        run_id = self.state.run_id
        if run_id and self.state.waits_for and store.link(run_id, self.state.waits_for):
            self.state.waits_for = None
            self._save(problem=None)
        if run_id and self.state.replaced:
            for one in self.state.replaced:
                if one != run_id:  # it may have been hidden and brought back by hand
                    store.adopt(run_id, one)
            self.state.replaced = []
            self._save(problem=None)

    def _put(self, store: Store, lines: list[Line], raw_size: int) -> None:
        if self.state.run_id is None:
            first = lines[0]
            record_id = first.get("record_id") or hashlib.sha256(repr(first).encode()).hexdigest()[:32]
            name = first.get("name") or self.folder.name
            self.state.run_id = store.open_run(record_id, name, int(first["time_s"] * 1000))
        parcel = self._pack(lines)
        end_ms = int(lines[-1]["time_s"] * 1000)
        try:
            store.put(self.state.run_id, parcel, end_ms)
        except Exception as error:
            if not store.refuses(error):
                raise
            self._put_one_by_one(store, lines, end_ms)
        self.state.num_points += len(parcel.points)
        self.state.num_warnings += parcel.num_warnings
        self.state.waits_for = parcel.parent or self.state.waits_for
        self.state.offset += raw_size
        self.state.prefix_sha256 = self._hash.hexdigest()
        self._save(problem=None)

    def _put_one_by_one(self, store: Store, lines: list[Line], end_ms: int) -> None:
        """The store refuses something in these lines: leave out only the line that it refuses."""
        assert self.state.run_id is not None
        for line in lines:
            try:
                store.put(self.state.run_id, self._pack([line]), end_ms)
            except Exception as error:
                if not store.refuses(error):
                    raise
                log(scrub(f"left out one line ({line['kind']}) that the store refuses: {error}"))

    def _pack(self, lines: list[Line]) -> Parcel:
        parcel = Parcel()
        for line in lines:
            parcel.add(line)
        if parcel.num_warnings:
            parcel.tags["num_warnings"] = str(self.state.num_warnings + parcel.num_warnings)
        if lines[0]["kind"] == "start":
            parcel.tags[RUN_TAG] = str(self.folder)
        if lines[-1]["kind"] == "end":
            parcel.files["record"] = self.folder / RECORD_FILE
        return parcel

    def _save(self, problem: str | None) -> None:
        self.state.problem = problem
        temporary = self.folder / (self._state_file + ".new")
        temporary.write_text(json.dumps(asdict(self.state), indent=1))
        os.replace(temporary, self.folder / self._state_file)


def read_state(folder: Path, state_file: str = STATE_FILE) -> State:
    """How far a record was delivered; a fresh state where nothing was."""
    try:
        return State(**json.loads((folder / state_file).read_text()))
    except (OSError, ValueError, TypeError):  # absent, torn or of another version: delivering again is harmless
        return State()


def log(text: str) -> None:
    """One line with the time on standard error, which the driver keeps in `delivery.log`."""
    with suppress(OSError):  # on a full disk delivering goes before telling
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", file=sys.stderr, flush=True)
