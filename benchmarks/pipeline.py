"""What the running system costs beside its bare parts, in one process tree on one machine:

    python benchmarks/pipeline.py [--steps 40] [--output outputs/bench] [--section.field value ...]

1. each sync in both adapter modes: policy gap, bytes, milliseconds, code hashes;
2. rollout tokens per CPU-second of the rollout process, in the running system and in the bare engine;
3. the share of the wall time in which the trainer waits at S = 0 and S = 1, and how long rollout and training overlap.

Prints tables and writes them to <output>/pipeline.json; span pictures lie in the run folders.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raydistill.cli import console, main_with_errors, print_table

DEFAULTS = ["@configs/demo.toml"]
UNLOADED = -1  # the engine still holds the dense W it started with, which costs what dequantized codes cost


def main(argv: Sequence[str]) -> int:
    """Run the four short runs and the bare engine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each run")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"), help="folder for runs and tables")
    options, settings = parser.parse_known_args(list(argv))
    from raydistill.config.load import load_config
    from raydistill.launch import make_pools, start_cluster

    base = [*DEFAULTS, *settings, "--trainer.num_steps", str(options.steps), "--run.output", str(options.output)]
    base += ["--evaluation.eval_every", str(options.steps), "--world.folder", "outputs/demo/worlds/stories"]
    config = load_config(base).config
    start_cluster(config)
    pools = make_pools(config)
    pools.rollouts.prepare()
    results: dict[str, Any] = {"syncs": [], "stages": []}
    try:
        for mode in ("merged", "served"):
            for staleness in (0, 1):
                extra = ["--adapter.mode", mode, "--sync.max_staleness", str(staleness)]
                measure_run(load_config([*base, *extra]).config, pools, results)
        results["bare_engine_tokens_per_cpu_s"] = bare_engine(config, pools)
    finally:
        pools.shutdown()
    show(results)
    (options.output / "pipeline.json").write_text(json.dumps(results, indent=1) + "\n")
    return 0


def measure_run(config: Any, pools: Any, results: dict[str, Any]) -> None:
    """One short run; its syncs and its stage times."""
    from raydistill.launch import run
    from raydistill.report.plots import plot_spans
    from raydistill.results.record import read_record, read_spans
    from raydistill.results.timeline import overlap_seconds, wall_seconds

    summary = run(config, pools, console)
    mode, staleness = config.adapter.mode, config.sync.max_staleness
    lines = list(read_record(summary.folder))
    syncs = [line for line in lines if line["kind"] == "sync"]
    steps = [line for line in lines if line["kind"] == "step"]
    # The first steps fill the pipeline and warm the engine up.
    spans = [s for s in read_spans(summary.folder) if s.step >= 3]
    plot_spans(spans[: 6 * 20], summary.folder / "spans.png")
    results["syncs"].append(
        {
            "mode": mode,
            "S": staleness,
            "syncs": len(syncs),
            "gap_mean_nats": statistics.mean(s["gap_mean_nats"] for s in syncs),
            "gap_p99_nats": max(s["gap_p99_nats"] for s in syncs),
            "bytes": syncs[0]["size_bytes"],
            "ms": 1e3 * statistics.median(s["seconds"] for s in syncs),
            "codes": summary.codes_hash,
        }
    )
    waits = [s["metrics"]["trainer/wait_s"] for s in steps[3:]]
    walls = [s["metrics"]["loop/step_s"] for s in steps[3:]]
    results["stages"].append(
        {
            "mode": mode,
            "S": staleness,
            "step_s": statistics.median(walls),
            "trainer_wait_share": sum(waits) / sum(walls),
            "overlap_share": overlap_seconds(spans, "rollout", "trainer") / wall_seconds(spans),
            "rollout_tokens_per_cpu_s": summary.rollout_tokens_per_cpu_s,
            "picture": str(summary.folder / "spans.png"),
        }
    )


def bare_engine(config: Any, pools: Any) -> float:
    """The same prompts, batch sizes and settings on the same actor, with nobody else at work."""
    import asyncio

    return asyncio.run(_bare_engine(config, pools))


async def _bare_engine(config: Any, pools: Any) -> float:
    from raydistill.data.schedule import StepSchedule
    from raydistill.inputs import load_inputs

    inputs = load_inputs(config, console)
    config = inputs.config
    rollouts = await pools.rollouts.begin("bare-engine", config, inputs.engine_spec(), None)
    o = config.objective
    schedule = StepSchedule(inputs.data.train, 0, config.trainer.sequences_per_step, o.on_policy_fraction, o.mixing)
    for step in range(config.trainer.num_steps):
        prompts = schedule.plan(step).prompts
        if prompts is not None:
            async for _ in rollouts.sample(prompts, UNLOADED):
                pass
    return float(await rollouts.tokens_per_cpu_second())


def show(results: dict[str, Any]) -> None:
    """Three tables on stdout."""
    print_table(results["syncs"], list(results["syncs"][0]), title="syncs")
    print_table(results["stages"], list(results["stages"][0]), title="stages")
    print(f"bare engine: {results['bare_engine_tokens_per_cpu_s']:.0f} rollout tokens per CPU-second")


if __name__ == "__main__":
    sys.exit(main_with_errors(main))
