"""One model quantized by one method on one grid: rows drawn, codes made, the folder written whole or not at all."""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydistill.cli import console
from raydistill.errors import ModelError, RunError
from raydistill.evaluate.run_defaults import SOURCE_FILE, source_of
from raydistill.progress import bar
from raydistill.quant.formats import Layout, WeightFormat
from raydistill.results.record_lines import recorded_config

if TYPE_CHECKING:
    from raydistill.ptq.calibration import Calibration

NAME_ROWS = "name the model and its rows: raydistill ptq METHOD MODEL --data FILE"
SPARE = 2  # rows drawn for each one wanted: some are too long for the model


@dataclass(frozen=True, slots=True, kw_only=True)
class PtqReport:
    """What was written."""

    folder: Path
    method: str
    format: str
    layout: Layout
    bytes: int
    codes_hash: str
    calibration_rows: int | None
    calibration_tokens: int | None
    seconds: float
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything before a model is loaded."""

    method: str
    model: Path
    fmt: WeightFormat
    layout: Layout
    skip: tuple[str, ...]
    dtype: str | None
    run: Mapping[str, Any] | None  # the start line of the run that MODEL is
    data: Path | None
    max_length: int | None
    rows: int
    seed: int
    to: Path


def run_plan(plan: Plan) -> PtqReport:
    """Quantize, write, give the folder its name."""
    from raydistill.quant.export import packed_bytes
    from raydistill.quant.layouts import write_layout

    start = time.monotonic()
    check_fits(plan)
    building = plan.to.parent / f".{plan.to.name}.{uuid.uuid4().hex[:8]}.partial"
    scratch = building.with_suffix(".packed")
    try:
        calibration, notes = _quantize(plan, scratch)
        manifest = write_layout(scratch, building, plan.layout)
        if plan.run is not None:
            (building / SOURCE_FILE).write_text(json.dumps(source_of(plan.run), indent=1) + "\n")
        building.rename(plan.to)
    except OSError as error:
        raise RunError(f"--to {plan.to} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
        shutil.rmtree(scratch, ignore_errors=True)
    return PtqReport(
        folder=plan.to,
        method=plan.method,
        format=plan.fmt.name,
        layout=plan.layout,
        bytes=packed_bytes(plan.to),
        codes_hash=manifest["codes_hash"],
        calibration_rows=len(calibration.rows) if calibration else None,
        calibration_tokens=calibration.num_tokens if calibration else None,
        seconds=time.monotonic() - start,
        notes=notes,
    )


def check_fits(plan: Plan) -> None:
    """QuantError where the group size does not divide a layer, ModelError for a MODEL that is quantized already."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from raydistill.quant.grid import check_group_size
    from raydistill.quant.student import quantizable_modules

    try:
        config = AutoConfig.from_pretrained(plan.model)
    except (OSError, ValueError) as error:
        raise ModelError(f"{plan.model} is no model: {str(error).strip().splitlines()[0]}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"{plan.model} is quantized already (config.json has a quantization_config); give the original"
        )
    with torch.device("meta"):
        layers = quantizable_modules(AutoModelForCausalLM.from_config(config), plan.skip)
    for name, layer in layers.items():
        check_group_size(layer.in_features, plan.fmt, name)


def _quantize(plan: Plan, out: Path) -> tuple[Calibration | None, tuple[str, ...]]:
    """The packed folder; (calibration rows, what a reader should know)."""
    from raydistill.ptq.baselines import export_calibrated, export_extra, layers_of
    from raydistill.ptq.overlay import Failed, Job, run_job

    template = _template(plan)
    if plan.method.startswith("rtn-"):
        from raydistill.evaluate.ptq import export_ptq

        export_ptq(
            plan.model, plan.fmt, out, skip=plan.skip, dtype=plan.dtype, extra=export_extra(plan.method, None, template)
        )
        return None, ()
    calibration = calibration_of(plan)
    console.print(calibration.summary(), style="dim")
    job = Job(
        method="gptq" if plan.method == "gptq" else "awq",
        model=plan.model,
        layers=layers_of(plan.model, plan.skip),
        grids=(plan.fmt,),
        calibration=calibration,
        dtype=plan.dtype,
    )
    log = plan.to.with_name(f"{plan.to.name}.log")
    with bar(console) as progress:
        task = progress.add_task(f"{plan.method} {plan.fmt.name}", total=1)
        (made,) = run_job(job, log, lambda what, done: progress.update(task, description=what, completed=done))
    if isinstance(made, Failed):
        raise RunError(f"{plan.method} has no answer for {plan.fmt.name}: {made.reason} (its log: {log})")
    log.unlink(missing_ok=True)
    export_calibrated(made, plan.model, out, plan.dtype, export_extra(plan.method, calibration, template))
    return calibration, made.notes


def calibration_of(plan: Plan) -> Calibration:
    """The rows to calibrate on: those of --data, else those the run's student was trained on."""
    from raydistill.data.dataset import load_dataset
    from raydistill.data.encode import encode_rows
    from raydistill.data.rows import read_rows
    from raydistill.data.structural_filter import filter_rows
    from raydistill.evaluate.rows import file_section
    from raydistill.ptq.calibration import draw_calibration, draw_rows

    tokenizer, positions, stop_ids = _tokenizer(plan.model)
    if plan.data is None:
        assert plan.run is not None
        config = recorded_config(dict(plan.run), plan.model, NAME_ROWS)
        data = load_dataset(config.data, tokenizer, positions, needs_reference=False, stop_ids=stop_ids)
        return draw_calibration(data.train, plan.rows, plan.seed)
    section = file_section(min(plan.max_length or positions, positions), _template(plan))
    every = read_rows(plan.data).rows
    examples, counts = filter_rows(
        draw_rows(every, SPARE * plan.rows, plan.seed),
        lambda rows: encode_rows(rows, tokenizer, section, stop_ids=stop_ids),
        section,
        source=str(plan.data),
    )
    if counts.kept < min(plan.rows, counts.total):
        console.print(f"of {counts.total:,} rows drawn {counts.summary()}", style="yellow", soft_wrap=True)
    return draw_calibration(examples, plan.rows, plan.seed, num_available=len(every))


def _template(plan: Plan) -> Mapping[str, Any]:
    from raydistill.config import DataSection

    return DataSection().template if plan.run is None else plan.run["config"]["data"]["template"]


def _tokenizer(model: Path) -> tuple[Any, int, tuple[int, ...]]:
    """(tokenizer, positions, stop ids) of a model."""
    from transformers import AutoConfig, AutoTokenizer

    from raydistill.models import eos_ids

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ModelError(f"{model} has no tokenizer that can be read: {str(error).strip().splitlines()[0]}") from error
    config = AutoConfig.from_pretrained(model).get_text_config()
    return tokenizer, int(getattr(config, "max_position_embeddings", None) or 2**31), eos_ids(model, tokenizer)
