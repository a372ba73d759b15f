"""The study behind `raydistill demo`: one table that says whether distillation beat plain quantization.

    world (data, tokenizer, teacher) -> best PTQ grid per width -> one run per arm on shared pools -> exported folders
    -> a fresh process scores every folder -> table, plots, verdict

Ray starts and vLLM is imported while the teacher trains.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from raydistill.config import Config
from raydistill.errors import ConfigError, RunError

if TYPE_CHECKING:
    from raydistill.launch import Pools, RunSummary
    from raydistill.results.tables import SummaryRow

GOLD = {"objective": {"on_policy_fraction": 0.0, "distill_weight": 0.0, "ce_weight": 1.0}}
ARMS: dict[str, dict[str, dict[str, Any]]] = {
    "student": {},
    # Its exact match is measured once, at the end, with everybody's: no rollout engine is needed on the way.
    "gold-ce": GOLD | {"evaluation": {"exact_match": "off"}},
    "off-policy": {"objective": {"on_policy_fraction": 0.0, "beta": 0.0}},
    "mixed": {"objective": {"on_policy_fraction": 0.5, "beta": 0.5}},
    "on-policy": {"objective": {"on_policy_fraction": 1.0, "beta": 1.0}},
}


class Study:
    """One comparison, written to `config.run.output`."""

    def __init__(self, config: Config, console: Console) -> None:
        if config.world.name == "none":
            raise ConfigError(
                "world.name is not set; a demo runs on an embedded world: 'stories' or 'question_answers'"
            )
        if config.quant.format not in config.study.ptq_formats:
            raise ConfigError(
                f"study.ptq_formats={list(config.study.ptq_formats)} leaves out quant.format={config.quant.format!r}, which "
                "the student is compared with; add it (the demo compares integer widths), or use `raydistill train`"
            )
        self._config, self._console = config, console
        self._output = config.run.output.absolute()
        self._stamp = time.strftime("%Y%m%d-%H%M%S")
        self.seconds: dict[str, float] = {}

    def run(self) -> dict[str, Any]:
        """Everything; returns what summary.json holds."""
        from raydistill.progress import spinner
        from raydistill.worlds import build_world, with_world

        with self._stage("start"), spinner(self._console, "starting Ray and the actors"):
            pools = self._start()
        try:
            with self._stage("teacher"):
                world = build_world(self._config, self._console)
            config = with_world(self._config, world)
            with self._stage("ptq"):
                folders, config = self._quantize(config, world.validation_path)
            runs: dict[str, RunSummary] = {arm: self._distil(arm, config, pools) for arm in config.study.arms}
        finally:
            pools.shutdown()
        with self._stage("evaluate"):
            targets = {"teacher": Path(config.teacher.model or ""), **folders}
            rows = self._evaluate(config, targets | {arm: s.export for arm, s in runs.items()}, world.test_path)
        return self._report(config, rows, runs)

    def _start(self) -> Pools:
        """A cluster with the study's actors on it; what they import goes on while the teacher trains."""
        import ray

        from raydistill.launch import make_pools, start_cluster
        from raydistill.preflight.placement import check_placement

        with ThreadPoolExecutor(max_workers=1) as threads:
            imports = threads.submit(
                import_module, "raydistill.actors.rollout_pool"
            )  # as slow as Ray's start: side by side
            start_cluster(self._config)
            imports.result()
        check_placement(self._config, ray.cluster_resources())
        pools = make_pools(self._config)
        if pools.rollouts is not None:
            pools.rollouts.prepare()
        return pools

    def _quantize(self, config: Config, validation: Path) -> tuple[dict[str, Path], Config]:
        """Export the best PTQ of each width; the student trains on the best grid of its own."""
        from raydistill.evaluate.ptq import export_ptq, search_grids
        from raydistill.progress import bar
        from raydistill.quant.baselines import NUM_GRIDS
        from raydistill.quant.formats import BITS

        teacher = Path(config.teacher.model or "")
        group = None if config.quant.group_size == "channel" else config.quant.group_size
        examples = self._validation_examples(config, validation)
        with bar(self._console) as progress:
            task = progress.add_task("PTQ", total=NUM_GRIDS * len(config.study.ptq_formats))
            choices = search_grids(
                teacher,
                [BITS[name] for name in config.study.ptq_formats],
                group,
                examples,
                scale_dtype=config.quant.scale_dtype,
                skip=config.quant.skip,
                dtype=config.student.dtype,
                on_grid=lambda fmt, _: progress.update(task, advance=1, description=f"PTQ: {fmt.name}"),
            )
        folders = {}
        for name in config.study.ptq_formats:
            choice, folder = choices[BITS[name]], self._output / "ptq" / name
            export_ptq(teacher, choice.best, folder, skip=config.quant.skip, dtype=config.student.dtype)
            folders[f"ptq-{name}"] = folder
            grids = ", ".join(f"{row['format']} {row['kl_nats']:.4f}" for row in choice.rows())
            self._console.print(f"{name} grids by KL to the teacher on validation rows: {grids}", style="dim")
        best = choices[BITS[config.quant.format]].best
        grid = {"symmetric": best.symmetric, "scale": best.scale}
        return folders, config.model_copy(update={"quant": config.quant.model_copy(update=grid)})

    def _validation_examples(self, config: Config, validation: Path) -> Any:
        from raydistill.evaluate.rows import encode_held_out, rows_of_file
        from raydistill.preflight.checks import check_models

        facts = check_models(config)
        rows = rows_of_file(validation, config.study.grid_rows)
        examples, _ = encode_held_out(rows, facts.tokenizer, config.data, facts.max_length, facts.eos_ids)
        return examples

    def _distil(self, arm: str, config: Config, pools: Pools) -> RunSummary:
        from raydistill.launch import run

        data = config.model_dump()
        for section, values in ARMS[arm].items():
            data[section] |= values
        data["run"]["name"] = f"{self._stamp}-{arm}"
        data["run"]["output"] = self._output
        data["world"] = {"name": "none"}  # built already
        self._console.print(f"[bold]{arm}[/bold]")
        with self._stage(arm):
            return run(Config.model_validate(data), pools, self._console)

    def _evaluate(self, config: Config, targets: dict[str, Path], test: Path) -> list[SummaryRow]:
        """All rows from their folders, by one fresh process."""
        from raydistill.results.tables import SummaryRow

        command = [sys.executable, "-m", "raydistill.evaluate"]
        command += [f"{name}={folder}" for name, folder in targets.items()]
        command += ["--teacher", str(targets["teacher"]), "--data", str(test), "--rows", str(config.study.test_rows)]
        command += ["--json"]
        if config.evaluation.exact_match != "off":
            command += ["--exact-match", config.evaluation.exact_match]
            command += ["--max-new-tokens", str(config.evaluation.max_new_tokens)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise RunError(
                f"the final evaluation failed with exit code {done.returncode}; its command: {' '.join(command)}"
            )
        rows = [SummaryRow(**row) for row in json.loads(done.stdout)]
        return [replace(row, role="control") if row.name == "gold-ce" else row for row in rows]

    def _report(self, config: Config, rows: Sequence[SummaryRow], runs: dict[str, RunSummary]) -> dict[str, Any]:
        """Plots, summary.json, and the words under the table."""
        from raydistill.results.plots import plot_bytes_kl
        from raydistill.results.verdict import next_steps, verdict

        main = runs[config.study.arms[0]]
        plots = self._output / "plots"
        plots.mkdir(parents=True, exist_ok=True)
        files = {
            "bytes_kl": plot_bytes_kl(rows, plots / "bytes_kl.png"),
            "training": Path(shutil.copy(main.folder / "plots" / "training.png", plots)),
            "spans": Path(shutil.copy(main.folder / "plots" / "spans.png", plots)),
        }
        self._record_comparison(config, rows, files)
        summary = {
            "rows": [row_json(row) for row in rows],
            "seconds": {name: round(value, 1) for name, value in self.seconds.items()},
            "runs": {arm: s.to_json() for arm, s in runs.items()},
            "plots": {name: str(path) for name, path in files.items()},
            "verdict": verdict(rows),
            "next_steps": next_steps(rows),
        }
        path = self._output / "summary.json"
        temporary = path.with_suffix(".partial")
        temporary.write_text(json.dumps(summary, indent=1) + "\n")
        temporary.replace(path)
        self.rows, self.summary_path = rows, path
        return summary

    def _record_comparison(self, config: Config, rows: Sequence[SummaryRow], plots: dict[str, Path]) -> None:
        """The table and its plots as an entry of their own in the results store, beside the arms' runs."""
        from raydistill.results.recorded import recorded
        from raydistill.results.tables import comparison_json, comparison_markdown

        folder = self._output / "runs" / f"{self._stamp}-comparison"
        with recorded(folder, config, self._console) as record:
            record.table("comparison", comparison_json(rows), comparison_markdown(rows))
            for name, path in plots.items():
                record.artifact(name, path)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        start = time.time()
        yield
        self.seconds[name] = time.time() - start


def row_json(row: SummaryRow) -> dict[str, Any]:
    """One row of summary.json."""
    names = ("name", "role", "exact_match", "exact_match_se", "kl_nats", "perplexity", "bytes")
    return {name: getattr(row, name) for name in names}


EXAMPLES = """\
examples:
  raydistill demo
        the arithmetic stories: teacher, honest PTQ, gold-CE control and the distilled student in one table
  raydistill demo @configs/gsm8k.toml --world.train_path train.jsonl --world.test_path test.jsonl
        the same on GSM8K's questions and answers
  raydistill demo --trainer.num_steps 300 --quant.format int3
        change a setting and see what it does
  raydistill demo --json > table.json
"""


def demo_command(argv: Sequence[str]) -> int:
    """The verb `demo`."""
    from raydistill.cli import command_parser, console, run_arguments
    from raydistill.config.load import load_config

    parser = command_parser(
        "demo", "Run the whole system on a world that needs no download, and show the table.", EXAMPLES
    )
    as_json, settings = run_arguments(parser, argv, "print the summary as JSON on stdout")
    if not any(argument.startswith("@") for argument in settings):
        settings = [f"@{default_config()}", *settings]
    study = Study(load_config(settings).config, console)
    summary = study.run()
    if as_json:
        print(json.dumps(summary, indent=1))
        return 0
    show(study, summary)
    return 0


def default_config() -> Path:
    """configs/demo.toml of this checkout."""
    path = Path(__file__).resolve().parents[1] / "configs" / "demo.toml"
    if not path.is_file():
        raise ConfigError(
            f"{path} is missing; run from a checkout of raydistill, or name a config: raydistill demo @FILE"
        )
    return path


def show(study: Study, summary: dict[str, Any]) -> None:
    """The table and what it means."""
    from raydistill.results.tables import comparison_table

    out = Console()
    # The grids stand above, in the lines of the PTQ search: without them the table fits 80 columns.
    out.print(comparison_table([replace(row, extras={}) for row in study.rows], "Held-out test rows"))
    out.print(summary["verdict"])
    out.print(summary["next_steps"])
    stages = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in summary["seconds"].items())
    out.print(f"time: {stages}; {sum(summary['seconds'].values()) / 60:.1f} minutes in all", style="dim")
    out.print(f"plots: {', '.join(summary['plots'].values())}", style="dim")
    out.print(f"table: {study.summary_path}", style="dim")
