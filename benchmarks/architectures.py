"""Each tested architecture through the whole chain: train with two ranks, kill, resume, export, evaluate.

    python benchmarks/architectures.py [--only qwen3,llama,gemma3] [--steps 6] [--output outputs/architectures]

For each architecture a tiny random model with the demo's tokenizer and rows (tiny_models.py):

qwen3    norms on queries and keys, tied head                                                 int2, a rank killed
llama    untied head, grouped-query attention, vocabulary padded beyond the tokenizer's       int4, the driver killed
gemma3   sliding-window and global layers, scaled embeddings, four norms a layer, tied head   int4, a rank killed

1. `raydistill train`, undisturbed: vLLM rollouts, the teacher is the student's own full-precision model, S = 0, float32;
2. the same again, with `kill -9` one step after the checkpoint in its middle; a killed driver's command is started again;
3. `raydistill export` of its last step: packed, and as other tools read it (int4: compressed-tensors, int2: dequantized);
4. `raydistill evaluate` of those two folders, in a process of its own.

Prints one row for each architecture; exit code 1 unless the policy gap stays below 1e-5 nats at every sync; trainer, engine and
exports have the same codes, and others than at the start; the ledger is complete; losses and final weights are those of the
undisturbed run bit for bit; and both folders have the KL to the teacher that the run measured at its last step, to 1e-3 nats.
The rows are also in <output>/architectures.json. `--section.field value` changes the runs: `--adapter.mode served`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tiny_models import ARCHITECTURES, Rows, make_world, write_model
from tiny_runs import TINY, Outcome, command, compare, json_of, lines_of, local_cluster, run_killed

from raydistill.cli import console, main_with_errors, print_table

QUANT = {"qwen3": "int2", "llama": "int4", "gemma3": "int4"}
VICTIMS = {"qwen3": "trainer", "llama": "driver", "gemma3": "trainer"}
LAYOUTS = {"int2": ("packed", "dequantized"), "int4": ("packed", "compressed-tensors")}
SEQUENCES, RANKS = 8, 2
LARGEST_GAP, LARGEST_KL_DIFFERENCE = 1e-5, 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What came of one architecture."""

    architecture: str
    format: str
    killed: str
    hit: bool  # the process was there and was killed
    starts: int  # of the command
    resumed_at: int | None  # the first step that was done again
    ended: bool
    syncs: int
    largest_gap_nats: float
    codes: str  # equal: the same hash in trainer, engine and every export, and another one than at the start
    ledger: str
    losses: str
    weights: str
    kl_start: float  # to the teacher, before training
    kl_run: float  # at the last step, as the run measured it
    kl_exports: dict[str, float]  # by layout
    seconds: float  # of the disturbed run

    @property
    def is_good(self) -> bool:
        same_kl = all(abs(kl - self.kl_run) <= LARGEST_KL_DIFFERENCE for kl in self.kl_exports.values())
        words = {self.codes, self.losses, self.weights, "equal" if self.ledger == "complete" else self.ledger}
        is_whole = self.hit and self.ended and self.resumed_at is not None
        return is_whole and words == {"equal"} and self.largest_gap_nats < LARGEST_GAP and same_kl


def main(argv: Sequence[str]) -> int:
    """Run the chain for each architecture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(ARCHITECTURES), help="architectures (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of each run (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/architectures"), help="folder for runs and exports"
    )
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    options, settings = parser.parse_known_args(list(argv))
    names = options.only.split(",")
    unknown = sorted(set(names) - set(ARCHITECTURES))
    if unknown:
        parser.error(f"--only {unknown[0]}: choose from {', '.join(ARCHITECTURES)}")
    output = options.output.absolute()
    shutil.rmtree(output, ignore_errors=True)
    world = make_world(output / "world")
    rows = []
    with local_cluster(num_cpus=8) as address:
        for name in names:
            chain = Chain(name, output, options.steps, address, world, settings)
            rows.append(chain.run())
            (output / "architectures.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    print_table([printed(row) for row in rows], list(printed(rows[0])), json=options.json)
    return 0 if all(row.is_good for row in rows) else 1


def printed(row: Row) -> dict[str, Any]:
    """A row as the table shows it."""
    exports = ", ".join(f"{layout} {kl:.5f}" for layout, kl in row.kl_exports.items())
    facts = {name: value for name, value in asdict(row).items() if name not in ("hit", "ended")}  # part of "good"
    return {
        **facts,
        "largest_gap_nats": f"{row.largest_gap_nats:.1e}",
        "kl_start": f"{row.kl_start:.5f}",
        "kl_run": f"{row.kl_run:.5f}",
        "kl_exports": exports,
        "seconds": round(row.seconds),
        "good": "yes" if row.is_good else "NO",
    }


class Chain:
    """One architecture."""

    def __init__(
        self, name: str, output: Path, num_steps: int, address: str, world: Rows, settings: Sequence[str]
    ) -> None:
        self._name, self._output, self._num_steps, self._address = name, output, num_steps, address
        self._world, self._settings = world, list(settings)
        self._model = write_model(name, world.tokenizer, output / "models" / name)
        self._log = output / f"{name}.log"
        self._middle = num_steps // 2  # a checkpoint, and the step after which the victim dies: one is done again

    def run(self) -> Row:
        """Undisturbed, disturbed, exported, evaluated."""
        calm, killed = f"{self._name}-undisturbed", f"{self._name}-killed"
        console.print(f"{self._name}: undisturbed run")
        if not self._train(calm, "nobody").ended:
            raise RuntimeError(f"the undisturbed run of {self._name} failed; see {self._log}")
        victim = VICTIMS[self._name]
        console.print(f"{self._name}: {victim} killed in the middle")
        outcome = self._train(killed, victim)
        if not outcome.ended:
            raise RuntimeError(f"the run of {self._name} whose {victim} was killed did not end; see {self._log}")
        console.print(f"{self._name}: exports and their evaluation")
        return self._row(self._folder(killed), self._folder(calm), victim, outcome)

    def _folder(self, run: str) -> Path:
        return self._output / "runs" / run

    def _train(self, run: str, victim: str) -> Outcome:
        settings = {
            **TINY,
            "run.name": run,
            "run.output": self._output,
            "student.model": self._model,
            "data.path": self._world.train_path,
            "data.eval_path": self._world.validation_path,
            "quant.format": QUANT[self._name],
            "trainer.num_workers": RANKS,
            "trainer.num_steps": self._num_steps,
            "trainer.sequences_per_step": SEQUENCES,
            "trainer.sequences_per_micro_batch": 2,
            "trainer.learning_rate": 5e-4,
            "sync.codes_check_every": 1,
            "evaluation.eval_every": self._num_steps,
            "checkpoint.save_every": self._middle,
            "cluster.address": self._address,
        }
        arguments = [*command("train", settings=settings), *self._settings]
        return run_killed(arguments, self._folder(run), self._log, victim, self._middle, self._address)

    def _row(self, folder: Path, calm: Path, victim: str, outcome: Outcome) -> Row:
        from raydistill.quant.export import read_manifest
        from raydistill.results.record_lines import evaluations_of

        exports, measured = self._export(folder), evaluations_of(folder)
        syncs = lines_of(folder, "sync")
        gaps = [sync["gap_mean_nats"] for sync in syncs]
        assert None not in gaps and {s["version"] for s in syncs} == set(range(self._num_steps + 1)), (
            "a sync is missing"
        )
        return Row(
            architecture=self._name,
            format=read_manifest(folder / "export")["format"]["name"],
            killed=victim,
            hit=outcome.hit,
            starts=outcome.starts,
            resumed_at=next((line["step"] for line in lines_of(folder, "resume")), None),
            ended=outcome.ended,
            syncs=len(syncs),
            largest_gap_nats=max(gaps),
            codes=_codes(folder, self._num_steps, [read_manifest(export) for export in exports.values()]),
            **compare(folder, calm, self._num_steps, SEQUENCES),
            kl_start=measured[0]["evaluate/kl_nats"],
            kl_run=measured[self._num_steps]["evaluate/kl_nats"],
            kl_exports=self._evaluate(folder, exports),
            seconds=outcome.seconds,
        )

    def _export(self, folder: Path) -> dict[str, Path]:
        """`raydistill export` in both layouts of the run's format."""
        exports = {}
        for layout in LAYOUTS[QUANT[self._name]]:
            exports[layout] = self._output / "exports" / f"{self._name}-{layout}"
            exports[layout].parent.mkdir(exist_ok=True)
            arguments = ("--to", exports[layout], "--as", layout, "--checkpoint", "last")
            json_of(command("export", folder, *arguments), self._log)
        return exports

    def _evaluate(self, folder: Path, exports: dict[str, Path]) -> dict[str, float]:
        """KL to the teacher of each folder, by layout; the run's folder brings teacher, rows and template."""
        targets = [f"{layout}={path}" for layout, path in exports.items()]
        table = json_of(command("evaluate", folder, *targets), self._log)
        return {row["name"]: row["kl_nats"] for row in table if row["name"] in exports}


def _codes(folder: Path, version: int, manifests: Sequence[dict[str, Any]]) -> str:
    """Whether trainer, engine and exports have the same codes."""
    from raydistill.recovery.checkpoint import checkpoint_folder, read_description

    trained = read_description(checkpoint_folder(folder / "checkpoints", version))["codes_hash"]
    engine = {line["version"]: line["codes_hash"] for line in lines_of(folder, "sync")}
    found = {trained, engine[version], *(manifest["codes_hash"] for manifest in manifests)}
    if engine[0] in found:
        return "never changed"
    return "equal" if len(found) == 1 and None not in found else f"differ: {sorted(map(str, found))}"


if __name__ == "__main__":
    sys.exit(main_with_errors(main))
