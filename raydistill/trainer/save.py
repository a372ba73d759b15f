"""One rank's part of a checkpoint: DeepSpeed's state, the random state, the ledger; rank 0 completes the folder.

Every function is collective over the ranks, which write into one folder on storage that all of them see.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import distributed

from raydistill.messages import StudentWeights
from raydistill.recovery.checkpoint import commit_checkpoint, partial_folder, read_description, writing
from raydistill.recovery.ledger import Ledger
from raydistill.trainer.deepspeed_engine import DeepSpeedEngine

OPTIMIZER = "optimizer"


def save_rank(
    root: Path,
    version: int,
    rank: int,
    engine: DeepSpeedEngine,
    ledger: Ledger,
    weights: StudentWeights | None,
    description: Mapping[str, object],
) -> None:
    """Write version `version`; rank 0 brings the whole weights and the description. RunError where the disk is full."""
    with writing(root, version):
        partial = _agree(partial_folder(root, version) if rank == 0 else None)
        engine.save_state(partial / OPTIMIZER)
        save_file(random_state(), partial / f"random-{rank}.safetensors")
        lengths = _gather(ledger.commit())
        if weights is not None:
            commit_checkpoint(partial, weights, {**description, "ledger_bytes": lengths})
        _agree(partial)  # nobody goes on before the folder is whole


def load_rank(folder: Path, run_folder: Path, rank: int, engine: DeepSpeedEngine) -> Ledger:
    """Bring one rank back to a checkpoint; returns its ledger, cut back to it."""
    description = read_description(folder)
    engine.load_state(folder / OPTIMIZER)
    set_random_state(load_file(folder / f"random-{rank}.safetensors"))
    return Ledger(run_folder, rank, description["ledger_bytes"][rank])


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


def _agree(path: Path | None) -> Path:
    """Rank 0's path on every rank; also a barrier."""
    found = [path]
    if _several_ranks():
        distributed.broadcast_object_list(found, src=0)
    assert found[0] is not None
    return found[0]


def _gather(number: int) -> list[int]:
    if not _several_ranks():
        return [number]
    numbers = [0] * distributed.get_world_size()
    distributed.all_gather_object(numbers, number)
    return numbers


def _several_ranks() -> bool:
    return distributed.is_initialized() and distributed.get_world_size() > 1
