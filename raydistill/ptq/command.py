"""The verb `raydistill ptq`: a model quantized without training, as a folder that evaluates and serves like a student."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from raydistill.cli import command_parser, console
from raydistill.errors import DataError, ModelError, UserError
from raydistill.ptq.calibration import DEFAULT_ROWS
from raydistill.ptq.one import NAME_ROWS, Plan, run_plan
from raydistill.quant.formats import (
    BITS,
    LAYOUTS,
    SCALE_RULES,
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


def _group_size(text: str) -> int | str:
    if text == "channel":
        return text
    return _positive(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)
