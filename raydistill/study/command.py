"""The verbs `raydistill compare` and `raydistill demo`: the same study of a user's config, or of one that needs nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raydistill.cli import command_parser, console, open_console, run_arguments
from raydistill.config import Config
from raydistill.config.load import load_config
from raydistill.config.problems import DEFAULT
from raydistill.errors import ConfigError

if TYPE_CHECKING:
    from raydistill.study.report import Report

COMPARED_ARMS = ("gold-ce", "off-policy", "mixed", "on-policy")
COMPARED_METHODS = ("rtn", "gptq", "awq")
DEMO_EXAMPLES = """\
examples:
  raydistill demo
        the arithmetic stories: teacher, honest PTQ, gold-CE control and the distilled student in one table
  raydistill demo @configs/gsm8k.toml --world.train_path train.jsonl --world.test_path test.jsonl
        the same on GSM8K's questions and answers
  raydistill demo --trainer.num_steps 300 --quant.format int3
        change a setting and see what it does
  raydistill demo --json > table.json

Stopped or killed, the same command goes on: finished runs are kept, the unfinished one goes on from its checkpoint.
"""
COMPARE_SUMMARY = """\
The table that decides whether distillation is worth it: teacher, plain quantization at its best (rounding, GPTQ, AWQ), a
control trained on the gold answers, off-policy, mixed and on-policy distillation. One model, one width, the same rows.

For each: bytes, KL to the teacher, perplexity, exact match (evaluation.exact_match), lm-eval's tasks (study.tasks), all
computed with transformers; standard errors, what training cost in device-seconds, and the difference to the best plain
quantization of the same width with the p value of a paired test.

Fair by construction: every PTQ method and width gets its best of four grids, chosen on held-out rows; GPTQ and AWQ are
calibrated on the students' training rows; the table is measured on rows that chose nothing (study.test_path, or the
world's), from the exported folders, by one fresh process. What cannot be made is a line with its reason.
GPTQ and AWQ need `make ptq` once. With one seed a difference between arms says little: use --seeds."""
COMPARE_EXAMPLES = """\
examples:
  raydistill compare @configs/demo.toml
        the embedded world, about 15 minutes on 2 cores
  raydistill compare @configs/demo.toml --seeds 3 --arms off-policy,on-policy --quant.format int3
        two arms with three seeds each, at 3 bits
  raydistill compare @configs/int4_onpolicy.toml --student.model FOLDER --data.path train.jsonl --study.test_path test.jsonl
        your model and rows
  raydistill compare @mine.toml --ptq rtn --study.ptq_formats int4
        without llm-compressor, one width
  raydistill compare @mine.toml --study.tasks arc_easy,gsm8k --study.task_data tasks --study.task_limit 200
        with tasks; tasks/TASK/SPLIT.jsonl holds their rows, as `raydistill evaluate --tasks` takes them

what you get, in <run.output>/compare:
  summary.md      table, legend, grids, settings and rows: stands alone
  summary.json    the same for programs; rows.jsonl: scores of every test row
  plots/          bytes_kl.png: bytes against KL; of the first arm's first run training.png and spans.png: its curves, and who
                  waited for whom
  ptq/            the quantized models; the students are in <run.output>/runs/NAME/export
and an entry NAME-comparison beside the runs in `raydistill results`.

Stopped or killed, the same command goes on: finished runs are kept, the unfinished one goes on from its checkpoint.
"""


def demo_command(argv: Sequence[str]) -> int:
    """The verb `demo`."""
    parser = command_parser(
        "demo", "Run the whole system on a world that needs no download, and show the table.", DEMO_EXAMPLES
    )
    as_json, settings = run_arguments(parser, argv, "print the summary as JSON on stdout")
    if not any(argument.startswith("@") for argument in settings):
        settings = [f"@{default_config()}", *settings]
    config = load_config(settings).config
    if config.world.name == "none":
        raise ConfigError(
            "world.name is not set; a demo runs on an embedded world: 'stories', 'question_answers' or 'text' (of your own "
            "model and rows: `raydistill compare`)"
        )
    return _study(config, config.run.output, as_json)


def compare_command(argv: Sequence[str]) -> int:
    """The verb `compare`."""
    parser = command_parser("compare", COMPARE_SUMMARY, COMPARE_EXAMPLES)
    parser.add_argument("--arms", metavar="A,B", help=f"what is trained (default: {','.join(COMPARED_ARMS)})")
    parser.add_argument("--ptq", metavar="A,B", help=f"what is not (default: {','.join(COMPARED_METHODS)})")
    parser.add_argument("--seeds", metavar="N", help="runs of each arm (default: 1)")
    as_json, settings = run_arguments(parser, argv, "print the summary as JSON on stdout")
    switches, _ = parser.parse_known_args(list(argv))
    if not any(argument.startswith("@") for argument in settings):
        raise ConfigError("compare needs a config: raydistill compare @configs/demo.toml (or @FILE of your own)")
    config = compare_config(settings, arms=switches.arms, methods=switches.ptq, seeds=switches.seeds)
    return _study(config, config.run.output / "compare", as_json)


def compare_config(
    settings: Sequence[str], arms: str | None = None, methods: str | None = None, seeds: str | None = None
) -> Config:
    """The config of a comparison: switches first, then what files say, then every arm and every method."""
    sources = load_config(settings).sources
    more: list[str] = []
    for field, given, default in (
        ("study.arms", arms, ",".join(COMPARED_ARMS)),
        ("study.ptq_methods", methods, ",".join(COMPARED_METHODS)),
        ("study.seeds", seeds, None),
    ):
        value = given if given is not None else default if sources[field] == DEFAULT else None
        if value is not None:
            more += [f"--{field}", value]
    return load_config([*settings, *more]).config


def default_config() -> Path:
    """configs/demo.toml of this checkout."""
    path = Path(__file__).resolve().parents[2] / "configs" / "demo.toml"
    if not path.is_file():
        raise ConfigError(
            f"{path} is missing; run from a checkout of raydistill, or name a config: raydistill demo @FILE"
        )
    return path


def _study(config: Config, folder: Path, as_json: bool) -> int:
    from raydistill.study.study import Study

    report = Study(config, console, folder).run()
    if as_json:
        print(json.dumps(report.summary, indent=1))
    else:
        show(report)
    return 0


def show(report: Report) -> None:
    """The table and what it means."""
    from raydistill.study.decision_table import decision_tables, missing_lines

    out = open_console()
    for table in decision_tables(report.lines, report.reference, out):
        out.print(table)
    for text in missing_lines(report.lines):
        out.print(f"not there: {text}", style="dim", soft_wrap=True)
    out.print(report.verdict, soft_wrap=True)
    out.print(report.next_steps, soft_wrap=True)
    stages = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in report.seconds.items())
    minutes = sum(report.seconds.values()) / 60
    out.print(f"time of this start: {stages}; {minutes:.1f} minutes in all", style="dim", soft_wrap=True)
    for name, path in report.files.items():
        out.print(f"{name}: {path}", style="dim", soft_wrap=True)
