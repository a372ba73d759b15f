"""Which grids GPTQ and AWQ can do, and how near they come to the teacher: every width, group and scale, tried.

    python benchmarks/ptq.py [--world outputs/demo/worlds/stories] [--groups 32,channel] [--widths int4,int3,int2]

Calibrated on training rows, KL to the full-precision model on validation rows, seconds of making it; a cell without a number
says why. Needs `make ptq`, and a world that `raydistill demo` has made.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from raydistill.data.encode import Example, encode_rows
from raydistill.data.rows import read_rows
from raydistill.evaluate.held_out import answer_held_out, score_answers
from raydistill.evaluate.ptq import export_ptq
from raydistill.evaluate.rows import encode_held_out, file_section, rows_of_file
from raydistill.ptq.baselines import export_calibrated, layers_of
from raydistill.ptq.calibration import Calibration, draw_calibration
from raydistill.ptq.overlay import Calibrated, Job, run_job
from raydistill.quant.export import load_exported
from raydistill.quant.formats import BITS, WeightFormat
from raydistill.results.tables import format_kl
from raydistill.tensors import CompletionModel

MAX_LENGTH = 512
console = Console(stderr=True, highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, default=Path("outputs/demo/worlds/stories"))
    parser.add_argument("--groups", default="32,channel")
    parser.add_argument("--widths", default="int4,int3,int2")
    parser.add_argument("--methods", default="gptq,awq")
    parser.add_argument("--rows", type=int, default=512, help="calibration rows")
    parser.add_argument("--validation", type=int, default=256, help="rows of the KL")
    options = parser.parse_args()
    methods = options.methods.split(",")
    bench = Bench(options.world, options.rows, options.validation)
    print(f"| grid | rtn | {' | '.join(methods)} |\n|---|---:|" + "---:|" * len(methods))
    for group in options.groups.split(","):
        size = None if group == "channel" else int(group)
        grids = [
            WeightFormat(bits=BITS[width], group_size=size, symmetric=symmetric, scale=scale)
            for width in options.widths.split(",")
            for symmetric in (True, False)
            for scale in ("absmax", "searched")
        ]
        columns = [bench.rounded(grids), *(bench.calibrated(method, grids) for method in methods)]
        for fmt, *cells in zip(grids, *columns, strict=True):
            print(f"| {fmt.name} | {' | '.join(cells)} |", flush=True)


class Bench:
    """One world's teacher, its rows, and what it says about the validation rows."""

    def __init__(self, world: Path, num_rows: int, num_validation: int) -> None:
        from transformers import AutoTokenizer

        self._model = world / "teacher"
        tokenizer = AutoTokenizer.from_pretrained(self._model)
        section = file_section(MAX_LENGTH)
        train: Sequence[Example] = encode_rows(
            read_rows(world / "train.jsonl", max_rows=10 * num_rows).rows, tokenizer, section
        )
        self._calibration: Calibration = draw_calibration(train, num_rows, seed=0)
        chosen = rows_of_file(world / "validation.jsonl", num_validation)
        held_out, _ = encode_held_out(chosen, tokenizer, section, MAX_LENGTH, [tokenizer.eos_token_id])
        self._answers = answer_held_out(CompletionModel(load_exported(self._model)), held_out)

    def rounded(self, grids: Sequence[WeightFormat]) -> list[str]:
        """A cell for each grid."""
        cells = []
        with tempfile.TemporaryDirectory() as scratch:
            for fmt in grids:
                export_ptq(self._model, fmt, Path(scratch) / "out")
                cells.append(self._kl(Path(scratch) / "out"))
        return cells

    def calibrated(self, method: str, grids: Sequence[WeightFormat]) -> list[str]:
        """The same by llm-compressor."""
        job = Job(
            method="gptq" if method == "gptq" else "awq",
            model=self._model,
            layers=layers_of(self._model, ("lm_head",)),
            grids=tuple(grids),
            calibration=self._calibration,
            dtype=None,
        )
        cells = []
        with tempfile.TemporaryDirectory() as scratch:
            out, log = Path(scratch) / "out", Path(scratch) / "log"
            for made in run_job(job, log, lambda what, done: console.print(f"{done:5.1f} {what}")):
                if isinstance(made, Calibrated):
                    export_calibrated(made, self._model, out, None, {"role": "ptq"})
                    cells.append(f"{self._kl(out)} ({made.seconds:.0f} s)")
                else:
                    cells.append(made.reason)
        return cells

    def _kl(self, folder: Path) -> str:
        kl = score_answers(CompletionModel(load_exported(folder)), self._answers).kl_nats
        assert kl is not None
        return format_kl(kl)


if __name__ == "__main__":
    main()
