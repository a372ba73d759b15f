"""Llama and Gemma-3 through train -> lost -> resumed -> exported -> evaluated, with two trainer ranks.

Qwen3 is the model of all other tests. The sampling engine is transformers' here; vLLM with these architectures is in
tests/engine, and both together in benchmarks/architectures.py.
"""

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from run_helpers import QUIET, check_bitwise_equal, kill_after_step, lines, rank_of, serial_config

from raydistill.config import Config
from raydistill.errors import RunStopped
from raydistill.evaluate.command import evaluate_command
from raydistill.launch import Pools, RunSummary, run
from raydistill.quant.formats import Layout
from raydistill.recovery.checkpoint import checkpoint_folder, read_description
from raydistill.recovery.ledger import ledger_problems
from raydistill.serving.export import export_run

pytestmark = pytest.mark.ray

STEPS, RANKS = 4, 2


@pytest.fixture(scope="module")
def config_of(make_config: Any, architectures: dict[str, Path]) -> Any:
    def config_of(architecture: str, name: str) -> Config:
        return serial_config(
            make_config,
            f"{architecture}-{name}",
            student={"model": str(architectures[architecture])},
            teacher={"model": None},
            quant={"format": "int4"},
            rollout={"engine": "hf", "max_new_tokens": 16},
            trainer={"num_steps": STEPS, "num_workers": RANKS, "sequences_per_micro_batch": 2},
            checkpoint={"save_every": 2},
        )

    return config_of


def check_chain(summary: RunSummary, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ledger, gap, and of the last step: codes on every side, the KL of every exported folder."""
    assert [line["step"] for line in lines(summary, "step")] == list(range(STEPS))
    assert ledger_problems(summary.folder, range(STEPS), 8) == []
    assert summary.largest_gap_nats < 1e-5
    trained = read_description(checkpoint_folder(summary.folder / "checkpoints", STEPS))["codes_hash"]
    engine = {line["version"]: line["codes_hash"] for line in lines(summary, "sync")}
    layouts: tuple[Layout, ...] = ("packed", "compressed-tensors")
    reports = [export_run(summary.folder, tmp_path / way, checkpoint="last", layout=way) for way in layouts]
    assert {trained, *(report.codes_hash for report in reports)} == {engine[STEPS]} != {engine[0]}
    capsys.readouterr()
    assert evaluate_command([str(summary.folder), *(str(report.folder) for report in reports), "--json"]) == 0
    teacher, _, *exports = json.loads(capsys.readouterr().out)
    assert teacher["kl_nats"] == pytest.approx(0, abs=1e-6)
    measured = {line["version"]: line["metrics"]["evaluate/kl_nats"] for line in lines(summary, "evaluation")}[STEPS]
    assert measured > 0.005
    assert [row["name"] for row in exports] == list(layouts)
    assert [row["kl_nats"] for row in exports] == pytest.approx([measured, measured], abs=1e-4)


def test_llama_loses_a_rank_and_ends_as_if_nothing_had_happened(
    pools: Pools, config_of: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calm, config = run(config_of("llama", "calm"), pools, QUIET), config_of("llama", "killed")
    folder = config.run.output / "runs" / config.run.name
    killer = threading.Thread(target=kill_after_step, args=(folder, 1, lambda: rank_of(folder)), daemon=True)
    killer.start()
    killed = run(config, pools, QUIET)
    assert not killer.is_alive()
    assert any("going on from the last checkpoint" in line["text"] for line in lines(killed, "warning"))
    check_bitwise_equal(killed, calm, STEPS)
    check_chain(killed, tmp_path, capsys)


def test_gemma3_is_stopped_and_the_same_command_goes_on(
    pools: Pools, config_of: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calm, config = run(config_of("gemma3", "calm"), pools, QUIET), config_of("gemma3", "stopped")
    folder = config.run.output / "runs" / config.run.name
    threading.Thread(target=kill_after_step, args=(folder, 0, os.getpid(), signal.SIGTERM), daemon=True).start()
    with pytest.raises(RunStopped):
        run(config, pools, QUIET)
    stopped = run(config, pools, QUIET)
    check_bitwise_equal(stopped, calm, STEPS)
    check_chain(stopped, tmp_path, capsys)
