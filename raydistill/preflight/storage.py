"""Whether the output folder can take what a run writes; asked before anything starts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from raydistill.config import Config
from raydistill.errors import ResourceError, StorageError, UserError
from raydistill.recovery.checkpoint import CHECKPOINTS
from raydistill.recovery.runs import size_of
from raydistill.recovery.storage import Storage
from raydistill.results.tables import format_bytes

ADAM_COPIES = 3  # of what is trained in a checkpoint's optimizer state: float32 weights and two moments
FLOAT32 = 4
NODES_TIMEOUT_S = 300.0  # a process has to start on each node


def check_writable(config: Config) -> str:
    """A line about run.output; ResourceError if it cannot be written."""
    there = _existing(config)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ResourceError(
            f"run.output={str(config.run.output)!r} cannot be written ({there}); choose another run.output"
        )
    free = shutil.disk_usage(there).free
    return f"{config.run.output.absolute()} can be written, {format_bytes(free)} are free"


def check_storage(config: Config) -> str | None:
    """A line about run.storage, written and read back; ResourceError if it cannot be used, None where there is none."""
    url = config.run.storage
    if url is None:
        return None
    storage = Storage(url)
    try:
        storage.check()
    except StorageError as error:
        raise ResourceError(str(error)) from error
    return f"{storage} was written and read back"


def check_nodes_reach_storage(config: Config) -> None:
    """The same from every node of the cluster that Ray has joined; ResourceError names the first that cannot."""
    if config.run.storage is None:
        return
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return  # the driver's own, which has been asked
    ask = ray.remote(num_cpus=0, max_retries=0)(_storage_problem)
    asked = [
        (
            node["NodeManagerAddress"],
            ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)),
        )
        for node in nodes
    ]
    for (address, _), problem in zip(
        asked, ray.get([task.remote(config) for _, task in asked], timeout=NODES_TIMEOUT_S), strict=True
    ):
        if problem is not None:
            raise ResourceError(f"node {address}: {problem}")


def _storage_problem(config: Config) -> str | None:
    try:
        check_storage(config)
    except UserError as error:
        return str(error)
    return None


def check_room(config: Config, trained_weights: int, run: Path | None = None) -> str:
    """A line about the checkpoints that lie there at one time; ResourceError if they do not fit the disk.

    run: the folder of a run that goes on; its checkpoints have their room already.
    """
    keeping = config.checkpoint
    folders = keeping.keep_last + keeping.keep_best + 2  # one being written, one that waits for its evaluation
    needed = folders * trained_weights * FLOAT32 * (1 + ADAM_COPIES)
    free = shutil.disk_usage(_existing(config)).free
    there = 0 if run is None else size_of(run / CHECKPOINTS)
    text = f"{folders} checkpoints need about {format_bytes(needed)}, {format_bytes(free)} are free"
    if there:
        text += f", {format_bytes(there)} lie there already"
    if needed - there > free:
        raise ResourceError(f"{text} at run.output; lower checkpoint.keep_last, or choose another run.output")
    return text


def _existing(config: Config) -> Path:
    folder = config.run.output.absolute()
    return next(parent for parent in (folder, *folder.parents) if parent.exists())
