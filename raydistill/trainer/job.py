"""What a crew is told to do. Apart from the ranks' code: the feed holds a job too, and must not load all that ranks need."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydistill.config import Config
from raydistill.messages import TokenRows


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerJob:
    """What the driver hands to every worker."""

    config: Config
    probes: TokenRows
    feed: Any  # actor handle
    run_folder: Path
    resume_from: Path | None = None  # a checkpoint's folder
