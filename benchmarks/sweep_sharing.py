"""What the trials of a sweep share: the same runs once one by one, each a command of its own, and once as one sweep.

    python benchmarks/sweep_sharing.py [--trials 8] [--policy off|on] [--steps 100] [--engine vllm]
        [--parallel 1] [--adapter merged|served] [--teacher-layers 12] [--output outputs/sharing]

On the embedded world, the same seeds; only the learning rate differs between trials. The separate runs follow one another;
the sweep has --parallel trials at a time. CPU-seconds are those of all processes, Ray's own included. "work" is the time
between the moment a run's engines, teachers and ranks are armed and its last step or evaluation (of several at a time, when
any of them is there), also by role; "start-up" is everything else: imports, Ray, engines, the end. Prints the CPU-seconds of
both sides, the rows that the teachers computed, and the largest difference between the results of a trial and of its separate
run. The student is as large as its teacher, of 3 layers; --teacher-layers makes a deeper teacher, trained briefly.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cpu_meter import ROLES, CpuMeter, environment
from tiny_runs import command, lines_of

from raydistill.cli import console, main_with_errors, print_table

LOWEST, HIGHEST = 5e-4, 1.6e-2  # learning rates
RUN_S = 3600.0
DEEPER_STEPS = 150  # of the deeper teacher's training; so many rows that the tokenizer is the same


def main(argv: Sequence[str]) -> int:
    """Run both sides."""
    options = parse(argv)
    output = options.output.absolute()
    for side in ("separate", "sweep"):
        shutil.rmtree(output / side, ignore_errors=True)
    make_worlds(options, output)
    rates = [LOWEST * (HIGHEST / LOWEST) ** (i / max(1, options.trials - 1)) for i in range(options.trials)]
    rates = [float(f"{rate:.6g}") for rate in rates]
    sides = {"separate": separate_runs(options, output, rates), "sweep": one_sweep(options, output, rates)}
    table = [{"side": name, **facts} for name, facts in sides.items()]
    ratio = {
        "side": "sweep / separate",
        **{key: round(table[1][key] / table[0][key], 3) for key in table[0] if key.endswith("s") and table[0][key]},
    }
    found = {"sides": [*table, ratio], "results": differences(output, options)}
    (output / f"sharing-{options.policy}.json").write_text(json.dumps(found, indent=1) + "\n")
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        print_table(found["sides"], list(table[0]), title=f"{options.trials} trials, {options.policy}-policy")
        print_table(found["results"], list(found["results"][0]), title="a trial against its separate run")
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=8, help="learning rates (default: %(default)s)")
    parser.add_argument("--policy", choices=("off", "on"), default="off", help="lambda = 0 or 1 (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of a trial (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=3500, help="training rows (default: %(default)s)")
    parser.add_argument("--staleness", type=int, default=0, help="sync.max_staleness (default: %(default)s)")
    parser.add_argument("--engine", choices=("vllm", "hf"), default="vllm", help="what samples (default: %(default)s)")
    parser.add_argument("--parallel", type=int, default=1, help="trials at a time in the sweep (default: %(default)s)")
    parser.add_argument(
        "--adapter",
        choices=("merged", "served"),
        default="merged",
        help="adapter.mode; served: one engine holds those of --parallel trials (default: %(default)s)",
    )
    parser.add_argument(
        "--teacher-layers", type=int, metavar="N", help="of a deeper teacher (default: the student's own)"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/sharing"), help="folder of world, runs and tables")
    parser.add_argument("--json", action="store_true", help="print the tables as JSON")
    return parser.parse_args(list(argv))


def settings(options: argparse.Namespace, output: Path) -> dict[str, object]:
    """Of every trial on both sides."""
    policy = 0.0 if options.policy == "off" else 1.0
    deeper = {"teacher.model": deeper_world(options) / "teacher"} if options.teacher_layers else {}
    return deeper | {
        "run.output": output,
        "world.folder": options.output.absolute() / "world",
        "data.max_rows": options.rows,
        "objective.on_policy_fraction": policy,
        "objective.beta": policy,
        "adapter.mode": options.adapter,
        "rollout.engine": options.engine,
        "sync.max_staleness": options.staleness,
        "trainer.num_steps": options.steps,
        "evaluation.eval_every": max(1, options.steps // 2),
        "evaluation.exact_match": "off",
    }


def deeper_world(options: argparse.Namespace) -> Path:
    return Path(options.output.absolute() / f"world-{options.teacher_layers}")


def make_worlds(options: argparse.Namespace, output: Path) -> None:
    """Beforehand, and outside of both sides."""
    from raydistill.config.load import load_config
    from raydistill.worlds import build_world

    def build(folder: Path, *recipe: str) -> None:
        arguments = ["@configs/demo.toml", f"--world.folder={folder}", f"--run.output={output}", *recipe]
        build_world(load_config(arguments).config, console)

    build(output / "world")
    if options.teacher_layers:
        build(
            deeper_world(options),
            f"--world.recipe.num_layers={options.teacher_layers}",
            f"--world.recipe.num_steps={DEEPER_STEPS}",
        )


def separate_runs(options: argparse.Namespace, output: Path, rates: Sequence[float]) -> dict[str, Any]:
    """One command after another."""
    with CpuMeter() as meter:
        start = time.time()
        for number, rate in enumerate(rates):
            fields = settings(options, output / "separate") | {
                "trainer.learning_rate": rate,
                "run.name": f"lr-{number:03d}",
            }
            run(command("train", "@configs/demo.toml", settings=fields), meter, output / "separate.log")
        wall = time.time() - start
        return facts(meter, output / "separate", len(rates), wall, teacher_rows(options, len(rates)))


def one_sweep(options: argparse.Namespace, output: Path, rates: Sequence[float]) -> dict[str, Any]:
    """One command for all."""
    file = output / "lr.toml"
    lines = ['base = ["@configs/demo.toml"]', "[settings]"]
    if options.parallel > 1:  # Ray books half a core for each trial's trainer, however many cores there are
        lines.append(f'"cluster.num_cpus" = {max(os.cpu_count() or 1, options.parallel + 2)}')
    lines += [f'"{field}" = {json.dumps(str(v) if isinstance(v, Path) else v)}' for field, v in
              settings(options, output / "sweep").items()]  # fmt: skip
    file.write_text("\n".join([*lines, "[space]", f'"trainer.learning_rate" = {json.dumps(list(rates))}']) + "\n")
    with CpuMeter() as meter:
        start = time.time()
        run(
            [sys.executable, "tune/sweep.py", str(file), "--parallel", str(options.parallel)],
            meter,
            output / "sweep.log",
        )
        wall = time.time() - start
        shared = json.loads((output / "sweep" / "sweeps" / "lr" / "sweep.json").read_text())["shared"]
        return facts(meter, output / "sweep", len(rates), wall, shared["teacher_rows"]["computed_rows"])


def run(line: Sequence[str], meter: CpuMeter, log: Path) -> None:
    console.print(" ".join(line[1:4]), "...", style="dim", soft_wrap=True)
    with log.open("ab") as stream:
        subprocess.run(line, env=environment(meter), stdout=stream, stderr=stream, timeout=RUN_S, check=True)


def facts(meter: CpuMeter, output: Path, trials: int, wall: float, rows: int) -> dict[str, Any]:
    windows = [window(output / "runs" / f"lr-{number:03d}") for number in range(trials)]
    by_role = sum((meter.between(*one) for one in merged(windows)), Counter[str]())
    work = by_role.total()
    return {
        "all CPU-s": round(meter.total(), 1),
        "start-up CPU-s": round(meter.total() - work, 1),
        "work CPU-s": round(work, 1),
        **{f"of these, {role} CPU-s": round(by_role[role], 1) for role in (*ROLES.values(), "rest")},
        "wall s": round(wall, 1),
        "teacher rows": rows,
    }


def window(folder: Path) -> tuple[float, float]:
    """From everybody armed to the last step or evaluation of a run, by its record."""
    armed = [line["time_s"] for line in lines_of(folder, "table") if line["name"] == "engines"]
    ends = [line["time_s"] for kind in ("step", "evaluation") for line in lines_of(folder, kind)]
    return armed[-1], max(ends)


def merged(windows: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same time, with every moment in one window only."""
    found: list[tuple[float, float]] = []
    for start, end in sorted(windows):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def teacher_rows(options: argparse.Namespace, trials: int) -> int:
    """Of separate runs: every sequence of every step, and the held-out rows."""
    from raydistill.config.load import load_config

    config = load_config(["@configs/demo.toml"]).config
    return trials * (options.steps * config.trainer.sequences_per_step + config.data.eval_rows)


def differences(output: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Losses and the last evaluation, trial by trial."""
    found = []
    for number in range(options.trials):
        here, there = (output / side / "runs" / f"lr-{number:03d}" for side in ("separate", "sweep"))
        losses = [[line["metrics"]["trainer/loss"] for line in lines_of(folder, "step")] for folder in (here, there)]
        assert len(losses[0]) == len(losses[1]) == options.steps
        last = [lines_of(folder, "evaluation")[-1]["metrics"]["evaluate/kl_nats"] for folder in (here, there)]
        found.append(
            {
                "trial": number,
                "largest difference of a loss": max(abs(a - b) for a, b in zip(*losses, strict=True)),
                "first loss": losses[0][0],
                "last loss": losses[0][-1],
                "KL, separate": last[0],
                "KL, sweep": last[1],
            }
        )
    return found


if __name__ == "__main__":
    sys.exit(main_with_errors(main))
