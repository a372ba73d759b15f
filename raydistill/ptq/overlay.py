"""llm-compressor in an environment of its own: start it, follow it, read what it made.

It needs other versions of transformers and compressed-tensors than raydistill, so `make ptq` lays an environment with those
over the main one, and runner.py runs there as a child process. Token ids go in, codes come back: both sides quantize the
same layers, and what is stored is written by raydistill alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raydistill.errors import ConfigError, RunError
from raydistill.ptq.calibration import Calibration
from raydistill.quant.formats import WeightFormat

if TYPE_CHECKING:
    from torch import Tensor

    from raydistill.quant.grid import QuantizedWeight

Method = Literal["gptq", "awq"]
OnProgress = Callable[[str, float], None]
"""Told (what is done now, grids done so far, with the share of the one at work)."""
ENVIRONMENT = ".venv-ptq"
BATCH_TOKENS = 8192  # of one forward pass over rows of equal length
RUNNER = Path(__file__).with_name("runner.py")
_KILLED = {-9: "was killed (for want of memory?)", 137: "was killed (for want of memory?)"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One method on one model, for several grids."""

    method: Method
    model: Path
    layers: tuple[str, ...]  # Hugging Face names
    grids: tuple[WeightFormat, ...]
    calibration: Calibration
    dtype: str | None  # in which the model computes; None: that of its config.json


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """What a method made of one grid."""

    fmt: WeightFormat
    codes: Mapping[str, QuantizedWeight]
    others: Mapping[str, Tensor]  # parameters beside the quantized ones that were changed (AWQ rescales norms)
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """Why a method has no answer for one grid."""

    fmt: WeightFormat
    reason: str
    seconds: float = 0.0


def find_interpreter(beside: Sequence[Path] | None = None) -> Path:
    """The python of `make ptq`: in the checkout, or beside the main environment; ConfigError where there is none."""
    places = beside or (Path(__file__).resolve().parents[2], Path(sys.prefix).parent)
    for place in places:
        python = place / ENVIRONMENT / "bin" / "python"
        if (place / ENVIRONMENT / ".installed").is_file() and python.is_file():
            return python
    raise ConfigError(
        "GPTQ and AWQ are llm-compressor's, which needs an environment of its own; set it up with `make ptq` in the checkout "
        f"({ENVIRONMENT}: 1 minute, 130 MB), or leave those methods out"
    )


def run_job(job: Job, log: Path, on_progress: OnProgress, python: Path | None = None) -> list[Calibrated | Failed]:
    """One answer for each grid, in order; RunError where the process cannot start its work.

    log: what the libraries print. Ends the child process on the way out, whatever happens; it also ends when this process does.
    """
    command = [str(python or find_interpreter()), "-P", "-E", str(RUNNER)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="raydistill-ptq-") as scratch, log.open("w") as stderr:
        job_file = Path(scratch) / "job.json"
        job_file.write_text(json.dumps(_plain(job, scratch)))
        process = subprocess.Popen(
            [*command, str(job_file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            cwd=scratch,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        try:
            return _Follower(job, Path(scratch), log, on_progress).follow(process)
        finally:
            process.kill()
            process.communicate()


def _plain(job: Job, out: str) -> dict[str, Any]:
    return {
        "method": job.method,
        "model": str(job.model.absolute()),
        "layers": job.layers,
        "grids": [asdict(grid) for grid in job.grids],
        "rows": job.calibration.rows,
        "seed": job.calibration.seed,
        "batch_tokens": BATCH_TOKENS,
        "dtype": job.dtype,
        "out": out,
    }


@dataclass(slots=True)
class _Follower:
    """Turns the runner's lines into answers."""

    job: Job
    scratch: Path
    log: Path
    on_progress: OnProgress
    answers: dict[int, Calibrated | Failed] = field(default_factory=dict)
    is_ready: bool = False

    def follow(self, process: subprocess.Popen[str]) -> list[Calibrated | Failed]:
        assert process.stdout is not None
        for line in process.stdout:
            self._take(json.loads(line))
        code = process.wait()
        if not self.is_ready:
            raise RunError(
                f"llm-compressor did not start ({self._last_words()}); see {self.log}, or set it up anew: make ptq"
            )
        died = f"llm-compressor {_KILLED.get(code, f'ended with exit code {code}')}; see {self.log}"
        grids = enumerate(self.job.grids)
        return [self.answers.get(number) or Failed(fmt=grid, reason=died) for number, grid in grids]

    def _take(self, event: Mapping[str, Any]) -> None:
        kind = event["event"]
        if kind == "ready":
            self.is_ready = True
            return
        number, fmt = event["grid"], self.job.grids[event["grid"]]
        what = f"{self.job.method} {fmt.name}"
        if kind == "progress":
            self.on_progress(what, number + event["done"] / event["total"])
            return
        if kind == "failed":
            self.answers[number] = Failed(fmt=fmt, reason=event["reason"], seconds=event["seconds"])
        else:
            codes, others = _read(self.scratch / f"{number}.safetensors", self.job.layers, fmt)
            notes, seconds = tuple(event["notes"]), event["seconds"]
            self.answers[number] = Calibrated(fmt=fmt, codes=codes, others=others, seconds=seconds, notes=notes)
        self.on_progress(what, number + 1)

    def _last_words(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip() if lines else "it said nothing"


def _read(path: Path, layers: Sequence[str], fmt: WeightFormat) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor]]:
    """(codes by layer, other parameters) of a file that the runner wrote."""
    from raydistill.quant.export_files import read_tensors
    from raydistill.quant.grid import QuantizedWeight

    tensors = read_tensors(path)
    path.unlink()
    codes = {
        name: QuantizedWeight(
            codes_OI=tensors.pop(f"{name}.codes"),
            scale_OG=tensors.pop(f"{name}.scale"),
            zero_point_OG=None if fmt.symmetric else tensors.pop(f"{name}.zero_point"),
            fmt=fmt,
        )
        for name in layers
    }
    return codes, tensors
