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
from raydistill.errors import RunError
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
    command += [f"{name}={folder}" for name, folder in targets.items()]
    command += ["--teacher", str(teacher), "--data", str(test), "--rows", str(config.study.test_rows)]
    command += ["--per-row", str(per_row), "--json"]
    if config.evaluation.exact_match != "off":
        command += ["--exact-match", config.evaluation.exact_match]
        command += ["--max-new-tokens", str(config.evaluation.max_new_tokens)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RunError(
            f"the final evaluation failed with exit code {done.returncode}; its command: {' '.join(command)}"
        )
    rows = [SummaryRow(**row) for row in json.loads(done.stdout)]
    return [replace(row, role=roles.get(row.name, row.role)) for row in rows], read_row_values(per_row)
