"""A study whose process is killed goes on with the same command: what is done is kept, the unfinished arm goes on."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from run_helpers import QUIET, kill_after_step

from raydistill.config import Config
from raydistill.launch import Pools
from raydistill.recovery.resume import last_status
from raydistill.results.record import read_record
from raydistill.study.state import open_study
from raydistill.study.study import Study

pytestmark = pytest.mark.ray

STEPS = 6
DRIVER = """
import sys
from pathlib import Path
from rich.console import Console
from raydistill.config import Config
from raydistill.study.study import Study
Study(Config.model_validate_json(Path(sys.argv[1]).read_text()), Console(stderr=True), Path(sys.argv[2])).run()
"""


@pytest.fixture
def config(ray_cluster: Any, make_config: Any, tiny_world: Any, tmp_path: Path) -> Config:
    """Two arms that sample nothing: no rollout engine is started."""
    made: Config = make_config(
        run={"output": str(tmp_path)},
        rollout={"engine": "hf"},
        trainer={"num_steps": STEPS},
        checkpoint={"save_every": 1},
        evaluation={"eval_every": STEPS},
        cluster={"address": ray_cluster.get_runtime_context().gcs_address, "num_cpus": None},
        study={
            "arms": ["gold-ce", "off-policy"], "ptq_formats": ["int2"], "grid_rows": 16, "test_rows": 24,
            "test_path": str(tiny_world.test_path),
        },
    )  # fmt: skip
    return made


def test_a_study_killed_in_its_second_arm_keeps_the_first_and_goes_on_in_the_second(
    config: Config, pools: Pools, tmp_path: Path
) -> None:
    folder, settings = tmp_path / "compare", tmp_path / "config.json"
    settings.write_text(config.model_dump_json())
    state = open_study(folder, config)  # its name, before the process that will be killed
    gold, off = (tmp_path / "runs" / f"{state.name}-{arm}" for arm in ("gold-ce", "off-policy"))
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(settings), str(folder)], stdout=log, stderr=log, start_new_session=True
        )
        try:
            kill_after_step(off, 1, driver.pid)
        finally:
            if driver.poll() is None:
                os.kill(driver.pid, 9)
            driver.wait()
    assert last_status(gold) == "finished"
    assert last_status(off) == "unfinished"
    first, ptq = (
        (gold / "record.jsonl").read_bytes(),
        (folder / "ptq" / "rtn-int2" / "raydistill.json").stat().st_mtime_ns,
    )

    report = Study(config, QUIET, folder, pools).run()

    assert (gold / "record.jsonl").read_bytes() == first
    assert (folder / "ptq" / "rtn-int2" / "raydistill.json").stat().st_mtime_ns == ptq
    lines = list(read_record(off))
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(STEPS))
    assert next(line["step"] for line in lines if line["kind"] == "resume") > 0, "not from its beginning"
    assert last_status(off) == "finished"

    assert [line.name for line in report.lines] == ["teacher", "rtn-int2", "gold-ce", "off-policy"]
    by_name = {line.name: line for line in report.lines}
    assert report.reference == "rtn-int2"
    assert by_name["off-policy"].tests["kl_nats"].difference == pytest.approx(
        by_name["off-policy"].row.kl_nats - by_name["rtn-int2"].row.kl_nats
    )
    assert by_name["gold-ce"].role == "control"
    assert by_name["gold-ce"].cost > 0
    recorded = list(read_record(tmp_path / "runs" / f"{state.name}-comparison"))
    assert [line["name"] for line in recorded if line["kind"] == "table"] == ["comparison"]
    assert {"bytes_kl", "summary", "table"} <= {line["name"] for line in recorded if line["kind"] == "artifact"}
    assert (folder / "summary.md").read_text().count("\n| ") >= 6
    assert not open_study(folder, config).is_resumed, "a finished study starts anew"
