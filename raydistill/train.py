"""`python -m raydistill.train @config.toml --section.field value`: parse, then `launch.run`. `raydistill train` is the same."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from raydistill.cli import command_parser, console, main_with_errors, run_arguments
from raydistill.config.load import load_config

EXAMPLES = """\
examples:
  raydistill train @configs/demo.toml
        distil on the embedded world: makes its own data and teacher
  raydistill train @configs/int4_onpolicy.toml --student.model FOLDER_OR_HUB_ID --data.path prompts.jsonl
        your model and prompts; the teacher is the student's own full-precision model unless teacher.model names another
  raydistill train @configs/int4_onpolicy.toml @mine.toml --trainer.learning_rate 1e-5 --run.name try-1
        stack files (later ones win), override fields, name the run
  ray job submit --working-dir . -- python -m raydistill.train @configs/demo.toml
        the same as a Ray job

what you get:
  <run.output>/runs/<name>/record.jsonl     everything that happened, one JSON object per line
  <run.output>/runs/<name>/checkpoints/     best and last
  <run.output>/runs/<name>/export/          the quantized student, a folder that stands alone
  raydistill results                        the runs side by side; --ui opens MLflow's page

`raydistill config --fields` explains every setting.
"""


def train_command(argv: Sequence[str]) -> int:
    """The verb `train`."""
    parser = command_parser("train", "Distil a teacher into a quantized student.", EXAMPLES)
    as_json, settings = run_arguments(parser, argv, "print the run's summary as JSON on stdout")
    loaded = load_config(settings)
    from raydistill.launch import run

    summary = run(loaded.config, console=console)
    if as_json:
        print(json.dumps(summary.to_json(), indent=1))
        return 0
    numbers = ", ".join(f"{name.removeprefix('evaluate/')} {value:.4g}" for name, value in summary.metrics.items())
    console.print(f"exported version {summary.best_version} to {summary.export}{': ' + numbers if numbers else ''}")
    return 0


if __name__ == "__main__":
    sys.exit(main_with_errors(train_command))
