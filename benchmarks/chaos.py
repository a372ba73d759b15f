"""Kill processes of running jobs at random moments and look whether anything but time was lost.

    python benchmarks/chaos.py [--kills 20] [--each] [--victims rollout,teacher,...] [--seed 0] [--engine vllm]
        [--signal STOP] [--kills-per-run 8] [--output outputs/chaos] [--json]
    python benchmarks/chaos.py --of A/chaos.json B/chaos.json ...

A two-node Ray cluster on this machine (a head with the resource `trainer`, a node with `rollout` and `teacher`), a tiny
model, S = 0 in float32. One undisturbed run comes first; then runs that are disturbed several times, each a process of its own.
The seed draws for each kill a victim, a step and a moment (inside generate, score, backward, checkpoint commit, weight sync or
evaluation), and the victim gets `kill -9` there. Between two kills of a run stands a new checkpoint. Who can be a victim:

    rollout, teacher, evaluator   an actor of the pools
    trainer, controller, feed     a rank, the Ray Train actor that started it, the actor between driver and ranks
    driver                        the command; the same command is given again
    raylet                        the node of rollout, teacher and evaluator; an empty node takes its place
    head                          the head node with the cluster's control store and the trainer; a new cluster is started at
                                  the same address, and the same command is given again

With --signal STOP the victim hangs in place of dying (not driver, raylet and head: Ray itself watches over nodes).

Prints one row for each kill: the step it fell into, seconds until the run's next new step, and for its run whether it ended,
the ledger is complete, losses and final weights are those of the undisturbed run, bit for bit. A moment that did not come is
drawn again. Then a summary by victim and one by moment. Exit code 1 if anything but time was lost. All of it is in
<output>/chaos.json too, after every run. --of prints the tables of several such files together, and kills nothing.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chaos_cluster import Nodes
from chaos_kills import ENDS_THE_DRIVER, MOMENTS, STEPS_APART, VICTIMS, Kill, draw_kills
from chaos_run import UNDISTURBED, Job, Outcome
from tiny_runs import make_world

from raydistill.cli import console, main_with_errors, print_table

MAX_DRAWS = 2  # times the number of kills: a moment that never comes is not waited for without end
TIMEOUT_S = {"KILL": 120.0, "STOP": 30.0}  # of remote calls: a hang is noticed by its time limit only


@dataclass(slots=True, kw_only=True)
class Row:
    """One kill and what came of its run."""

    run: str
    victim: str
    moment: str
    step: int
    hit: bool  # the moment came, and the process was there
    seconds: float | None  # from the kill to the next new step
    ended: bool
    ledger: str
    losses: str
    weights: str

    @property
    def is_good(self) -> bool:
        return self.ended and self.ledger == "complete" and {self.losses, self.weights} == {"equal"}


def main(argv: Sequence[str]) -> int:
    """Run the matrix."""
    options = parse(argv)
    if options.of:
        rows = [Row(**row) for path in options.of for row in json.loads(path.read_text())["kills"]]
        show(rows, options.json)
        return 0 if all(row.is_good for row in rows) else 1
    output = options.output.absolute()
    shutil.rmtree(output / "runs", ignore_errors=True)
    source = random.Random(options.seed)
    number = options.kills * len(options.victims) if options.each else options.kills
    wanted = [options.victims[i % len(options.victims)] for i in range(number)]
    source.shuffle(wanted)
    with Nodes() as nodes:
        job = Job(
            output,
            make_world(output / "world"),
            nodes,
            options.engine,
            num_steps=STEPS_APART * (options.kills_per_run + 1) + 1,
            timeout_s=TIMEOUT_S[options.signal],
        )
        console.print("undisturbed run")
        assert job.run(UNDISTURBED).ended, f"the undisturbed run failed; see {output / UNDISTURBED}.log"
        rows = []
        while wanted and len(rows) < MAX_DRAWS * number:
            name = f"run-{len(rows)}"
            kills = draw_kills(wanted[: options.kills_per_run], source, getattr(signal, f"SIG{options.signal}"))
            outcome = job.run(name, kills)
            new = rows_of(name, kills, outcome)
            missed = [row.victim for row in new if not row.hit]
            rows, wanted = rows + new, wanted[options.kills_per_run :] + missed
            report(name, new, outcome)
            (output / "chaos.json").write_text(json.dumps(tables(rows), indent=1) + "\n")
    show(rows, options.json)
    return 0 if not wanted and all(row.is_good for row in rows) else 1


def show(rows: Sequence[Row], as_json: bool) -> None:
    if as_json:
        print(json.dumps(tables(rows), indent=1))
    else:
        for title, table in tables(rows).items():
            print_table(table, list(table[0]), title=title)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how many (default: %(default)s), victims in turn")
    parser.add_argument("--each", action="store_true", help="so many of every victim")
    parser.add_argument("--kills-per-run", type=int, default=8, metavar="N", help="at most (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws victims, steps and moments (default: %(default)s)")
    parser.add_argument("--victims", default=",".join(VICTIMS), help="who may be killed (default: %(default)s)")
    parser.add_argument(
        "--engine", choices=("vllm", "hf"), default="vllm", help="rollout.engine (default: %(default)s)"
    )
    parser.add_argument("--signal", choices=("KILL", "STOP"), default="KILL", help="STOP: the victim hangs")
    parser.add_argument("--output", type=Path, default=Path("outputs/chaos"), help="folder for runs and tables")
    parser.add_argument("--of", type=Path, nargs="+", metavar="FILE", help="print what earlier calls found, together")
    parser.add_argument("--json", action="store_true", help="print the tables as JSON")
    options = parser.parse_args(list(argv))
    options.victims = options.victims.split(",")
    unknown = sorted(set(options.victims) - set(VICTIMS))
    if unknown:
        parser.error(f"--victims {unknown[0]}: choose from {', '.join(VICTIMS)}")
    if options.signal == "STOP":
        options.victims = [victim for victim in options.victims if victim not in (*ENDS_THE_DRIVER, "raylet")]
    if not options.victims:
        parser.error("--signal STOP hangs actors; name one of them in --victims")
    if options.kills < 1 or options.kills_per_run < 1:
        parser.error("--kills and --kills-per-run must be at least 1")
    return options


def rows_of(name: str, kills: Sequence[Kill], outcome: Outcome) -> list[Row]:
    return [
        Row(
            run=name,
            victim=kill.victim,
            moment=kill.moment,
            step=hit.at_step if hit else kill.step,
            hit=hit is not None,
            seconds=hit.recovered_s if hit else None,
            ended=outcome.ended,
            ledger=outcome.ledger,
            losses=outcome.losses,
            weights=outcome.weights,
        )
        for kill, hit in zip(kills, outcome.hits, strict=True)
    ]


def report(name: str, rows: Sequence[Row], outcome: Outcome) -> None:
    """A line for each kill as soon as its run is over."""
    for row in rows:
        took = f"{row.seconds:.0f} s" if row.seconds is not None else "no next step"
        console.print(f"{name} {row.victim} inside {row.moment} at step {row.step}: {took if row.hit else 'missed'}")
    verdict = "as undisturbed" if all(row.is_good for row in rows) else str(outcome)
    console.print(f"{name}: {verdict}, {outcome.starts} starts, {outcome.seconds:.0f} s")


def tables(rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
    """All that is printed: the kills, and summaries by victim and by moment."""
    return {
        "kills": [asdict(row) for row in rows],
        "by victim": summary("victim", VICTIMS, rows),
        "by moment": summary("moment", MOMENTS, rows),
    }


def summary(key: str, values: Sequence[str], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each victim or moment: how many kills hit, how long the run took to go on, and how many runs were as undisturbed."""
    found = []
    for value in values:
        of_value = [row for row in rows if getattr(row, key) == value]
        hits = [row for row in of_value if row.hit]
        seconds = [row.seconds for row in hits if row.seconds is not None]

        def count(is_good: Callable[[Row], bool], of: Sequence[Row] = hits) -> int:
            return sum(is_good(row) for row in of)

        if of_value:
            found.append(
                {
                    key: value,
                    "hit": len(hits),
                    "missed": len(of_value) - len(hits),
                    "median s": round(statistics.median(seconds), 1) if seconds else None,
                    "max s": round(max(seconds), 1) if seconds else None,
                    "ended": count(lambda row: row.ended),
                    "ledger complete": count(lambda row: row.ledger == "complete"),
                    "losses equal": count(lambda row: row.losses == "equal"),
                    "weights equal": count(lambda row: row.weights == "equal"),
                }
            )
    return found


if __name__ == "__main__":
    sys.exit(main_with_errors(main))
