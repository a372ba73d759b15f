"""The study behind `raydistill compare` and `raydistill demo`: one table that says whether distillation beat plain PTQ.

    world or models -> best PTQ grid of each method and width -> one run for each arm and seed, on shared pools
    -> exported folders -> a fresh process scores every folder on test rows -> table, plots, verdict

Ray starts and vLLM is imported while a world's teacher trains. What is done is kept (state.py): the same command goes on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from raydistill.config import Config
from raydistill.errors import ConfigError
from raydistill.progress import bar, say
from raydistill.ptq.baselines import Baseline
from raydistill.study.arms import ROLES, arm_config, run_config, run_names, shared_config
from raydistill.study.material import Material, prepare
from raydistill.study.measure import check_tasks, measure
from raydistill.study.state import open_study, study_lock

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from raydistill.launch import Pools, RunSummary
    from raydistill.ptq.overlay import OnProgress
    from raydistill.results.tables import SummaryRow
    from raydistill.study.decision import Values
    from raydistill.study.report import Report


class Study:
    """One comparison; its files are in `folder`, its runs in `config.run.output`. Starts actors unless `pools` are given."""

    def __init__(self, config: Config, console: Console, folder: Path, pools: Pools | None = None) -> None:
        study, quant = config.study, config.quant
        if quant.format not in study.ptq_formats:
            raise ConfigError(
                f"study.ptq_formats={list(study.ptq_formats)} leaves out quant.format={quant.format!r}, which the students are "
                "compared with; add it (integer widths are compared), or use `raydistill train`"
            )
        if config.world.name == "none" and study.test_path is None:
            raise ConfigError(
                "study.test_path is not set; name a JSONL file of rows for the final table, which neither train nor choose "
                "anything (or a world: --world.name stories)"
            )
        if study.test_path is not None and not study.test_path.is_file():
            raise ConfigError(f"study.test_path={str(study.test_path)!r} is not a file; give JSONL rows")
        for arm in study.arms:
            arm_config(config, arm)  # refuses what does not go together
        if set(study.ptq_methods) - {"rtn"}:
            from raydistill.ptq.overlay import find_interpreter

            find_interpreter()
        check_tasks(study)
        self._config, self._console, self._given_pools = config, console, pools
        self._folder, self._output = folder.absolute(), config.run.output.absolute()
        self.seconds: dict[str, float] = {}

    def run(self) -> Report:
        """Everything."""
        with study_lock(self._folder):
            state = self._state = open_study(self._folder, self._config)
            if state.is_resumed:
                say(self._console, f"going on with the unfinished study {state.name}", style="bold")
            runs = self._finished_runs()
            wanted = [(arm, name) for arm in self._config.study.arms for name in self._names(arm)]
            # Models and files of the user's are looked at before Ray starts; a world's teacher trains meanwhile.
            material = self._prepare() if self._config.world.name == "none" else None
            pools = self._given_pools
            if pools is None and any(name not in runs for _, name in wanted):
                pools = self._start()
            try:
                material = material or self._prepare()
                baselines = self._quantize(material)
                config = self._on_best_grid(material.config, baselines)
                for number, (arm, name) in enumerate(wanted, 1):
                    if name in runs:
                        say(self._console, f"{name} has finished before: kept", style="dim")
                    else:
                        assert pools is not None
                        say(self._console, f"{name} (run {number} of {len(wanted)})", style="bold")
                        runs[name] = self._distil(arm, name, config, pools)
            finally:
                if pools is not None and self._given_pools is None:
                    pools.shutdown()
            with self._stage("evaluate"):
                exports = {name: summary.export for name, summary in runs.items()}
                roles = {name: ROLES[arm] for arm, name in wanted if arm in ROLES}
                rows, values = measure(
                    config, baselines, exports, roles, material.test_path, self._folder / "rows.jsonl"
                )
            report = self._report(config, material, baselines, runs, rows, values)
            state.finish()
            return report

    def _names(self, arm: str) -> list[str]:
        return run_names(self._state.name, arm, self._config.study.seeds)

    def _finished_runs(self) -> dict[str, RunSummary]:
        """Those of an earlier life of this study, by name."""
        from raydistill.launch import RunSummary

        if not self._state.is_resumed:
            return {}
        names = [name for arm in self._config.study.arms for name in self._names(arm)]
        found = {name: RunSummary.of_finished(self._output / "runs" / name) for name in names}
        return {name: summary for name, summary in found.items() if summary is not None}

    def _start(self) -> Pools:
        """A cluster with the study's actors on it; what they import goes on while a world's teacher trains."""
        import ray

        from raydistill.launch import make_pools, start_cluster
        from raydistill.preflight.placement import check_placement, node_resources
        from raydistill.progress import spinner

        config = shared_config(self._config, self._config.study.arms)
        with self._stage("start"), spinner(self._console, "starting Ray and the actors"):
            with ThreadPoolExecutor(max_workers=1) as threads:
                # As slow as Ray's start: side by side.
                imports = threads.submit(import_module, "raydistill.actors.rollout_pool")
                start_cluster(config)
                imports.result()
            check_placement(config, node_resources(ray.nodes()))
            pools = make_pools(config)
            if pools.rollouts is not None:
                pools.rollouts.prepare()
        return pools

    def _prepare(self) -> Material:
        with self._stage("rows" if self._config.world.name == "none" else "teacher"):
            return prepare(self._config, self._console)

    def _quantize(self, material: Material) -> list[Baseline]:
        """The best grid of every method and width, from an earlier life of the study where it got that far."""
        from raydistill.ptq.baselines import Subject, find_baselines
        from raydistill.ptq.calibration import draw_calibration
        from raydistill.quant.baselines import NUM_GRIDS
        from raydistill.quant.export_files import model_folder

        config, study = material.config, material.config.study
        missing = [method for method in study.ptq_methods if method not in self._state.baselines]
        if missing:
            subject = Subject(
                model=model_folder(str(config.student.model)),
                teacher=model_folder(str(config.teacher.model)),
                validation=material.inputs.data.held_out[: study.grid_rows],
                group_size=None if config.quant.group_size == "channel" else config.quant.group_size,
                scale_dtype=config.quant.scale_dtype,
                skip=config.quant.skip,
                dtype=config.student.dtype,
                template=config.data.template,
            )
            calibration = draw_calibration(material.inputs.data.train, study.calibration_rows, config.run.seed)
            if set(missing) - {"rtn"}:
                say(self._console, calibration.summary(), style="dim")
        for method in missing:
            grids = NUM_GRIDS * len(study.ptq_formats)
            say(self._console, f"{method}: {grids} grids", style="bold")
            with self._stage(method), bar(self._console) as progress:
                found = find_baselines(
                    method,
                    study.ptq_formats,
                    subject,
                    calibration,
                    self._folder / "ptq",
                    _shown(progress, progress.add_task(method, total=grids), grids, self._console),
                )
            self._state.add(method, found)
        found = [one for method in study.ptq_methods for one in self._state.baselines[method]]
        for one in found:
            say(self._console, _chosen(one), style="dim")
        return found

    def _on_best_grid(self, config: Config, baselines: list[Baseline]) -> Config:
        """The students train on the grid that plain rounding does best on."""
        from raydistill.quant.export import read_manifest

        best = next(one for one in baselines if (one.method, one.width) == ("rtn", config.quant.format))
        fmt = read_manifest(str(best.folder))["format"]
        grid = {"symmetric": fmt["symmetric"], "scale": fmt["scale"]}
        return config.model_copy(update={"quant": config.quant.model_copy(update=grid)})

    def _distil(self, arm: str, name: str, config: Config, pools: Pools) -> RunSummary:
        from raydistill.launch import run

        seed = self._names(arm).index(name)
        with self._stage(name.removeprefix(f"{self._state.name}-")):
            return run(run_config(config, arm, name, self._output, seed), pools, self._console)

    def _report(
        self,
        config: Config,
        material: Material,
        baselines: list[Baseline],
        runs: dict[str, RunSummary],
        rows: list[SummaryRow],
        values: Values,
    ) -> Report:
        """The table, its plot and its words, written and recorded."""
        from raydistill.study.report import ReportInputs, write_report

        return write_report(
            ReportInputs(
                name=self._state.name,
                folder=self._folder,
                output=self._output,
                config=config,
                data=material.inputs.data,
                test_path=material.test_path,
                baselines=tuple(baselines),
                runs=runs,
                runs_of_arm={arm: self._names(arm) for arm in config.study.arms},
                rows=rows,
                values=values,
                seconds=self.seconds,
            ),
            self._console,
        )

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        start = time.time()
        yield
        self.seconds[name] = time.time() - start


def _shown(progress: Progress, task: TaskID, grids: int, console: Console) -> OnProgress:
    """The bar moves; where there is none, a line for each finished grid: GPTQ and AWQ can take minutes for one."""
    said = 0

    def on_progress(what: str, done: float) -> None:
        nonlocal said
        progress.update(task, completed=done, description=what)
        if not console.is_terminal and int(done) > said:
            said = int(done)
            say(console, f"  {said} of {grids}: {what}", style="dim")

    return on_progress


def _chosen(one: Baseline) -> str:
    if one.folder is None:
        return f"{one.name}: none ({one.reason})"
    from raydistill.results.tables import format_kl

    ordered = sorted(one.kl_nats.items(), key=lambda item: (math.isnan(item[1]), item[1]))
    grids = ", ".join(f"{name} {format_kl(kl)}" for name, kl in ordered)
    notes = "".join(f"; {note}" for note in one.notes)
    return f"{one.name} by KL to the teacher on held-out rows: {grids}{notes}"
