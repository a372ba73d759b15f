"""Post-training quantization as an honest rival: the grid with the lowest KL to the teacher on validation rows.

The student then trains on that same grid, and both are compared on rows that chose nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raydistill.data.encode import Example
from raydistill.errors import ModelError
from raydistill.evaluate.held_out import TeacherAnswers, answer_held_out, score_answers
from raydistill.models import DTYPES, default_device
from raydistill.quant.baselines import apply_ptq, ptq_grids
from raydistill.quant.export import export_student, load_exported
from raydistill.quant.export_files import model_folder as folder_of
from raydistill.quant.formats import ScaleDtype, WeightFormat
from raydistill.quant.student import quantizable_modules
from raydistill.tensors import CompletionModel

SKIP = ("lm_head",)
OnGrid = Callable[[WeightFormat, float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PtqChoice:
    """The four candidates of one bit width with their KL to the teacher, and the lowest."""

    best: WeightFormat
    kl_nats: dict[WeightFormat, float]  # per completion token of the validation rows

    def rows(self) -> list[dict[str, Any]]:
        """A table: one row for each candidate, the best first."""
        order = sorted(self.kl_nats.items(), key=lambda item: _or_infinity(item[1]))
        return [{"format": fmt.name, "kl_nats": kl, "chosen": fmt == self.best} for fmt, kl in order]


def search_grids(
    model_folder: str | Path,
    bits: Sequence[int],
    group_size: int | None,
    examples: Sequence[Example],
    *,
    teacher: str | Path | None = None,
    scale_dtype: ScaleDtype = "float16",
    skip: tuple[str, ...] = SKIP,
    dtype: str | None = None,
    on_grid: OnGrid | None = None,
) -> dict[int, PtqChoice]:
    """For each bit width the best of symmetric/asymmetric x absmax/searched, by KL on validation examples.

    teacher: None for the model itself in full precision. dtype: in which the student computes, such as "float32"
    (default: that of the model's config.json). on_grid: called with each candidate and its KL. One model is loaded; its
    weights are swapped for each candidate.
    """
    model = _load(model_folder, dtype)
    if teacher is None or folder_of(teacher).resolve() == folder_of(model_folder).resolve():
        teacher_model = model  # its answers are taken before the first swap, and its head is never quantized
    else:
        teacher_model = _load(teacher, None)
    answers = answer_held_out(CompletionModel(teacher_model), examples)
    return {
        width: choose_grid(model, answers, ptq_grids(width, group_size, scale_dtype), skip, on_grid) for width in bits
    }


def choose_grid(
    model: nn.Module,
    answers: TeacherAnswers,
    grids: Sequence[WeightFormat],
    skip: tuple[str, ...] = SKIP,
    on_grid: OnGrid | None = None,
) -> PtqChoice:
    """The grid under which the model is nearest to the teacher; its weights are the same before and after."""
    student = CompletionModel(model)
    kl_nats: dict[WeightFormat, float] = {}
    with _restored(model, skip) as restore:
        for fmt in grids:
            restore()
            apply_ptq(model, fmt, skip)
            kl = score_answers(student, answers).kl_nats
            assert kl is not None
            kl_nats[fmt] = kl
            if on_grid is not None:
                on_grid(fmt, kl)
    best = min(kl_nats, key=lambda fmt: _or_infinity(kl_nats[fmt]))
    if not math.isfinite(kl_nats[best]):
        raise ModelError(f"{type(model).__name__} gives no finite numbers under any of {[fmt.name for fmt in grids]}")
    return PtqChoice(best=best, kl_nats=kl_nats)


def export_ptq(
    model_folder: str | Path,
    fmt: WeightFormat,
    out: str | Path,
    *,
    skip: tuple[str, ...] = SKIP,
    dtype: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> str:
    """Write the quantized, untrained model as an export; returns the hash of its codes. extra: kept in raydistill.json."""
    model = _load(model_folder, dtype)
    codes = apply_ptq(model, fmt, skip)
    kept = {"role": "ptq", **(extra or {})}
    return export_student(out, model_folder, codes, fmt=fmt, mode="none", dtype=dtype, extra=kept)


def _load(model_folder: str | Path, dtype: str | None) -> nn.Module:
    return load_exported(folder_of(model_folder), DTYPES[dtype] if dtype else None).to(default_device())


@contextmanager
def _restored(model: nn.Module, skip: tuple[str, ...]) -> Iterator[Callable[[], None]]:
    """Yields a function that puts the weights of the quantizable layers back; they are also put back at the end."""
    layers = quantizable_modules(model, skip)
    originals = {name: layer.weight.detach().to("cpu", copy=True) for name, layer in layers.items()}

    @torch.no_grad()
    def restore() -> None:
        for name, layer in layers.items():
            layer.weight.copy_(originals[name])

    try:
        yield restore
    finally:
        restore()


def _or_infinity(value: float) -> float:
    return math.inf if math.isnan(value) else value
