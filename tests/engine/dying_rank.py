"""Two ranks on gloo save a checkpoint, and one dies in the midst of it; started by test_trainer_save.py.

    python dying_rank.py FOLDER

Prints one line of JSON: for each moment of the death, what the other rank meets. Importing costs more than all the rest, so
the ranks are forked from one process.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed

from raydistill.errors import RunError
from raydistill.recovery.ledger import Ledger
from raydistill.trainer import save


class Engine:
    """Meets the other rank as DeepSpeed does, and writes nothing."""

    def save_state(self, folder: Path) -> None:
        torch.distributed.barrier()


def die(*_: Any) -> NoReturn:
    os._exit(1)


def before_the_folder() -> None:
    save.partial_folder = die


def before_deepspeeds_barrier() -> None:
    Engine.save_state = die  # type: ignore[method-assign]


def before_the_digests() -> None:
    save.is_lowest_rank = die


DEATHS = (before_the_folder, before_deepspeeds_barrier, before_the_digests)


def run_rank(rank: int, folder: Path, death: Callable[[], None]) -> dict[str, Any]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    if rank == 1:
        death()
    engine: Any = Engine()
    try:
        save.save_rank(folder / "checkpoints", 2, rank, engine, Ledger(folder, rank), None, {})
    except RuntimeError as error:
        return {"is_ours": isinstance(error, RunError), "message": str(error)}
    return {"message": "saved"}


def main(root: Path) -> None:
    met = {}
    for death in DEATHS:
        folder = root / death.__name__
        folder.mkdir()
        ranks = []
        for rank in range(2):
            ranks.append(os.fork())
            if not ranks[-1]:
                result = run_rank(rank, folder, death)
                (folder / f"met-{rank}.json").write_text(json.dumps(result))
                os._exit(0)
        assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks] == [0, 1], death.__name__
        met[death.__name__] = json.loads((folder / "met-0.json").read_text())
    print(json.dumps(met))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
