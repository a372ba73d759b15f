"""The truth about one run: an append-only `record.jsonl` in the run folder.

One JSON object per line, always with `kind` and `time_s` (seconds since the epoch), flushed before the method
returns. A line counts only with its newline, so a line torn by a crash is as if it was never written. The store
(MLflow) is filled from this file by another process and can always be filled again.

Order: `start` once; then `step`, `spans`, `evaluation`, `samples`, `sync`, `warning`, `table`, `artifact` in any order;
`end`.
A resumed run opens the same folder and calls `cut_back(step)` with the first step it will do again.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Self

from raydistill.errors import disk_errors
from raydistill.messages import EvalReport, LoadReport, Span
from raydistill.results.provenance import scrub
from raydistill.results.record_lines import (
    RECORD_FILE,
    Line,
    cut_line,
    encode_line,
    open_after_last_line,
    read_record,
    read_spans,
    write_whole,
)
from raydistill.results.translate import leaves

__all__ = ["RunRecord", "read_record", "read_spans"]
Status = Literal["finished", "failed", "interrupted"]


class RunRecord:
    """Writes one run's record; safe to call from several threads, not from several processes."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / RECORD_FILE
        self._lock = threading.Lock()
        with self._disk_errors():
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open_after_last_line(self.path)
        self._steps: set[int] = set()
        self._evaluated: set[int] = set()
        self._sampled: set[int] = set()
        self._started = False
        for line in read_record(folder):
            self._remember(line)

    @property
    def is_started(self) -> bool:
        """True where an earlier life of this run wrote the start line: the run is being resumed."""
        return self._started

    @property
    def last_step(self) -> int | None:
        """The highest step in the record."""
        return max(self._steps, default=None)

    def start(
        self,
        *,
        name: str,
        config: Mapping[str, Any],
        provenance: Mapping[str, Any],
        seed: int,
        data_fingerprint: str | None = None,
        held_out_fingerprint: str | None = None,
        parent: str | None = None,
    ) -> None:
        """What this run is, written once; `provenance` comes from `provenance.collect()`. Secrets are removed.

        `cut_back` may set the config anew.
        `parent` is the `record_id` of the record that this run belongs to, such as its sweep's.
        """
        assert not self._started, f"{self.path} already has its start line; a resumed run calls cut_back"
        facts = {"config": scrub(dict(config)), "provenance": scrub(dict(provenance))}
        prints = {"data_fingerprint": data_fingerprint, "held_out_fingerprint": held_out_fingerprint}
        self._append("start", name=name, record_id=uuid.uuid4().hex, parent=parent, seed=seed, **prints, **facts)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """The metrics of one optimizer step; each step once."""
        assert step not in self._steps, f"step {step} is already in {self.path}; cut_back comes before replayed steps"
        self._append("step", step=step, metrics=dict(metrics))

    def spans(self, spans: Sequence[Span]) -> None:
        """Who was busy when."""
        if spans:
            self._append("spans", spans=[asdict(span) for span in spans])

    def evaluation(self, report: EvalReport) -> bool:
        """Held-out quality with its span; a version that is already recorded is left as it is (False)."""
        if report.version in self._evaluated:
            return False
        self._append("evaluation", **asdict(report))
        return True

    def samples(self, version: int, rows: Sequence[Mapping[str, str]]) -> bool:
        """What a version writes, beside the reference and the teacher: `{row_id, prompt, reference, teacher, student}`.

        As with evaluations, a version that is already recorded is left as it is (False).
        """
        if version in self._sampled:
            return False
        self._append("samples", version=version, rows=[dict(row) for row in rows])
        return True

    def sync(self, report: LoadReport) -> None:
        """What one engine said after loading a version."""
        self._append("sync", **asdict(report))

    def warning(self, text: str, step: int | None = None) -> None:
        """Something a reader of the results should know; stays through a resume."""
        self._append("warning", text=scrub(text), step=step)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], markdown: str | None = None) -> None:
        """A small table, for example the final comparison."""
        self._append("table", name=name, rows=[dict(row) for row in rows], markdown=markdown)

    def artifact(self, name: str, path: Path) -> None:
        """A file (copied to the store) or a folder such as a checkpoint (the store keeps its path only)."""
        self._append("artifact", name=name, path=str(path.absolute()))

    def end(self, status: Status, message: str | None = None) -> None:
        """The last line of this life of the run."""
        self._append("end", status=status, message=scrub(message) if message else None)
        with self._disk_errors():
            os.fsync(self._file.fileno())

    def cut_back(self, step: int, config: Mapping[str, Any] | None = None) -> None:
        """Forget everything that a run resumed at `step` does again; atomic: a crash leaves the old or the new file.

        Kept: steps and spans below `step`, evaluations and samples of versions up to `step`, syncs of versions below
        it (the resumed run loads version `step` anew), warnings, artifacts, and the start.

        `config`: the settings that the run goes on with. From here on they are those of the start line, which every reader
        asks; the resume line has what they were before, where they differ.
        """
        with self._lock, self._disk_errors():
            self._file.close()
            kept = [cut for line in read_record(self.path.parent) if (cut := cut_line(line, step)) is not None]
            changed = {} if config is None else _set_anew(kept, scrub(dict(config)))
            kept.append({"kind": "resume", "time_s": time.time(), "step": step, "changed": changed})
            temporary = self.path.with_suffix(".cut")
            with temporary.open("wb") as file:
                file.write(b"".join(encode_line(line) for line in kept))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
            self._file = open_after_last_line(self.path)
            self._steps, self._evaluated, self._sampled, self._started = set(), set(), set(), False
            for line in kept:
                self._remember(line)

    def close(self) -> None:
        """Close the file; the record can be opened again."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, kind: str, **facts: Any) -> None:
        line = {"kind": kind, "time_s": time.time(), **facts}
        data = encode_line(line)
        with self._lock, self._disk_errors():
            write_whole(self._file, data)
            self._remember(line)

    def _disk_errors(self) -> AbstractContextManager[None]:
        return disk_errors(f"the run's record {self.path}")

    def _remember(self, line: Line) -> None:
        if line["kind"] == "start":
            self._started = True
        elif line["kind"] == "step":
            self._steps.add(line["step"])
        elif line["kind"] == "evaluation":
            self._evaluated.add(line["version"])
        elif line["kind"] == "samples":
            self._sampled.add(line["version"])


def _set_anew(lines: Sequence[Line], config: dict[str, Any]) -> dict[str, Any]:
    """Put other settings into the start line; returns those that change: `{"trainer.num_steps": {"was": 3, "is": 5}}`."""
    for line in lines:
        if line["kind"] == "start":
            was, now = leaves(line["config"]), leaves(config)
            names = sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))
            if names:
                line["config"] = config
            return {name: {"was": was.get(name), "is": now.get(name)} for name in names}
    return {}
