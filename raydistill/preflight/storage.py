"""Whether the output folder can take what a run writes; asked before anything starts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from raydistill.config import Config
from raydistill.errors import ResourceError
from raydistill.results.tables import format_bytes

ADAM_COPIES = 3  # of what is trained in a checkpoint's optimizer state: float32 weights and two moments
FLOAT32 = 4


def check_writable(config: Config) -> str:
    """A line about run.output; ResourceError if it cannot be written."""
    there = _existing(config)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ResourceError(
            f"run.output={str(config.run.output)!r} cannot be written ({there}); choose another run.output"
        )
    free = shutil.disk_usage(there).free
    return f"{config.run.output.absolute()} can be written, {format_bytes(free)} are free"


def check_room(config: Config, trained_weights: int) -> str:
    """A line about the checkpoints that lie there at one time; ResourceError if they do not fit the disk."""
    keeping = config.checkpoint
    folders = keeping.keep_last + keeping.keep_best + 2  # one being written, one that waits for its evaluation
    needed = folders * trained_weights * FLOAT32 * (1 + ADAM_COPIES)
    free = shutil.disk_usage(_existing(config)).free
    text = f"{folders} checkpoints need about {format_bytes(needed)}, {format_bytes(free)} are free"
    if needed > free:
        raise ResourceError(f"{text} at run.output; lower checkpoint.keep_last, or choose another run.output")
    return text


def _existing(config: Config) -> Path:
    folder = config.run.output.absolute()
    return next(parent for parent in (folder, *folder.parents) if parent.exists())
