"""Stop a run with Ctrl-C, SIGTERM and `kill -9` of the command, and look how long it takes, what it leaves, and what is lost.

    python benchmarks/stop.py [--engine vllm] [--moments start,training,hang] [--output outputs/stop] [--json]

The command is `raydistill train` as a user gives it, with a Ray of its own on this machine; a tiny model, S = 0 in float32. One
undisturbed run comes first. Another one is stopped again and again, and each time the same command goes on with it:

    start      some seconds after the command was given, before there is anything to save
    training   once a few new steps are recorded
    hang       then too, but the trainer's rank is stopped first (SIGSTOP) and cannot write its checkpoint

Ctrl-C is SIGINT to the command's whole process group, as a terminal sends it; SIGTERM and SIGKILL go to the command alone.
Prints one row for each stop: seconds until the command has ended, its exit code, seconds until its last process has, the steps
that the record and the newest checkpoint held. At last whether the run ended, the ledger is complete, losses and final weights
are those of the undisturbed run, bit for bit. Exit code 1 if anything was lost, a process stayed, or a stop took over 30 s.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from tiny_runs import SEQUENCES, TRAINER_TITLE, compare, lines_of, make_world, tiny_train

from raydistill.cli import console, main_with_errors, print_table

MOMENTS = ("start", "training", "hang")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
LIMIT_S = 30.0
START_S = 6.0  # after the command: within the preflight checks or Ray's start
APART = 5  # new steps between two stops, one checkpoint among them
SAVE_EVERY = 3
RUN_S = 900.0
LEFT_S = 150.0  # how long processes of a command that has ended are waited for


@dataclass(slots=True, kw_only=True)
class Row:
    """One stop."""

    signal: str
    moment: str
    seconds: float
    exit_code: int
    all_gone_s: float | None  # None: some stayed
    steps: int
    checkpoint: int

    @property
    def is_good(self) -> bool:
        return self.all_gone_s is not None and self.seconds <= LIMIT_S


def main(argv: Sequence[str]) -> int:
    """Run all stops."""
    options = parse(argv)
    output = options.output.absolute()
    shutil.rmtree(output / "runs", ignore_errors=True)
    stops = [(number, moment) for moment in options.moments.split(",") for number in SIGNALS]
    stops = [
        one for one in stops if one != (signal.SIGKILL, "hang")
    ]  # a stopped process cannot notice that its parent died
    num_steps = APART * (len(stops) + 1)
    world = make_world(output / "world")
    rows = []
    console.print("undisturbed run")
    with (output / "undisturbed.log").open("wb") as log:
        subprocess.run(
            line(options, world, "undisturbed", num_steps), stdout=log, stderr=log, timeout=RUN_S, check=True
        )
    for number, moment in stops:
        rows.append(stop(line(options, world, "stopped", num_steps), output, number, moment))
        console.print(f"{rows[-1].signal} at {moment}: {rows[-1].seconds:.1f} s, exit code {rows[-1].exit_code}")
    with (output / "stopped.log").open("ab") as log:
        last = subprocess.run(
            line(options, world, "stopped", num_steps), stdout=log, stderr=log, timeout=RUN_S, check=False
        )
    found = compare(output / "runs" / "stopped", output / "runs" / "undisturbed", num_steps, SEQUENCES)
    tables = {"stops": [asdict(row) for row in rows], "run": [{"exit code": last.returncode, **found}]}
    (output / "stop.json").write_text(json.dumps(tables, indent=1) + "\n")
    if options.json:
        print(json.dumps(tables, indent=1))
    else:
        for title, table in tables.items():
            print_table(table, list(table[0]), title=title)
    is_whole = found == {"ledger": "complete", "losses": "equal", "weights": "equal"} and last.returncode == 0
    return 0 if is_whole and all(row.is_good for row in rows) else 1


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--engine", choices=("vllm", "hf"), default="vllm", help="rollout.engine (default: %(default)s)"
    )
    parser.add_argument("--moments", default=",".join(MOMENTS), help="which, in this order (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs/stop"), help="folder for runs and tables")
    parser.add_argument("--json", action="store_true", help="print the tables as JSON")
    options = parser.parse_args(list(argv))
    if unknown := sorted(set(options.moments.split(",")) - set(MOMENTS)):
        parser.error(f"--moments {unknown[0]}: choose from {', '.join(MOMENTS)}")
    return options


def line(options: argparse.Namespace, world: Path, name: str, num_steps: int) -> list[str]:
    settings = {
        "rollout.engine": options.engine,
        "evaluation.eval_every": num_steps,
        "checkpoint.save_every": SAVE_EVERY,
    }
    return tiny_train(world, options.output.absolute(), name, num_steps, settings)


def stop(given: Sequence[str], output: Path, number: signal.Signals, moment: str) -> Row:
    """Give the command, stop it at its moment, wait until it and all that it started have ended."""
    folder = output / "runs" / "stopped"
    with (output / "stopped.log").open("ab") as log:
        process = subprocess.Popen(given, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(process, folder, moment)
        started = family(process.pid)
        if moment == "hang":
            for one in started:
                with suppress(psutil.Error):
                    if " ".join(one.cmdline()).startswith(TRAINER_TITLE):
                        one.suspend()
        struck = time.monotonic()
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        code = process.wait(LEFT_S + LIMIT_S)
        seconds = time.monotonic() - struck
        _, alive = psutil.wait_procs(started, timeout=LEFT_S)
        gone = None if alive else time.monotonic() - struck
        for one in alive:
            console.print(f"still there: {one}", style="red", markup=False)
            with suppress(psutil.Error):
                one.kill()
    finally:
        process.kill()
        process.wait()
    return Row(
        signal=number.name,
        moment=moment,
        seconds=round(seconds, 1),
        exit_code=code,
        all_gone_s=None if gone is None else round(gone, 1),
        steps=len(lines_of(folder, "step")),
        checkpoint=newest_checkpoint(folder),
    )


def wait_for(process: subprocess.Popen[bytes], folder: Path, moment: str) -> None:
    if moment == "start":
        time.sleep(START_S)
        return
    goal, deadline = len(lines_of(folder, "step")) + APART, time.monotonic() + RUN_S
    while len(lines_of(folder, "step")) < goal and time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(
                f"the run ended before its stop, with {process.returncode}; see {folder.parents[1]}/stopped.log"
            )
        time.sleep(0.05)


def family(pid: int) -> list[psutil.Process]:
    """The command's processes, without itself."""
    with suppress(psutil.Error):
        return psutil.Process(pid).children(recursive=True)
    return []


def newest_checkpoint(folder: Path) -> int:
    from raydistill.recovery.checkpoint import PREFIX, version_of

    return max((version_of(path) for path in (folder / "checkpoints").glob(f"{PREFIX}*")), default=0)


if __name__ == "__main__":
    sys.exit(main_with_errors(main))
