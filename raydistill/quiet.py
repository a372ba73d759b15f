"""Keeps other libraries' chatter off the console of our commands; actors' output is in Ray's log files anyway."""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import Any

MANY_PROCESSES = "worker processes have been started on node"
"""Ray's warning of more actors than processors, which is how light actors are meant to be here."""
CHATTY_LOGGERS = {
    "torchao": "announces kernels that this machine cannot load",
    "torch.utils._pytree": "deprecations between torch and torchao",
    "DeepSpeed": "announces which accelerator it chose",
    "ray.train": "repeats what the progress bar shows",
    "mlflow": "migration notes of a new results file",
    "alembic": "one line for each migration of a new results file",
    "lm_eval": "announces each of a task's settings that it leaves as it is",
}
"""Logger -> what it would say; all of it below the level of an error."""


def is_error(record: logging.LogRecord) -> bool:
    """Whether a log record is worth a line on our console."""
    return record.levelno >= logging.ERROR


def quiet_libraries() -> None:
    """Let only errors of these loggers through; imports nothing. Called before the libraries are imported."""
    for name in CHATTY_LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.ERROR)  # its children follow
        logger.addFilter(is_error)  # DeepSpeed sets its level again when it is imported, and writes to stdout
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars within our bars


@cache
def ray_speaks_on_stderr() -> None:
    """What Ray shows of its other processes goes to stderr: stdout belongs to our tables and JSON.

    Ray has no setting for it: complaints of a raylet reach a driver's stdout whatever `log_to_driver` says.
    """
    from ray._private import worker

    show = worker.print_to_stdstream

    def show_on_stderr(data: dict[str, Any], ignore_prefix: bool) -> None:
        lines = [line for line in data["lines"] if MANY_PROCESSES not in line]
        if lines:
            show({**data, "lines": lines, "is_err": True}, ignore_prefix)

    worker.print_to_stdstream = show_on_stderr
