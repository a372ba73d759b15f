"""The verb `raydistill runs`: what lies in an output folder or in run.storage, freeing the disk of what no run needs any
more, and bringing runs from one to the other.

Reads run folders only; needs no results store and imports nothing heavy.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydistill.cli import command_parser, console, print_table
from raydistill.errors import UserError
from raydistill.quant.formats import MANIFEST, PLAIN_COPY, SOURCE
from raydistill.recovery.checkpoint import CHECKPOINTS, OPTIMIZER, PREFIX, version_of
from raydistill.recovery.keeper import read_best
from raydistill.recovery.resume import last_status
from raydistill.recovery.sampled import FOLDER as SAMPLED
from raydistill.recovery.transfer import opened, pull, push, stored_runs
from raydistill.results.record_lines import read_record
from raydistill.results.run_folders import ASIDE, is_at_work
from raydistill.results.tables import format_bytes

SUMMARY = """\
List the runs of an output folder with what they take on the disk, or prune them; bring runs from run.storage or to it.

Pruning removes, from runs that have finished or were set aside (--resume never), every checkpoint but the best and the last,
and of those the optimizer state (they can be exported and evaluated, not continued); from other runs what a crash left
half-written, and with --unfinished the same as if they had finished: they are given up, and the same command starts another
run. Plain copies of exports that serve, bench and evaluate wrote for vLLM (export.dequantized) go too; they are written
again when they are needed. Records, exports and plots stay. A run that is at work is never touched."""
EXAMPLES = """\
examples:
  raydistill runs --output outputs/demo
        name, status, steps, checkpoints and bytes of each run
  raydistill runs prune --output outputs/demo --dry-run
        what pruning would free
  raydistill runs prune 20260101-120000-student --output outputs/demo
        one run only
  raydistill runs prune NAME --unfinished
        give up a run that failed or was interrupted; without NAME every one that is not at work
  raydistill runs --storage s3://bucket/prefix
        the runs in run.storage
  raydistill runs pull NAME --storage s3://bucket/prefix --output outputs
        all of a run on this disk, for evaluate, export, results and the rest; `push` is the other way
"""
LEFTOVERS = (".writing-*", ".removing-*", ".fetching-*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run's folder."""

    folder: Path
    status: str

    @property
    def is_finished(self) -> bool:
        return self.status == "finished"

    def checkpoints(self) -> list[Path]:
        return sorted((self.folder / CHECKPOINTS).glob(f"{PREFIX}*"))

    def disposable(self, gives_up: bool = False) -> Iterator[Path]:
        """What pruning removes. gives_up: also from a run that has not finished."""
        root = self.folder / CHECKPOINTS
        if self.status == "at work":
            return
        for pattern in LEFTOVERS:
            yield from root.glob(pattern)
        yield from self.folder.glob(f".*{PLAIN_COPY}.*.partial")
        yield from (copy for copy in self.folder.glob(f"*{PLAIN_COPY}") if _is_plain_copy(copy))
        if self.is_finished or ASIDE in self.folder.name or gives_up:
            kept = {read_best(root), *(version_of(folder) for folder in self.checkpoints()[-1:])}
            for folder in self.checkpoints():
                if version_of(folder) not in kept:
                    yield folder
                else:
                    yield from (path for path in (folder / OPTIMIZER, *folder.glob("random-*")) if path.exists())
            yield from (path for path in (self.folder / "ray_train", self.folder / SAMPLED) if path.exists())


def runs_command(argv: Sequence[str]) -> int:
    """The verb `runs`."""
    arguments = _parser().parse_args(list(argv))
    if arguments.unfinished and arguments.action != "prune":
        raise UserError("--unfinished says what `raydistill runs prune` removes; `raydistill runs` lists every run")
    if arguments.action in ("pull", "push"):
        return _transfer(arguments)
    if arguments.storage is not None:
        if arguments.action == "prune":
            raise UserError(
                "runs prune frees a disk; a run prunes its place in run.storage itself: leave --storage out"
            )
        rows = stored_runs(opened(arguments.storage, "list"))
    elif arguments.action == "prune":
        rows = prune(find_runs(arguments.output), arguments.names, arguments.dry_run, arguments.unfinished)
    else:
        rows = [_row(run) for run in find_runs(arguments.output)]
    if not rows:
        console.print(f"no runs in {arguments.storage or arguments.output / 'runs'}")
    elif arguments.json:
        print_table(rows, list(rows[0]), json=True)
    else:
        print_table(
            [{k: format_bytes(v) if k in ("bytes", "freed") else v for k, v in row.items()} for row in rows],
            list(rows[0]),
        )
    return 0


def _transfer(arguments: argparse.Namespace) -> int:
    """The actions `pull` and `push`."""
    storage = opened(arguments.storage, arguments.action)
    if not arguments.names:
        raise UserError(f"runs {arguments.action} needs the names of runs; `raydistill runs` lists them")
    for name in arguments.names:
        if arguments.action == "pull":
            folder = pull(storage, arguments.output.absolute(), name)
            console.print(f"{name} is in {folder}", soft_wrap=True)
        else:
            push(storage, arguments.output.absolute(), name)
            console.print(f"{name} is in {storage}", soft_wrap=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("runs", SUMMARY, EXAMPLES, takes_config=False)
    parser.add_argument("action", nargs="?", choices=("list", "prune", "pull", "push"), default="list")
    parser.add_argument(
        "names", nargs="*", metavar="RUN", help="prune these runs only (default: all); pull or push these"
    )
    parser.add_argument(
        "--storage", metavar="URL", help="run.storage of the runs: list what is there, pull from it, push to it"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("outputs"), help="run.output of the runs (default: %(default)s)"
    )
    parser.add_argument(
        "--unfinished",
        action="store_true",
        help="prune runs that failed or were interrupted as if they had finished: they do not go on any more",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be freed and remove nothing")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    return parser


def find_runs(output: Path) -> list[Run]:
    """Every run of an output folder by name."""
    found = []
    for folder in sorted((output / "runs").glob("*")):
        status = last_status(folder)
        if status is not None:
            found.append(Run(folder=folder, status="at work" if is_at_work(folder) else status))
    return found


def prune(runs: Sequence[Run], names: Sequence[str], dry_run: bool, unfinished: bool = False) -> list[dict[str, Any]]:
    """Remove what is disposable; one row for each run with the bytes that were (or would be) freed.

    unfinished: give up the runs that have not finished.
    """
    unknown = sorted(set(names) - {run.folder.name for run in runs})
    if unknown:
        known = ", ".join(run.folder.name for run in runs) or "none"
        raise UserError(f"there is no run {unknown[0]!r}; there are: {known}")
    rows = []
    for run in runs:
        if names and run.folder.name not in names:
            continue
        doomed = list(run.disposable(unfinished))
        freed = sum(size_of(path) for path in doomed)
        if not dry_run:
            for path in doomed:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        rows.append({"run": run.folder.name, "status": run.status, "freed": freed})
    return rows


def _is_plain_copy(folder: Path) -> bool:
    """Whether a folder is what its name says, and can be written again."""
    with suppress(OSError, ValueError, AttributeError):
        manifest = json.loads((folder / MANIFEST).read_text())
        return manifest.get("as") == "dequantized" and SOURCE in manifest.get("extra", {})
    return False


def size_of(path: Path) -> int:
    """Bytes of a file or of everything in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _row(run: Run) -> dict[str, Any]:
    steps = max((line["step"] + 1 for line in read_record(run.folder) if line["kind"] == "step"), default=0)
    return {
        "run": run.folder.name,
        "status": run.status,
        "steps": steps,
        "checkpoints": len(run.checkpoints()),
        "bytes": size_of(run.folder),
    }
