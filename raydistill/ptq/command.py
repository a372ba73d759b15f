"""The verb `raydistill ptq`: a model quantized without training, as a folder that evaluates and serves like a student."""

from __future__ import annotations

import argparse
import json
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from raydistill.cli import command_parser, console
from raydistill.errors import DataError, ModelError, RunError, UserError
from raydistill.evaluate.run_defaults import SOURCE_FILE, source_of
from raydistill.progress import bar
from raydistill.ptq.calibration import DEFAULT_ROWS
from raydistill.quant.formats import (
    BITS,
    LAYOUTS,
    SCALE_RULES,
    Layout,
    ScaleDtype,
    ScaleRule,
    WeightFormat,
    check_layout,
    default_layout,
)
from raydistill.results.record_lines import recorded_config, start_of
from raydistill.results.tables import format_bytes

if TYPE_CHECKING:
    from raydistill.config import Config
    from raydistill.ptq.calibration import Calibration

NAME_ROWS = "name the model and its rows: raydistill ptq METHOD MODEL --data FILE"
SPARE = 2  # rows drawn for each one wanted: some are too long for the model
METHODS = ("rtn-absmax", "rtn-searched", "gptq", "awq")
SUMMARY = """\
Quantize a model without training it, and write a folder that `raydistill evaluate`, `serve` and `chat` take like a student.

  rtn-absmax    round to nearest, scales that span each group's range
  rtn-searched  round to nearest, scales with the least squared error
  gptq          column by column, each one's error spread over the rest; needs calibration rows
  awq           channels rescaled by their activations, then rounded; needs calibration rows

MODEL is a model's folder (or a hub id in the local cache), or the folder of a run: then its student's model is quantized, by
default on the run's own grid, and calibrated on the very rows that the student was trained on.
GPTQ and AWQ are llm-compressor's, in an environment of its own: `make ptq` sets it up. The folder is raydistill's, so the
same width costs the same bytes whatever the method; `raydistill compare` looks for the best grid of each method."""
EXAMPLES = """\
examples:
  raydistill ptq gptq models/qwen3-4b --data prompts.jsonl --to exports/gptq
        int4 in groups of 32, calibrated on 512 of the rows
  raydistill ptq awq models/qwen3-4b --data prompts.jsonl --format int3 --group-size 128 --rows 128 --to exports/awq
        another grid, fewer rows
  raydistill ptq gptq outputs/runs/NAME --to exports/gptq
        the rival of a student: its model, its grid, its training rows
  raydistill evaluate exports/gptq outputs/runs/NAME
        both on the rows that the run held out
  raydistill ptq rtn-searched models/qwen3-4b --format int2 --to exports/int2
        no data needed
"""


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


def ptq_command(argv: Sequence[str]) -> int:
    """The verb `ptq`."""
    arguments = _parser().parse_args(list(argv))
    report = run_plan(make_plan(arguments))
    if arguments.json:
        print(json.dumps({k: str(v) if isinstance(v, Path) else v for k, v in asdict(report).items()}, indent=1))
        return 0
    console.print(
        f"{report.folder}: {report.format} by {report.method}, {report.layout}, {format_bytes(report.bytes)}, codes "
        f"{report.codes_hash}, {report.seconds:.0f} s",
        soft_wrap=True,
    )
    for note in report.notes:
        console.print(f"warning: {note}", style="yellow", soft_wrap=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("ptq", SUMMARY, EXAMPLES, takes_config=False)
    parser.usage = "raydistill ptq METHOD MODEL --to DIR [--data FILE] [switches]"
    parser.add_argument("method", choices=METHODS, metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("model", metavar="MODEL", help="a model's folder, or a run's (outputs/runs/NAME)")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="the folder to write; must not exist")
    grid = parser.add_argument_group("grid (default: the run's where MODEL is a run)")
    grid.add_argument("--format", choices=tuple(BITS), help="default: int4")
    grid.add_argument(
        "--group-size", type=_group_size, metavar="N|channel", help="weights that share a scale (default: 32)"
    )
    kind = grid.add_mutually_exclusive_group()
    kind.add_argument("--symmetric", dest="symmetric", action="store_true", default=None, help="a grid around 0")
    kind.add_argument(
        "--asymmetric", dest="symmetric", action="store_false", help="a zero point for each group (default)"
    )
    grid.add_argument("--scale", choices=SCALE_RULES, help="scales of gptq and awq (default: absmax)")
    grid.add_argument(
        "--scale-dtype", choices=get_args(ScaleDtype), help="stored type of the scales (default: float16)"
    )
    grid.add_argument(
        "--skip", metavar="NAMES", help="linear layers left as they are, comma-separated (default: lm_head)"
    )
    rows = parser.add_argument_group("calibration (gptq, awq)")
    rows.add_argument("--data", type=Path, metavar="FILE", help="JSONL of rows (default: the run's training rows)")
    rows.add_argument("--rows", type=_positive, default=DEFAULT_ROWS, metavar="N", help="default: %(default)s")
    rows.add_argument("--seed", type=int, default=0, help="which rows are drawn (default: %(default)s)")
    rows.add_argument(
        "--max-length", type=_positive, metavar="N", help="tokens of a row of FILE (default: the model's)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the computation (default: the model's)")
    parser.add_argument(
        "--as", dest="layout", choices=LAYOUTS, help="how the weights are stored; see raydistill export"
    )
    parser.add_argument("--json", action="store_true", help="print what was written as JSON on stdout")
    return parser


def make_plan(arguments: argparse.Namespace) -> Plan:
    """Switches first, then the run's settings; everything that can be refused at once is refused here."""
    is_rtn = arguments.method.startswith("rtn-")
    if arguments.to.exists():
        raise UserError(f"--to {arguments.to} exists; choose another folder or remove it")
    if is_rtn and arguments.data is not None:
        raise UserError(f"--data {arguments.data}: {arguments.method} looks at no rows; leave it out")
    if is_rtn and arguments.scale is not None:
        raise UserError(f"--scale {arguments.scale}: {arguments.method} names its scales itself; leave it out")
    run = Path(arguments.model)
    start = start_of(run) if run.is_dir() else None
    config = recorded_config(start, run, NAME_ROWS) if start is not None else None
    if not is_rtn and arguments.data is None and config is None:
        raise DataError(f"{arguments.method} needs calibration rows: give --data FILE, or a run's folder as MODEL")
    if arguments.data is not None and not arguments.data.is_file():
        raise DataError(f"--data {arguments.data} is not a file; give JSONL rows")
    if not is_rtn:
        from raydistill.ptq.overlay import find_interpreter

        find_interpreter()
    fmt = _format(arguments, config)
    layout = arguments.layout or default_layout(fmt)
    check_layout(layout, fmt, is_served=False, merge_adapter=False)
    if config is not None and config.student.model is None:
        raise ModelError(f"the record of {arguments.model} names no student.model; give the model's folder as MODEL")
    from raydistill.quant.export_files import model_folder

    skip = arguments.skip.split(",") if arguments.skip else (config.quant.skip if config else ("lm_head",))
    return Plan(
        method=arguments.method,
        model=model_folder(str(config.student.model) if config else arguments.model),
        fmt=fmt,
        layout=layout,
        skip=tuple(skip),
        dtype=arguments.dtype or (config.student.dtype if config else None),
        run=start,
        data=arguments.data,
        max_length=arguments.max_length,
        rows=arguments.rows,
        seed=arguments.seed,
        to=arguments.to,
    )


def _format(arguments: argparse.Namespace, config: Config | None) -> WeightFormat:
    quant = config.quant if config is not None and config.quant.format in BITS else None
    group_size = arguments.group_size or (quant.group_size if quant else 32)
    symmetric = arguments.symmetric if arguments.symmetric is not None else quant.symmetric if quant else False
    scale: ScaleRule = arguments.scale or "absmax"
    if arguments.method.startswith("rtn-"):
        scale = "searched" if arguments.method == "rtn-searched" else "absmax"
    return WeightFormat(
        bits=BITS[arguments.format or (quant.format if quant else "int4")],
        group_size=None if group_size == "channel" else group_size,
        symmetric=symmetric,
        scale=scale,
        scale_dtype=arguments.scale_dtype or (quant.scale_dtype if quant else "float16"),
    )


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
        console.print(
            f"of {counts.total:,} rows drawn {counts.summary()}", style="yellow", markup=False, soft_wrap=True
        )
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


def _group_size(text: str) -> int | str:
    if text == "channel":
        return text
    return _positive(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)
