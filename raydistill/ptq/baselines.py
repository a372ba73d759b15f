"""The best that a method can do at a width: all four grids, chosen by KL to the teacher on validation rows.

The same choice for every method: symmetric or asymmetric, scales that span a group's range or that were searched. The rows
that choose are not the rows that a table is measured on. A method that has no answer says why.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raydistill.ptq.calibration import Calibration
from raydistill.ptq.overlay import Calibrated, Failed, Job, OnProgress, run_job
from raydistill.quant.formats import BITS, TEMPLATE, ScaleDtype, WeightFormat

if TYPE_CHECKING:
    from raydistill.data.encode import Example
    from raydistill.evaluate.held_out import TeacherAnswers

MethodName = Literal["rtn", "gptq", "awq"]
METHODS: dict[MethodName, str] = {
    "rtn": "round to nearest: no data",
    "gptq": "rounds column by column and spreads each one's error over the rest (arXiv 2210.17323)",
    "awq": "rescales channels by their activations, then rounds to nearest (arXiv 2306.00978)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is quantized, and what it is compared with."""

    model: Path
    teacher: Path
    validation: tuple[Example, ...]  # rows that choose a grid
    group_size: int | None
    scale_dtype: ScaleDtype
    skip: tuple[str, ...]
    dtype: str | None  # in which the quantized model computes; None: that of its config.json
    template: Mapping[str, Any]  # variables of the chat template that its rows were rendered with


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """One method at one width: a folder with its best grid, or the reason why there is none."""

    method: MethodName
    width: str  # "int4", "int3", "int2"
    folder: str | None
    format: str | None
    kl_nats: dict[str, float] = field(default_factory=dict)  # of each grid that was made, on the validation rows
    reasons: dict[str, str] = field(default_factory=dict)  # of each grid that was not
    seconds: float = 0.0  # of one device, to make and to score all grids
    notes: tuple[str, ...] = ()  # of the chosen grid

    @property
    def name(self) -> str:
        return f"{self.method}-{self.width}"

    @property
    def reason(self) -> str | None:
        """Why there is no folder; None where there is one."""
        if self.folder is not None:
            return None
        told = list(dict.fromkeys(self.reasons.values()))
        return "; ".join(told) or "no grid gives finite numbers"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Baseline:
        return cls(**{**data, "notes": tuple(data["notes"])})


def find_baselines(
    method: MethodName,
    widths: Sequence[str],
    subject: Subject,
    calibration: Calibration | None,
    folder: Path,
    on_progress: OnProgress,
) -> list[Baseline]:
    """The best grid of each width, written to `folder`/METHOD-WIDTH. calibration: None for methods that read no rows.

    on_progress: told what is done now, and how many of the 4 x widths grids are.
    """
    if method == "rtn":
        return _rounded(widths, subject, folder, on_progress)
    assert calibration is not None, f"{method} needs calibration rows"
    return _calibrated(method, widths, subject, calibration, folder, on_progress)


def _rounded(widths: Sequence[str], subject: Subject, folder: Path, on_progress: OnProgress) -> list[Baseline]:
    from raydistill.evaluate.ptq import export_ptq, search_grids

    seconds: dict[WeightFormat, float] = {}
    last = time.monotonic()

    def on_grid(fmt: WeightFormat, _: float) -> None:
        nonlocal last
        now = time.monotonic()
        seconds[fmt], last = now - last, now
        on_progress(f"rtn {fmt.name}", len(seconds))

    choices = search_grids(
        subject.model,
        [BITS[width] for width in widths],
        subject.group_size,
        subject.validation,
        teacher=subject.teacher,
        scale_dtype=subject.scale_dtype,
        skip=subject.skip,
        dtype=subject.dtype,
        on_grid=on_grid,
    )
    found = []
    for width in widths:
        choice, out = choices[BITS[width]], folder / f"rtn-{width}"
        extra = export_extra("rtn", None, subject.template)
        export_ptq(subject.model, choice.best, out, skip=subject.skip, dtype=subject.dtype, extra=extra)
        found.append(
            Baseline(
                method="rtn",
                width=width,
                folder=str(out),
                format=choice.best.name,
                kl_nats={fmt.name: kl for fmt, kl in choice.kl_nats.items()},
                seconds=sum(seconds[fmt] for fmt in choice.kl_nats),
            )
        )
    return found


def _calibrated(
    method: Literal["gptq", "awq"],
    widths: Sequence[str],
    subject: Subject,
    calibration: Calibration,
    folder: Path,
    on_progress: OnProgress,
) -> list[Baseline]:
    from raydistill.evaluate.held_out import answer_held_out
    from raydistill.models import default_device
    from raydistill.quant.baselines import ptq_grids
    from raydistill.quant.export import load_exported
    from raydistill.tensors import CompletionModel

    grids = [fmt for width in widths for fmt in ptq_grids(BITS[width], subject.group_size, subject.scale_dtype)]
    job = Job(
        method=method,
        model=subject.model,
        layers=layers_of(subject.model, subject.skip),
        grids=tuple(grids),
        calibration=calibration,
        dtype=subject.dtype,
    )
    made = run_job(job, folder / f"{method}.log", on_progress)
    teacher = load_exported(subject.teacher).to(default_device())
    answers = answer_held_out(CompletionModel(teacher), subject.validation)
    extra = export_extra(method, calibration, subject.template)
    found = []
    for width in widths:
        of_width = [one for one in made if one.fmt.bits == BITS[width]]
        found.append(choose_calibrated(method, width, of_width, subject, answers, folder, extra))
    return found


def choose_calibrated(
    method: MethodName,
    width: str,
    made: Sequence[Calibrated | Failed],
    subject: Subject,
    answers: TeacherAnswers,
    folder: Path,
    extra: Mapping[str, Any],
) -> Baseline:
    """Export what was made of each grid, score the folders, and keep the best one."""
    from raydistill.evaluate.held_out import score_answers
    from raydistill.models import default_device
    from raydistill.quant.export import load_exported
    from raydistill.quant.export_files import rename_over
    from raydistill.tensors import CompletionModel

    start, scratch = time.monotonic(), folder / f".{method}-{width}"
    kl_nats: dict[str, float] = {}
    for one in made:
        if isinstance(one, Calibrated):
            out = scratch / one.fmt.name
            export_calibrated(one, subject.model, out, subject.dtype, extra)
            kl = score_answers(CompletionModel(load_exported(out).to(default_device())), answers).kl_nats
            assert kl is not None
            kl_nats[one.fmt.name] = kl
    finite = {name: kl for name, kl in kl_nats.items() if math.isfinite(kl)}
    best = min(finite, key=finite.__getitem__, default=None)
    final = folder / f"{method}-{width}"
    if best is not None:
        rename_over(scratch / best, final)
    shutil.rmtree(scratch, ignore_errors=True)
    return Baseline(
        method=method,
        width=width,
        folder=None if best is None else str(final),
        format=best,
        kl_nats=kl_nats,
        reasons={one.fmt.name: one.reason for one in made if isinstance(one, Failed)},
        seconds=sum(one.seconds for one in made) + time.monotonic() - start,
        notes=next((one.notes for one in made if isinstance(one, Calibrated) and one.fmt.name == best), ()),
    )


def export_calibrated(
    made: Calibrated, model: Path, out: Path, dtype: str | None, extra: Mapping[str, Any] | None = None
) -> str:
    """Write codes with the model's other weights as an export of raydistill; returns the hash of the codes."""
    from raydistill.quant.export import export_student

    extra = {**(extra or {}), **({"notes": list(made.notes)} if made.notes else {})}
    return export_student(
        out, model, made.codes, fmt=made.fmt, mode="none", other_weights=made.others, dtype=dtype, extra=extra
    )


def export_extra(method: str, calibration: Calibration | None, template: Mapping[str, Any]) -> dict[str, Any]:
    """What raydistill.json keeps of a baseline."""
    extra = {"role": "ptq", "method": method, TEMPLATE: dict(template)}
    if calibration is None:
        return extra
    return {**extra, "calibration": {"rows": len(calibration.rows), "seed": calibration.seed}}


def layers_of(model: Path, skip: tuple[str, ...]) -> tuple[str, ...]:
    """The layers that a student of this model would have quantized, by name; its weights are not read."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from raydistill.quant.student import quantizable_modules

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    return tuple(quantizable_modules(empty, skip))
