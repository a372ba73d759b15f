"""The final evaluation: every folder, on the test rows, by one fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from raydistill.config import Config
from raydistill.config.sections import StudySection
from raydistill.errors import RunError, UserError
from raydistill.ptq.baselines import Baseline
from raydistill.results.tables import Role, SummaryRow

if TYPE_CHECKING:
    from raydistill.study.decision import Values

TEACHER = "teacher"
BASE = "base"  # the student's own model in full precision, where the teacher is another one


def measure(
    config: Config,
    baselines: Sequence[Baseline],
    exports: Mapping[str, Path],
    roles: Mapping[str, Role],
    test: Path,
    per_row: Path,
) -> tuple[list[SummaryRow], Values]:
    """(rows in the order of the targets, each test row's scores).

    exports: students by run. roles: of runs that are no students. per_row: file that the test rows' scores go to.
    """
    from raydistill.evaluate.paired import read_row_values
    from raydistill.quant.export_files import model_folder

    teacher, base = (model_folder(str(model)) for model in (config.teacher.model, config.student.model))
    targets = {TEACHER: teacher} | ({} if base.resolve() == teacher.resolve() else {BASE: base})
    targets |= {one.name: Path(one.folder) for one in baselines if one.folder is not None}
    targets |= exports
    command = [sys.executable, "-m", "raydistill.evaluate"]
    # The runs come first: how long an answer may get is read from the first record. A switch would cut the tasks' answers too.
    command += [f"{name}={folder}" for name, folder in {**exports, **targets}.items()]
    command += ["--teacher", str(teacher), "--data", str(test), "--rows", str(config.study.test_rows)]
    command += ["--per-row", str(per_row), "--json"]
    if config.evaluation.exact_match != "off":
        command += ["--exact-match", config.evaluation.exact_match]
    command += _task_switches(config.study)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RunError(
            f"the final evaluation failed with exit code {done.returncode}; its command: {' '.join(command)}"
        )
    rows = {row["name"]: SummaryRow(**row) for row in json.loads(done.stdout)}
    return [replace(rows[name], role=roles.get(name, rows[name].role)) for name in targets], read_row_values(per_row)


def check_tasks(study: StudySection) -> None:
    """UserError for a task that is none or lacks its rows: said before hours of training, not after them."""
    from raydistill.evaluate.arguments import parser
    from raydistill.evaluate.harness_tasks import load_tasks
    from raydistill.evaluate.hub import go_offline_if_unreachable
    from raydistill.evaluate.plan import task_request

    try:
        request = task_request(parser().parse_args(["model", *_task_switches(study)]))
        if request is None:
            return
        if not request.is_local:
            go_offline_if_unreachable()
        load_tasks(request)
    except UserError as error:
        raise UserError(f"study.tasks (their rows: study.task_data): {error}") from error


def _task_switches(study: StudySection) -> list[str]:
    """The tasks as `raydistill evaluate` takes them."""
    if not study.tasks:
        return []
    given = {"task-data": study.task_data, "limit": study.task_limit, "num-fewshot": study.num_fewshot}
    switches = [part for name, value in given.items() if value is not None for part in (f"--{name}", str(value))]
    return [f"--tasks={','.join(study.tasks)}", *switches]
