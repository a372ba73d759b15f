"""Runs that are stopped or lose their trainer go on from the last checkpoint, and end as if nothing had happened."""

import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from run_helpers import (
    HF,
    QUIET,
    check_bitwise_equal,
    kill_after_step,
    lines,
    losses,
    rank_of,
    ray_process,
    serial_config,
)

from raydistill.config import Config
from raydistill.errors import RunError, RunStopped
from raydistill.launch import Pools, RunSummary, run
from raydistill.recovery.checkpoint import checkpoint_folder, damage, version_of
from raydistill.recovery.ledger import ledger_problems, read_ledger

pytestmark = pytest.mark.ray

STEPS = 6


def config_of(make_config: Any, name: str, **changes: Any) -> Config:
    trainer = {"num_steps": STEPS} | changes.pop("trainer", {})
    return serial_config(make_config, name, trainer=trainer, checkpoint={"save_every": 2}, **HF, **changes)


@pytest.fixture(scope="module")
def undisturbed(pools: Pools, make_config: Any) -> RunSummary:
    return run(config_of(make_config, "undisturbed"), pools, QUIET)


def after_step(folder: Path, step: int, pid: Callable[[], int]) -> threading.Thread:
    """`kill -9` once a step is recorded."""
    thread = threading.Thread(target=kill_after_step, args=(folder, step, pid), daemon=True)
    thread.start()
    return thread


def check_same_end(summary: RunSummary, undisturbed: RunSummary) -> None:
    check_bitwise_equal(summary, undisturbed, STEPS)
    assert [line["step"] for line in lines(summary, "step")] == list(range(STEPS))
    assert ledger_problems(summary.folder, range(STEPS), 8) == []
    texts = [[(e["step"], e["index"], e["text"]) for e in read_ledger(s.folder)] for s in (summary, undisturbed)]
    assert texts[0] == texts[1]
    assert summary.codes_hash == undisturbed.codes_hash
    evaluated = [[line["version"] for line in lines(s, "evaluation")] for s in (summary, undisturbed)]
    assert evaluated[0] == evaluated[1]


def test_an_undisturbed_ledger_is_complete(undisturbed: RunSummary) -> None:
    assert ledger_problems(undisturbed.folder, range(STEPS), 8) == []
    assert {line["version"] for line in read_ledger(undisturbed.folder)} > {-1, STEPS - 1}


def test_a_lost_feed_costs_time_only(pools: Pools, make_config: Any, undisturbed: RunSummary) -> None:
    """A lost rank: below, and in test_architectures.py."""
    config = config_of(make_config, "lost")
    killer = after_step(config.run.output / "runs" / "lost", 3, lambda: ray_process("ray::Feed"))
    summary = run(config, pools, QUIET)
    assert not killer.is_alive()
    warnings = [line["text"] for line in lines(summary, "warning")]
    assert sum("going on from the last checkpoint" in text for text in warnings) == 1
    check_same_end(summary, undisturbed)


def test_with_staleness_what_was_trained_on_is_trained_on_again(pools: Pools, make_config: Any) -> None:
    """Step 4 was sampled by policy 3; going on at checkpoint 4, its kept tokens come back, not those of policy 4."""
    settings: dict[str, Any] = HF | {"objective": {"on_policy_fraction": 1.0}, "sync": {"max_staleness": 1}}
    settings |= {"trainer": {"num_steps": 9}, "checkpoint": {"save_every": 4}, "evaluation": {"eval_every": 100}}
    expected = run(make_config(run={"name": "stale"}, **settings), pools, QUIET)
    config = make_config(run={"name": "stale-lost"}, **settings)
    folder = config.run.output / "runs" / "stale-lost"
    killer = after_step(folder, 4, lambda: rank_of(folder))
    summary = run(config, pools, QUIET)
    assert not killer.is_alive()
    assert losses(summary)[:5] == losses(expected)[:5]
    entries = [
        sorted((e["step"], e["index"], e["version"], e["text"]) for e in read_ledger(s.folder))
        for s in (summary, expected)
    ]
    assert [e for e in entries[0] if e[0] <= 4] == [e for e in entries[1] if e[0] <= 4]
    assert {step - version for step, _, version, _ in entries[0]} <= {0, 1}
    assert ledger_problems(summary.folder, range(9), 8) == []
    assert not list((summary.folder / "sampled").iterdir())


def test_sigterm_checkpoints_and_the_same_command_goes_on_even_if_that_checkpoint_is_damaged(
    pools: Pools, make_config: Any, undisturbed: RunSummary
) -> None:
    config = config_of(make_config, "stopped")
    folder = config.run.output / "runs" / "stopped"
    threading.Thread(target=kill_after_step, args=(folder, 2, os.getpid(), signal.SIGTERM), daemon=True).start()
    with pytest.raises(RunStopped) as stopped:
        run(config, pools, QUIET)
    assert 3 <= stopped.value.step < STEPS
    newest = max((folder / "checkpoints").glob("step-*"))
    assert newest == checkpoint_folder((folder / "checkpoints").absolute(), stopped.value.step)
    weights = newest / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    summary = run(config, pools, QUIET)
    assert any(f"{newest.name} is damaged" in line["text"] for line in lines(summary, "warning"))
    check_same_end(summary, undisturbed)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2.2 MB: two checkpoints of these runs fit, a third does not."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2200k", "tmpfs", folder], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_ends_the_run_with_one_line_and_room_lets_it_go_on(
    pools: Pools, make_config: Any, undisturbed: RunSummary, small_disk: Path
) -> None:
    """It is not tried again: the same error would come. Given room, the same command ends as if nothing had been."""
    config = config_of(make_config, "full")
    config = config.model_copy(update={"run": config.run.model_copy(update={"output": small_disk})})
    with pytest.raises(RunError) as full:
        run(config, pools, QUIET)
    assert "\n" not in str(full.value)
    said = re.search(
        r"step-00000(\d) could not be written \(No space left on device\); earlier ones stand", str(full.value)
    )
    assert said, full.value
    left = sorted((small_disk / "runs" / "full" / "checkpoints").glob("step-*"))
    assert left
    assert all(damage(folder) is None and version_of(folder) < int(said[1]) for folder in left)
    subprocess.run(["mount", "-o", "remount,size=32m", small_disk], check=True)
    summary = run(config, pools, QUIET)
    assert [line["status"] for line in lines(summary, "end")] == ["finished"]
    check_same_end(summary, undisturbed)
