"""The verb `raydistill sweep` and `python tune/sweep.py`: many runs of one base config, compared.

`--help` and a wrong sweep file answer at once: Ray is imported to run.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from raydistill.cli import CONFIG_ARGUMENTS, console, print_table
from raydistill.progress import say
from raydistill.sweep.spec import Sweep, load_sweep
from raydistill.sweep.state import STATE_FILE

SUMMARY = """\
Run a sweep: a base config, the fields that vary, and how their values are chosen, as a TOML file says. All trials run on
one Ray cluster and share teachers (each row of the data set is answered once, as far as cache_gib holds the answers), data
and, for one base, format and adapter, the rollout engines. The same command goes on after Ctrl-C or a kill: finished trials
are kept, a running one goes on from its checkpoint. A trial that fails is reported and ends nothing. A config on the command
line (@mine.toml) replaces the base that the file names."""
EXAMPLES = """\
examples:
  python tune/sweep.py tune/lr_offpolicy.toml
        the learning rate of off-policy distillation on the embedded world
  python tune/sweep.py tune/beta_lambda.toml @configs/int4_onpolicy.toml --student.model M --data.path prompts.jsonl
        the grid of a shipped sweep on your own model and rows, with the [settings] of the sweep's file
  python tune/sweep.py tune/lr_offpolicy.toml --parallel 4 --trainer.num_steps 300
        four trials at a time, another number of steps for all
  python tune/sweep.py tune/lr_offpolicy.toml --sampler random --num-samples 20 --scheduler asha
        draw from the ranges, and stop trials that lag
  ray job submit --working-dir . -- python tune/sweep.py tune/lr_offpolicy.toml --run.output /shared/outputs
        the same as a Ray job
  raydistill results report outputs/demo/sweeps/lr_offpolicy -o report.html
        the sweep's page as one file to hand around (run.output of the shipped sweeps is outputs/demo)

what you get:
  <run.output>/sweeps/<name>/page.html     best first, what mattered, curves
  <run.output>/sweeps/<name>/sweep.json    the trials, for programs
  <run.output>/runs/<name>-000/ ...        each trial is a run like any other
"""


def sweep_command(argv: Sequence[str]) -> int:
    """The verb `sweep`."""
    switches, settings = _parser().parse_known_args(list(argv))
    changes = {
        "name": switches.name,
        "parallel": switches.parallel,
        "sampler": switches.sampler,
        "num_samples": switches.num_samples,
        "scheduler": switches.scheduler,
    }
    sweep = load_sweep(switches.file, settings, **changes)
    if sweep.note:
        say(console, f"note: {sweep.note}")
    _tell_of_kept_answers(sweep)
    if switches.dry_run:
        _show_plan(sweep)
        return 0
    from raydistill.sweep.run import run_sweep

    result = run_sweep(sweep, anew=switches.resume == "never", retry_failed=switches.retry_failed)
    if switches.json:
        print((sweep.folder / STATE_FILE).read_text(), end="")
    else:
        print_table(result.page.rows, list(result.page.rows[0]) if result.page.rows else [], title=sweep.name)
        console.print(result.sharing, style="dim")
        console.print(f"page: {result.page.page}", style="dim", soft_wrap=True)
    return 0 if result.num_finished else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sweep",
        usage="python tune/sweep.py FILE.toml [@config.toml ...] [switches] [--section.field value ...]",
        description=SUMMARY,
        epilog=f"{CONFIG_ARGUMENTS}\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("file", type=Path, metavar="FILE.toml", help="the sweep; those shipped are tune/*.toml")
    parser.add_argument("--name", help="of the sweep's folder (default: the file's name)")
    parser.add_argument("--parallel", type=int, metavar="N", help="trials at the same time (default: as the file says)")
    parser.add_argument("--sampler", choices=("grid", "random", "optuna"), help="how points are chosen")
    parser.add_argument("--num-samples", type=int, metavar="N", help="points that random and optuna try")
    parser.add_argument("--scheduler", choices=("none", "asha"), help="asha: stop trials that lag behind")
    parser.add_argument(
        "--resume", choices=("auto", "never"), default="auto", help="never: set an older sweep of this name aside"
    )
    parser.add_argument("--retry-failed", action="store_true", help="when going on, also run failed trials again")
    parser.add_argument("--dry-run", action="store_true", help="print the trials and start nothing")
    parser.add_argument("--json", action="store_true", help="print the trials as JSON on stdout")
    return parser


def _tell_of_kept_answers(sweep: Sweep) -> None:
    from raydistill.preflight.kept import kept_answers_note
    from raydistill.sweep.parallel import configs_of

    note = kept_answers_note(configs_of(sweep))
    if note is not None:
        say(console, f"warning: {note}", style="yellow")


def _show_plan(sweep: Sweep) -> None:
    if sweep.points is None:
        console.print(f"{sweep.num_trials} trials that {sweep.file.sampler} chooses one after another")
    else:
        print_table(sweep.points, sweep.fields, title=f"{sweep.name}: {sweep.num_trials} trials")
