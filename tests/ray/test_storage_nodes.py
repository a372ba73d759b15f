"""Two nodes that share no disk: each trainer rank, the evaluation actor and the driver see outputs of their own."""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray.util import get_node_ip_address
from run_helpers import HF, serial_config, wait_for_step
from test_cluster_yaml import OBJECT_STORE_BYTES, end, environment, free_port

from raydistill.recovery.checkpoint import checkpoint_folder, damage
from raydistill.recovery.ledger import ledger_problems
from raydistill.recovery.storage import Storage
from raydistill.recovery.stored import StoredCheckpoints
from raydistill.results.record import read_record
from raydistill.study.arms import GOLD

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]

STEPS = 4
HEAD, OTHER = {"trainer": 1}, {"trainer": 1, "teacher": 1}


@dataclass(frozen=True, kw_only=True)
class TwoNodes:
    address: str
    output: Path  # a folder of the head's disk; at the same path on the other node, an empty file system of its own
    folder: Path

    def on_the_other_node(self, *command: str) -> str:
        """What a command prints that sees that node's files."""
        pid = (self.folder / "other.pid").read_text().strip()
        return subprocess.run(
            ["nsenter", f"--mount=/proc/{pid}/ns/mnt", *command], capture_output=True, text=True, check=True
        ).stdout


@pytest.fixture
def two_nodes() -> Iterator[TwoNodes]:
    """A head and a node below a mount namespace of its own."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("a mount namespace cannot be made here")
    folder = Path(tempfile.mkdtemp(prefix="rd-", dir="/tmp"))  # socket paths must stay short
    output, port = folder / "outputs", free_port()
    output.mkdir()
    address = f"{get_node_ip_address()}:{port}"
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1", "--disable-usage-stats"]
    start += [f"--object-store-memory={OBJECT_STORE_BYTES}", "--dashboard-agent-listen-port=0"]
    head = [*start, "--head", f"--port={port}", f"--temp-dir={folder}", "--include-dashboard=false"]
    head += [f"--ray-client-server-port={free_port()}", f"--resources={json.dumps(HEAD)}"]
    other = [*start, f"--address={address}", f"--resources={json.dumps(OTHER)}"]
    alone = f'mount -t tmpfs tmpfs "{output}" && echo $$ > "{folder}/other.pid" && exec "$@"'
    started = []
    try:
        for name, command in (("head", head), ("other", ["unshare", "-m", "sh", "-c", alone, "sh", *other])):
            log = folder / f"{name}.log"
            with log.open("w") as out:
                started.append(
                    subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment(), cwd=folder)
                )
            deadline = time.monotonic() + 300  # seconds; a free machine needs a few
            while "Ray runtime started" not in log.read_text():
                assert started[-1].poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
        yield TwoNodes(address=address, output=output, folder=folder)
    finally:
        for process in started:
            process.kill()
        left = end(folder)
        for process in started:
            process.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)
        assert not left, f"still running: {left}"


def command_of(make_config: Any, nodes: TwoNodes, storage: str) -> list[str]:
    """On the data set's own answers, without rollout and teacher actors: two processes less for each life; 0.8 CPUs for a rank,
    one fits on each node."""
    trainer = {"num_steps": STEPS, "num_workers": 2, "sequences_per_micro_batch": 2, "num_cpus": 0.8}
    config = serial_config(make_config, "killed", trainer=trainer, checkpoint={"save_every": 2}, **HF)
    tree = config.model_dump(mode="json")
    tree["objective"] |= GOLD["objective"]
    tree["run"] |= {"output": str(nodes.output), "storage": storage}
    tree["cluster"] |= {"address": nodes.address, "by_role": True}
    settings = [
        f"--{section}.{field}={value if isinstance(value, str) else json.dumps(value)}"
        for section, fields in tree.items()
        for field, value in fields.items()
        if value is not None and not isinstance(value, dict)
    ]
    return [sys.executable, "-m", "raydistill", "train", *settings]


def test_a_run_over_nodes_without_a_common_disk_survives_its_driver_and_its_disk(
    make_config: Any, two_nodes: TwoNodes, tmp_path: Path
) -> None:
    url = f"file://{tmp_path}/remote"  # the only folder that both nodes see, but for models and data
    folder = two_nodes.output / "runs" / "killed"
    command = command_of(make_config, two_nodes, url)
    environ = environment() | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen(command, env=environ, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for_step(folder, 2, first)
        finally:
            first.kill()
            first.wait(60)
        shutil.rmtree(folder)
        second = subprocess.run(command, env=environ, stdout=log, stderr=log, timeout=800, check=False)
    assert second.returncode == 0, (tmp_path / "log").read_text()[-4000:]
    assert [line["step"] for line in read_record(folder) if line["kind"] == "step"] == list(range(STEPS))
    assert [line["step"] for line in read_record(folder) if line["kind"] == "resume"]
    assert ledger_problems(folder, range(STEPS), 8) == []
    assert (folder / "export" / "config.json").is_file(), "written on the other node, brought to the driver"
    assert two_nodes.on_the_other_node("find", str(folder), "-name", "random-*.safetensors"), "a rank ran there"

    there, brought = StoredCheckpoints(Storage(url).below("runs", "killed")), tmp_path / "brought"
    assert there.versions() >= {STEPS}
    assert there.bring(brought, STEPS) is None
    assert damage(checkpoint_folder(brought, STEPS)) is None
