"""A run whose storage is an S3 server goes on although its disk is gone, and ends as if nothing had happened."""

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from run_helpers import HF, QUIET, check_bitwise_equal, kill_after_step, lines, serial_config
from s3 import BUCKET, S3, s3_server

from raydistill.config import Config
from raydistill.launch import Pools, run
from raydistill.recovery.checkpoint import checkpoint_folder, damage, digests
from raydistill.recovery.ledger import ledger_problems, read_ledger
from raydistill.recovery.storage import Storage
from raydistill.recovery.stored import StoredCheckpoints

pytestmark = pytest.mark.ray

STEPS = 6


@pytest.fixture(scope="module")
def server(s3_port: int) -> Iterator[S3]:
    with s3_server(s3_port) as server:
        yield server


def config_of(make_config: Any, name: str, output: Path, storage: str | None) -> Config:
    config: Config = serial_config(
        make_config,
        name,
        trainer={"num_steps": STEPS, "num_workers": 2, "sequences_per_micro_batch": 2},
        checkpoint={"save_every": 2},
        **HF,
    )
    return config.model_copy(update={"run": config.run.model_copy(update={"output": output, "storage": storage})})


def stop_at_once_after(folder: Path, step: int) -> threading.Thread:
    """Two signals: the second ends the run without a checkpoint, as losing the machine would."""

    def send() -> None:
        kill_after_step(folder, step, os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # another one: of two pending signals with one number, one is delivered

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


def test_a_run_goes_on_from_storage_when_its_disk_is_gone(
    pools: Pools, make_config: Any, tmp_path: Path, server: S3
) -> None:
    expected = run(config_of(make_config, "undisturbed", tmp_path / "expected", None), pools, QUIET)
    output, url = tmp_path / "scratch", f"s3://{BUCKET}/prefix"
    config = config_of(make_config, "stored", output, url)
    killer = stop_at_once_after(output / "runs" / "stored", 3)
    with pytest.raises(KeyboardInterrupt):
        run(config, pools, QUIET)
    killer.join()
    there = Storage(url).below("runs", "stored")
    assert StoredCheckpoints(there).versions() >= {4}
    shutil.rmtree(output)

    summary = run(config, pools, QUIET)
    assert [line["step"] for line in lines(summary, "resume")][-1] >= 4
    check_bitwise_equal(summary, expected, STEPS)
    assert [line["step"] for line in lines(summary, "step")] == list(range(STEPS))
    assert ledger_problems(summary.folder, range(STEPS), 8) == []
    texts = [[(e["step"], e["index"], e["text"]) for e in read_ledger(s.folder)] for s in (summary, expected)]
    assert texts[0] == texts[1]
    assert summary.codes_hash == expected.codes_hash
    assert lines(summary, "warning") == lines(expected, "warning")

    # What lies there is what lies here: record to its last line, export, plots, ledgers; checkpoints newest and best.
    assert there.read("record.jsonl") == (summary.folder / "record.jsonl").read_bytes()
    for name in ("export", "plots", "ledger"):
        assert there.list(name) == {f"{name}/{k}": size for k, (size, _) in digests(summary.folder / name).items()}
    assert StoredCheckpoints(there).versions() == {STEPS - 2, STEPS, summary.best_version}
    elsewhere = tmp_path / "elsewhere"
    assert StoredCheckpoints(there).bring(elsewhere, STEPS) is None
    assert damage(checkpoint_folder(elsewhere, STEPS)) is None
    assert there.list("sampled") == {}


def test_a_storage_that_goes_away_in_the_middle_is_one_warning_and_gets_the_rest_at_the_end(
    pools: Pools, make_config: Any, tmp_path: Path, server: S3
) -> None:
    url = f"s3://{BUCKET}/away"
    config = config_of(make_config, "away", tmp_path, url)
    folder = tmp_path / "runs" / "away"

    def away() -> None:
        from run_helpers import wait_for_step

        wait_for_step(folder, 0)
        server.stop()
        wait_for_step(folder, 4)
        server.start()

    thread = threading.Thread(target=away, daemon=True)
    thread.start()
    summary = run(config, pools, QUIET)
    thread.join()
    warnings = [line["text"] for line in lines(summary, "warning")]
    assert len(warnings) == 1
    assert "does not answer" in warnings[0] and "training goes on" in warnings[0]
    assert [line["step"] for line in lines(summary, "step")] == list(range(STEPS))
    there = Storage(url).below("runs", "away")
    assert StoredCheckpoints(there).versions() >= {STEPS, summary.best_version}
    assert there.read("record.jsonl") == (folder / "record.jsonl").read_bytes()
