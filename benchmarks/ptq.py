"""Which grids GPTQ and AWQ can do, and how near they come to the teacher: every width, group and scale, tried.

    python benchmarks/ptq.py [--world outputs/demo/worlds/stories] [--groups 32,channel] [--widths int4,int3,int2]

Calibrated on training rows, KL to the full-precision model on validation rows; a cell without a number says why. Needs
`make ptq`, and a world that `raydistill demo` has made.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from raydistill.quant.formats import BITS, WeightFormat
from raydistill.results.tables import format_kl

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
    groups = [None if group == "channel" else int(group) for group in options.groups.split(",")]
    grids = [
        WeightFormat(bits=BITS[width], group_size=group, symmetric=symmetric, scale=scale)
        for width in options.widths.split(",")
        for group in groups
        for symmetric in (True, False)
        for scale in ("absmax", "searched")
    ]
    methods = options.methods.split(",")
    columns = measure(options.world, grids, methods, options.rows, options.validation)
    print(f"| grid | rtn | {' | '.join(methods)} |")
    print("|---|---:|" + "---:|" * len(methods))
    for number, fmt in enumerate(grids):
        print(f"| {fmt.name} | " + " | ".join(columns[name][number] for name in ("rtn", *methods)) + " |")


def measure(
    world: Path, grids: Sequence[WeightFormat], methods: Sequence[str], num_rows: int, num_validation: int
) -> dict[str, list[str]]:
    """method -> a cell for each grid."""
    from transformers import AutoTokenizer

    from raydistill.data.encode import encode_rows
    from raydistill.data.rows import read_rows
    from raydistill.evaluate.held_out import answer_held_out, score_answers
    from raydistill.evaluate.ptq import export_ptq
    from raydistill.evaluate.rows import encode_held_out, file_section, rows_of_file
    from raydistill.ptq.baselines import export_calibrated, layers_of
    from raydistill.ptq.calibration import draw_calibration
    from raydistill.ptq.overlay import Failed, Job, run_job
    from raydistill.quant.export import load_exported
    from raydistill.tensors import CompletionModel

    model = world / "teacher"
    tokenizer = AutoTokenizer.from_pretrained(model)
    section = file_section(512)
    train = encode_rows(read_rows(world / "train.jsonl", max_rows=10 * num_rows).rows, tokenizer, section)
    calibration = draw_calibration(train, num_rows, seed=0)
    held_out, _ = encode_held_out(
        rows_of_file(world / "validation.jsonl", num_validation), tokenizer, section, 512, [tokenizer.eos_token_id]
    )
    answers = answer_held_out(CompletionModel(load_exported(model)), held_out)

    def kl_of(folder: Path) -> str:
        kl = score_answers(CompletionModel(load_exported(folder)), answers).kl_nats
        assert kl is not None
        return format_kl(kl)

    columns: dict[str, list[str]] = {"rtn": []}
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        for fmt in grids:
            export_ptq(model, fmt, out)
            columns["rtn"].append(kl_of(out))
        for method in methods:
            job = Job(
                method="gptq" if method == "gptq" else "awq",
                model=model,
                layers=layers_of(model, ("lm_head",)),
                grids=tuple(grids),
                calibration=calibration,
                dtype=None,
            )
            columns[method] = []
            for made in run_job(
                job, Path(scratch) / f"{method}.log", lambda what, done: console.print(f"{done:.1f} {what}")
            ):
                if isinstance(made, Failed):
                    columns[method].append(made.reason)
                else:
                    export_calibrated(made, model, out, None, {"role": "ptq"})
                    columns[method].append(f"{kl_of(out)} ({made.seconds:.0f} s)")
    return columns


if __name__ == "__main__":
    main()
