"""Where a run's record can go beside the results store: TensorBoard's event files and W&B, through their own libraries.

The delivery process feeds them from the same lines as the store. Neither keeps equal points once, as the store does, so a
sink is filled from the beginning whenever its delivery begins anew: each event file, each W&B run holds every point once.
"""

from __future__ import annotations

import logging
import shutil
import sys
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from raydistill.config import ResultsSection
from raydistill.errors import UserError
from raydistill.results.provenance import scrub
from raydistill.results.reachable import check_uri
from raydistill.results.translate import Parcel

_FINAL = "complete"  # in a sink's folder: the run_id that it holds to its end
_NEEDS = {"tensorboard": ("tensorboardX", "tensorboardX"), "wandb": ("wandb", "wandb")}
"""sink -> what it imports, what pip calls that."""


class Sink(ABC):
    """A run in a sink; what a `Delivery` needs of a store."""

    def __init__(self, folder: Path, experiment: str) -> None:
        self.folder, self.experiment = folder, experiment
        self._run_id: str | None = None

    @abstractmethod
    def begin(self, record_id: str, name: str) -> None:
        """Make a new, empty run."""

    @abstractmethod
    def write(self, parcel: Parcel) -> None:
        """Append; what returns is on the disk or with the library's own process."""

    @abstractmethod
    def close(self, exit_code: int | None) -> None:
        """Close what is open; `exit_code` where the run has ended."""

    def open_run(self, record_id: str, name: str, start_ms: int) -> str:
        self.close(None)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.begin(record_id, name)
        self._run_id = uuid.uuid4().hex
        return self._run_id

    def link(self, run_id: str, parent: str) -> bool:
        return True  # neither has runs below runs

    def adopt(self, run_id: str, replaced: str) -> None:  # noqa: B027 - nor is anything to be moved
        pass

    def has_run(self, run_id: str) -> bool:
        return run_id == self._run_id or run_id == self._held_to_its_end()

    def delete_run(self, run_id: str) -> None:
        self.close(None)
        shutil.rmtree(self.folder, ignore_errors=True)
        self._run_id = None

    def refuses(self, error: Exception) -> bool:
        return False

    def put(self, run_id: str, parcel: Parcel, end_ms: int | None = None) -> None:
        self.write(parcel)
        if parcel.status in ("FINISHED", "FAILED", "KILLED"):
            self.close(0 if parcel.status == "FINISHED" else 1)
            (self.folder / _FINAL).write_text(run_id)

    def _held_to_its_end(self) -> str | None:
        try:
            return (self.folder / _FINAL).read_text()
        except OSError:
            return None


class TensorBoard(Sink):
    """Event files in `<run>/tensorboard`, for `tensorboard --logdir outputs/runs`."""

    _writer: Any = None

    def begin(self, record_id: str, name: str) -> None:
        self._open()

    def write(self, parcel: Parcel) -> None:
        """By the library's plain writer: what its SummaryWriter has flushed may still wait in its queue."""
        _import_without_torch()
        from tensorboardX.summary import scalar, text

        last_s = parcel.points[-1].time_ms / 1000 if parcel.points else time.time()
        for point in parcel.points:
            self._add(scalar(point.key, point.value), point.step, point.time_ms / 1000)
        texts = {path: f"```json\n{body}\n```" for path, body in parcel.texts.items() if path.endswith(".json")}
        if parcel.params:
            texts["config"] = _markdown(parcel.params)
        if "last_warning" in parcel.tags:
            texts["last_warning"] = parcel.tags["last_warning"]
        for tag, body in texts.items():
            self._add(text(tag, body), 0, last_s)
        self._open().flush()

    def close(self, exit_code: int | None) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _add(self, summary: Any, step: int, time_s: float) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._open().write_event(Event(summary=summary, step=step, wall_time=time_s))

    def _open(self) -> Any:
        if self._writer is None:
            _import_without_torch()
            from tensorboardX.event_file_writer import EventsWriter

            self._writer = EventsWriter(str(self.folder / "events"), f".{uuid.uuid4().hex[:8]}")
        return self._writer


class WeightsAndBiases(Sink):
    """A W&B run whose project is the experiment; where it goes is W&B's own business (WANDB_MODE, WANDB_API_KEY).

    Each metric has its step (or policy version) as its own axis: W&B's own step may not go back, and an evaluation is
    recorded after steps that are later than its version.
    """

    _run: Any = None

    def begin(self, record_id: str, name: str) -> None:
        import wandb

        self._run = wandb.init(
            project=self.experiment,
            name=name,
            group=record_id,  # all W&B runs that were filled from one record
            id=uuid.uuid4().hex[:16],
            dir=str(self.folder),
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off", disable_git=True, x_disable_stats=True),
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def write(self, parcel: Parcel) -> None:
        if self._run is None:
            return  # the record has grown after its end, which only a resume does, and that begins anew
        if parcel.params:
            self._run.config.update(parcel.params)
        rows: dict[tuple[int, int], dict[str, float]] = {}
        for point in parcel.points:
            rows.setdefault((point.time_ms, point.step), {})[point.key] = point.value
        for (_, step), values in rows.items():
            self._run.log({**values, "step": step})
        for key in ("last_warning", "end_message"):
            if key in parcel.tags:
                self._run.summary[key] = parcel.tags[key]

    def close(self, exit_code: int | None) -> None:
        if self._run is not None:
            self._run.finish(exit_code=exit_code or 0)
            self._run = None


SINKS: Mapping[str, type[Sink]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def open_sink(name: str, run_folder: Path, experiment: str) -> Callable[[], Sink]:
    """What makes the sink of a run when it is needed; its files lie in `<run>/<name>`."""
    return lambda: SINKS[name](run_folder / name, experiment)


def sink_state_file(name: str) -> str:
    """The file in a run's folder that says how far a sink came."""
    return f"delivered-{name}.json"


def check_results(results: ResultsSection) -> str:
    """A line about where the results go; UserError if the store cannot be one, or if a sink's library is missing."""
    if results.uri is not None:
        check_uri(results.uri)
    for name in results.sinks:
        module, package = _NEEDS[name]
        if find_spec(module) is None:
            raise UserError(
                f"results.sinks names {name!r}, which needs a package that is not installed: pip install {package}, or leave "
                f"{name!r} out of results.sinks"
            )
    store = scrub(results.uri) if results.uri else "results.db under run.output"
    return f"go to {', '.join([store, *results.sinks])}"


def _import_without_torch() -> None:
    """tensorboardX imports torch where it finds it, for tensors we have none of: seconds, and 200 MB."""
    if "tensorboardX" in sys.modules:
        return
    blocked = "torch" not in sys.modules
    if blocked:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        import tensorboardX  # noqa: F401
    finally:
        if blocked:
            del sys.modules["torch"]
    logging.getLogger("tensorboardX").setLevel(logging.ERROR)  # it complains about each NaN


def _markdown(settings: Mapping[str, str]) -> str:
    rows = [f"| {key} | {value} |".replace("\n", " ") for key, value in settings.items()]
    return "\n".join(["| setting | value |", "|---|---|", *rows])
