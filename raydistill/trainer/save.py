"""One rank's part of a checkpoint: DeepSpeed's state, the random state, the ledger; rank 0 describes the whole.

Every function is collective over the ranks. Each writes into the folder as its own node sees it. Where all see the same
one, rank 0 completes it. With `run.storage` the nodes may have disks of their own: on each of them its lowest rank completes
what lies there, which is whole only in the storage (`uploads.py`).
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from raydistill.errors import RunError
from raydistill.messages import StudentWeights
from raydistill.recovery.checkpoint import (
    OPTIMIZER,
    commit_checkpoint,
    digests,
    partial_folder,
    read_description,
    write_weights,
    writing,
)
from raydistill.recovery.ledger import Ledger, bring_ledger
from raydistill.recovery.storage import Storage
from raydistill.recovery.stored import make_whole
from raydistill.results.provenance import scrub
from raydistill.trainer.deepspeed_engine import STATE, DeepSpeedEngine
from raydistill.trainer.ranks import from_all, from_first

RANDOM = "random-"


def save_rank(
    root: Path,
    version: int,
    rank: int,
    engine: DeepSpeedEngine,
    ledger: Ledger,
    weights: StudentWeights | None,
    description: Mapping[str, object],
    has_storage: bool = False,
) -> None:
    """Write version `version`; rank 0 brings the whole weights and the description. RunError where the disk is full.

    has_storage: the ranks need not see one another's files.
    """
    with writing(root, version):
        attempt = from_first(uuid.uuid4().hex[:8] if rank == 0 else None)
        partial = partial_folder(root, version, attempt)
        (partial / OPTIMIZER / STATE).mkdir(parents=True, exist_ok=True)
        from_all(rank)  # DeepSpeed takes the folder for there
        engine.save_state(partial / OPTIMIZER)
        save_file(random_state(), partial / f"{RANDOM}{rank}.safetensors")
        if weights is not None:
            write_weights(partial, weights)
        ledgers = from_all((ledger.commit(), ledger.sha256))
        is_lowest = is_lowest_rank(partial, rank)
        if not has_storage and not all(from_all(is_lowest == (rank == 0))):
            raise RunError(
                f"the trainer's ranks do not see one another's files in {root}; run.output has to be a folder that all nodes "
                "share, or set run.storage (s3://bucket/prefix)"
            )
        files = {
            name: found for part in from_all(digests(partial) if is_lowest else {}) for name, found in part.items()
        }
        facts = {
            **from_first(scrub(description) if rank == 0 else None),  # the settings in it name stores, with passwords
            "ledger_bytes": [size for size, _ in ledgers],
            "ledger_sha256": [digest for _, digest in ledgers],
            "files": files,
        }
        if is_lowest:
            commit_checkpoint(partial, version, facts)
        from_all(rank)  # nobody goes on before the folder is whole


def is_lowest_rank(folder: Path, rank: int) -> bool:
    """Whether no lower rank has written into a checkpoint's folder on this disk."""
    # By name: a network file system may answer with an old list of a folder, not with an old answer about a new file.
    return not any((folder / f"{RANDOM}{lower}.safetensors").exists() for lower in range(rank))


def load_rank(folder: Path, run_folder: Path, rank: int, engine: DeepSpeedEngine, run: Storage | None = None) -> Ledger:
    """Bring one rank back to a checkpoint; returns its ledger, cut back to it. run: the run's folder in run.storage."""
    make_whole(folder, run)
    from_all(rank)  # a rank that finds no checkpoint ends the others before they load
    description = read_description(folder)
    size_bytes = description["ledger_bytes"][rank]
    if run is not None and "ledger_sha256" in description:
        bring_ledger(run_folder, rank, size_bytes, description["ledger_sha256"][rank], run)
    engine.load_state(folder / OPTIMIZER)
    set_random_state(load_file(folder / f"{RANDOM}{rank}.safetensors"))
    return Ledger(run_folder, rank, size_bytes)


def random_state() -> dict[str, torch.Tensor]:
    """What LoRA's dropout draws from."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
