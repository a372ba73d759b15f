"""What one rank keeps in a checkpoint and gets back: the random state as it was, and settings without passwords."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raydistill.config import Config
from raydistill.messages import StudentWeights
from raydistill.recovery.checkpoint import DESCRIPTION, checkpoint_folder, read_description
from raydistill.recovery.ledger import Ledger
from raydistill.trainer import save
from raydistill.trainer.save import load_rank, save_rank


class Engine:
    """Keeps nothing of its own."""

    def save_state(self, folder: Path) -> None:
        (folder / "state" / "optimizer").touch()

    def load_state(self, folder: Path) -> None:
        torch.rand(5)  # as building an optimizer may


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save, "from_all", lambda fact: [fact])
    monkeypatch.setattr(save, "from_first", lambda fact: fact)


def saved(run: Path, description: Any) -> Path:
    engine: Any = Engine()
    weights = StudentWeights(version=3, tensors={"a": np.ones(4, np.float32)}, probe=None)
    save_rank(run / "checkpoints", 3, 0, engine, Ledger(run, 0), weights, description)
    return checkpoint_folder(run / "checkpoints", 3)


def test_what_is_drawn_after_a_checkpoint_is_drawn_again_when_it_is_loaded(tmp_path: Path) -> None:
    torch.manual_seed(7)
    torch.rand(3)
    folder = saved(tmp_path, {"skipped_steps": 0})
    drawn = torch.rand(4), torch.nn.functional.dropout(torch.ones(64), 0.5)
    torch.manual_seed(0)
    engine: Any = Engine()
    load_rank(folder, tmp_path, 0, engine)
    again = torch.rand(4), torch.nn.functional.dropout(torch.ones(64), 0.5)
    assert all(torch.equal(one, other) for one, other in zip(drawn, again, strict=True))


def test_a_checkpoint_keeps_the_settings_without_passwords(tmp_path: Path) -> None:
    config = Config.model_validate(
        {"results": {"uri": "postgresql://me:hunter2@host/db"}, "run": {"storage": "sftp://me:hunter2@host/place"}}
    )
    steps = {2: {"trainer/loss": 0.5, "rollout/tokens_per_s": 9.0}}
    description = {"weights_hash": "ab", "skipped_steps": 0, "steps": steps, "config": config.model_dump(mode="json")}
    folder = saved(tmp_path, description)
    assert "hunter2" not in (folder / DESCRIPTION).read_text()
    kept = read_description(folder)
    assert kept["config"]["results"]["uri"] == "postgresql://***@host/db"
    rest = {"results", "run"}
    assert {k: v for k, v in kept["config"].items() if k not in rest} == {
        k: v for k, v in json.loads(config.model_dump_json()).items() if k not in rest
    }
    assert kept["steps"] == {"2": steps[2]}
