"""The switches of `raydistill evaluate`, and what its `--help` teaches."""

from __future__ import annotations

import argparse
from pathlib import Path

from raydistill.cli import command_parser

DEFAULT_WINDOW, DEFAULT_STRIDE, DEFAULT_BLOCK = 1024, 512, 2048
LONGEST_TASK = 4096
SUMMARY = """\
Measure finished models, each loaded as it would be shipped, in one table with standard errors.

A MODEL is an exported student, any transformers folder (compressed-tensors and the like included), a run's folder
(outputs/runs/NAME, whose export is measured), one checkpoint of a run (outputs/runs/NAME/checkpoints/step-...), a LoRA
adapter in PEFT's format over its base, or the id of a model on the hub. name=MODEL gives it a name in the table.

On rows (--data, or those that a run held out): KL to the teacher (nats per completion token), perplexity of the reference
completions, exact match of greedy answers, accuracy of labels. On running text (--text): perplexity and bits per byte. On
lm-eval's tasks (--tasks): whatever each task measures.

A run's record, and an export of `raydistill export`, say what the teacher and the held-out rows were: they are used while
they are where they were and the same. Prompts are rendered with the chat template's variables that the student was trained
with (data.template). The teacher's row is measured like any other: its KL is 0 if all is well."""
EXAMPLES = """\
examples:
  raydistill evaluate outputs/runs/int2
        a finished run: its student against its teacher, on the rows it held out
  raydistill evaluate exports/student
        the same numbers from an exported folder alone
  raydistill evaluate outputs/runs/int2 --every-checkpoint
        the curve over the checkpoints that the run kept: a table, and plots/checkpoints.png in the run's folder
  raydistill evaluate ptq=outputs/ptq-int2 student=outputs/runs/int2 --exact-match final_number
        the same beside another folder, with greedy answers compared by the number after ####
  raydistill evaluate exports/int4 --teacher models/qwen3-4b --data test.jsonl --rows 1000 --per-row scores.parquet
        any folders on any rows: JSONL with {messages: [...]} or {question/prompt, answer}
  raydistill evaluate exports/int4 --data sst2.jsonl --classify
        rows whose answer is a label: the label that the model finds most likely
  raydistill evaluate exports/int4 --text wikitext.txt --text c4.jsonl.gz
        perplexity and bits per byte in sliding windows; with --blocks in blocks of 2048, as quantization papers have it
  raydistill evaluate exports/int4 --tasks hellaswag,arc_easy,mmlu,gsm8k --engine vllm
        lm-eval's tasks from the hub; without a hub --task-data DIR reads DIR/TASK/SPLIT.jsonl, or task YAMLs of your own
  raydistill evaluate one=adapters/one two=adapters/two --base models/qwen3-4b --data test.jsonl --engine vllm
        adapters over one base: loaded once, one engine start
  raydistill evaluate outputs/runs/int2 outputs/runs/int3 --json > table.json
        for a program: a JSON list with one object for each model
"""


def parser() -> argparse.ArgumentParser:
    """All switches."""
    parser = command_parser("evaluate", SUMMARY, EXAMPLES, takes_config=False)
    parser.usage = "raydistill evaluate MODEL [MODEL ...] [switches]"
    parser.add_argument("targets", nargs="+", metavar="MODEL", help="what to measure (see above), or name=MODEL")
    _add_models(parser.add_argument_group("models"))
    _add_rows(parser.add_argument_group("rows"))
    _add_text(parser.add_argument_group("running text"))
    _add_tasks(parser.add_argument_group("lm-eval's tasks"))
    _add_output(parser.add_argument_group("what comes out"))
    return parser


def _add_models(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--teacher", metavar="MODEL", help="what KL is measured against (default: the run's teacher)")
    group.add_argument("--base", metavar="MODEL", help="what an adapter lies over (default: as the adapter says)")
    group.add_argument("--every-checkpoint", action="store_true", help="of one run: each checkpoint that it kept")
    group.add_argument(
        "--engine",
        choices=("hf", "vllm"),
        default="hf",
        help="vllm: answers, labels, texts and tasks by vLLM, one start for all that lies over one base; KL and perplexity "
        "of rows need whole distributions and stay with transformers (default: %(default)s)",
    )


def _add_rows(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--data", type=Path, metavar="FILE", help="JSONL of rows to measure on (default: those the run held out)"
    )
    group.add_argument("--rows", type=positive, metavar="N", help="measure on at most N rows, the same N every time")
    group.add_argument(
        "--exact-match",
        choices=("off", "final_number"),
        help="generate answers and compare the number after ####, and the last number (default: as the run did, else off)",
    )
    group.add_argument(
        "--classify", action="store_true", help="the rows' answers are labels: is the right one the most likely?"
    )
    group.add_argument(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        help="an answer is cut here (default: as the run did, else 128; of a task as it says itself)",
    )


def _add_text(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--text",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a text file, or JSONL or Parquet with a column of texts, which a blank line joins; may be given again",
    )
    group.add_argument("--text-column", metavar="NAME", help="of JSONL and Parquet (default: text)")
    group.add_argument(
        "--window",
        type=positive,
        metavar="N",
        help=f"tokens of one window (default: {DEFAULT_WINDOW}, of one block {DEFAULT_BLOCK})",
    )
    group.add_argument(
        "--stride",
        type=positive,
        metavar="N",
        help=f"tokens to the next window; each token is scored once, after at least window - stride others "
        f"(default: {DEFAULT_STRIDE})",
    )
    group.add_argument(
        "--blocks",
        action="store_true",
        help="windows side by side, nothing carried over: a block's first token and a shorter block at the end are not scored",
    )


def _add_tasks(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--tasks", metavar="NAME,...", help="tasks, groups or tags of lm-eval, or of your own YAML files"
    )
    group.add_argument(
        "--task-data",
        type=Path,
        metavar="DIR",
        help="rows as DIR/TASK/SPLIT.jsonl (or .parquet, .csv) with the columns of the task's data set; task YAML files",
    )
    group.add_argument(
        "--num-fewshot", type=not_negative, metavar="N", help="examples shown (default: as the task says)"
    )
    group.add_argument("--limit", type=positive, metavar="N", help="the first N documents of each task")
    group.add_argument(
        "--chat-template",
        action="store_true",
        help="render prompts with the chat template, examples as turns (default: plain text, as lm-eval does)",
    )
    group.add_argument(
        "--max-length",
        type=positive,
        metavar="N",
        help=f"tokens of the longest sequence of a task; prompts lose their beginning (default: what all models know, at "
        f"most {LONGEST_TASK})",
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--json", action="store_true", help="print the table as JSON on stdout")
    group.add_argument(
        "--per-row",
        type=Path,
        metavar="FILE",
        help="also write each row's scores, as .parquet or JSONL, for tests of your own",
    )
    group.add_argument(
        "-o",
        "--plot",
        type=Path,
        metavar="FILE",
        help="PNG of --every-checkpoint (default: plots/checkpoints.png of the run)",
    )
    group.add_argument(
        "--record", action="store_true", help="keep the table in the results store, for `raydistill results`"
    )
    group.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="of --record: the folder of runs/ (default: the run's own, else outputs)",
    )


def positive(text: str) -> int:
    """A whole number from 1 on."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def not_negative(text: str) -> int:
    """A whole number from 0 on."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return number
