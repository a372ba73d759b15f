"""What a study works on: models, and the rows of each purpose. No row has two of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from raydistill.config import Config
from raydistill.errors import DataError
from raydistill.study.arms import arm_config, shared_config

if TYPE_CHECKING:
    from raydistill.inputs import RunInputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """What is compared, and the rows of each purpose."""

    config: Config  # with models and data files, the same rows for every arm
    inputs: RunInputs  # training rows (also for calibration), held-out rows (which choose grids and checkpoints)
    test_path: Path  # rows of the table: they choose nothing


def prepare(study_config: Config, console: Console) -> Material:
    """Check models, read rows; makes the world if the config names one."""
    from raydistill.data.encode import require_references
    from raydistill.inputs import load_inputs
    from raydistill.worlds import build_world, with_world

    study = study_config.study
    config, test_path = shared_config(study_config, study.arms), study.test_path
    if config.world.name != "none":
        world = build_world(config, console)
        config, test_path = with_world(config, world), test_path or world.test_path
        config = config.model_copy(update={"world": config.world.model_copy(update={"name": "none"})})
    inputs = load_inputs(config, console)
    assert test_path is not None, "Study refuses a config without"
    if not any(example.has_reference for example in inputs.data.held_out):
        raise DataError(
            f"no held-out row has a reference completion (data.eval_rows={config.data.eval_rows}): PTQ grids and "
            "checkpoints are chosen on those"
        )
    if any(arm_config(config, arm).objective.on_policy_fraction < 1 for arm in study.arms):
        require_references(inputs.data.train)
    if study.test_path is not None:
        check_unseen(inputs.config, test_path)
    own = {"objective": study_config.objective}  # each arm sets its own on top
    return Material(config=inputs.config.model_copy(update=own), inputs=inputs, test_path=test_path)


def check_unseen(config: Config, test_path: Path) -> None:
    """DataError if a row of the final table was trained on or chose something."""
    from raydistill.data.rows import read_rows
    from raydistill.data.split import prompt_key
    from raydistill.evaluate.rows import rows_of_file

    used = [path for path in (config.data.path, config.data.eval_path) if path is not None]
    known = {prompt_key(row) for path in used for row in read_rows(path, config.data.on_bad_row).rows}
    chosen = rows_of_file(test_path, config.study.test_rows).rows
    shared = [row.row_id for row in chosen if prompt_key(row) in known]
    if shared:
        raise DataError(
            f"study.test_path={str(test_path)!r}: {len(shared)} of {len(chosen)} rows have a prompt that is in data.path or "
            f"data.eval_path, first {shared[0]}; remove them: the table would favour what was trained on them"
        )
