"""cluster.yaml's node types under Ray's autoscaler, with raylets on this machine in place of cloud machines.

Ray's own `AutoscalingCluster` is of no use here: it needs a file that the published package lacks, and it starts and ends
with `ray stop --force`, which kills every Ray process of the machine. This one ends what it started and nothing else.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_TYPE
from ray.autoscaler._private.util import prepare_config
from ray.util import get_node_ip_address

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]

ROLES = ("rollout", "teacher", "trainer")
FAKE_NODES = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
OBJECT_STORE_BYTES = 100_000_000  # of each node; Ray wants at least 75 MiB

DRIVER = """
import json, sys, ray
from pathlib import Path
from raydistill.sweep.recorder import SweepRecorder
from raydistill.sweep.spec import load_sweep
from raydistill.sweep.state import SweepState
from raydistill.sweep.tuner import run_trials
address, file, roles = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
ray.init(address=address, logging_level="ERROR", log_to_driver=False)

@ray.remote(num_cpus=0)
class Host:  # of the sweep: its run is over at once
    def run(self, name, point):
        rows = {"life": "a", "teacher_rows": {}, "pools": {}, "datasets": 0, "cpu_s": 0.0, "time_s": 0.0}
        return {"metrics": {"evaluate/kl_nats": 0.1}, "seconds": {}, "shares": rows}

    def next_report(self, name):
        return None

sweep = load_sweep(file, ["--run.output", str(file.parent)])
sweep.folder.mkdir(parents=True)
run_trials(sweep, Host.remote(), SweepRecorder(sweep))
cpus = ray.cluster_resources().get("CPU", 0)

@ray.remote(num_cpus=0, num_gpus=1)
def node():
    return ray.get_runtime_context().get_node_id()

asked = [node.options(resources={role: 1}).remote() for role in roles]
found = dict(zip(roles, ray.get(asked, timeout=600)))
resources = {entry["NodeID"]: entry["Resources"] for entry in ray.nodes() if entry["Alive"]}
trials = SweepState.of(sweep).counts()
print(json.dumps({"found": found, "resources": resources, "trials": trials, "cpus": cpus}))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalCluster:
    """A head with an autoscaler, and the folder that all its processes carry in their command lines."""

    address: str
    folder: Path
    node_types: dict[str, Any]


def one_machine_config(gcs_address: str) -> dict[str, Any]:
    """cluster.yaml with its node types as they are, except: one CPU each, no node until one is asked for."""
    config = prepare_config(yaml.safe_load((Path(__file__).parents[2] / "cluster.yaml").read_text()))
    types = config["available_node_types"]
    types[FAKE_HEAD_NODE_TYPE] = types.pop(config["head_node_type"])
    for node_type in types.values():
        node_type |= {"node_config": {}, "min_workers": 0}
        node_type["resources"] |= {
            "CPU": min(1, node_type["resources"]["CPU"]),
            "object_store_memory": OBJECT_STORE_BYTES,
        }
    provider = {
        "type": "external",  # by its own name Ray looks for the missing file
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "gcs_address": gcs_address,
    }
    no_commands = {key: [] for key in config if key.endswith("_commands")}
    return config | no_commands | {
        "provider": provider, "head_node_type": FAKE_HEAD_NODE_TYPE, "auth": {}, "file_mounts": {}
    }  # fmt: skip


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        port: int = listener.getsockname()[1]
        return port


def environment() -> dict[str, str]:
    """Without what an earlier Ray of this process left behind, and without the token that one may have written."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return kept | {"RAY_AUTH_MODE": "disabled", "RAY_gcs_rpc_server_connect_timeout_s": "30"}


def processes_of(folder: Path) -> list[psutil.Process]:
    """Every process that names the cluster's folder, and their children (workers rename themselves)."""
    named = [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(str(folder) in word for word in process.info["cmdline"] or ())
    ]
    family = set(named)
    for process in named:
        try:
            family |= set(process.children(recursive=True))
        except psutil.NoSuchProcess:
            continue
    return list(family)


def end(folder: Path, timeout_s: float = 15) -> list[psutil.Process]:
    """Kill the cluster's processes; returns those that did not go."""
    deadline = time.monotonic() + timeout_s
    while (alive := processes_of(folder)) and time.monotonic() < deadline:
        for process in alive:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(alive, timeout=2)
    return alive


@pytest.fixture
def local_cluster() -> Iterator[LocalCluster]:
    folder = Path(tempfile.mkdtemp(prefix="rd-", dir="/tmp"))  # socket paths must stay short
    port = free_port()
    address = f"{get_node_ip_address()}:{port}"
    config = one_machine_config(address)
    (folder / "cluster.json").write_text(json.dumps(config))
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}", "--num-cpus=0"),
        *(f"--temp-dir={folder}", f"--autoscaling-config={folder / 'cluster.json'}", "--include-dashboard=false"),
        *(f"--object-store-memory={OBJECT_STORE_BYTES}", f"--ray-client-server-port={free_port()}"),
        *("--dashboard-agent-listen-port=0", "--disable-usage-stats"),
    ]
    log = folder / "head.log"
    with log.open("w") as out:
        head = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=environment() | FAKE_NODES, cwd=folder
        )
    try:
        deadline = time.monotonic() + 300  # seconds; a free machine needs a few
        while "Ray runtime started" not in log.read_text():
            assert head.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield LocalCluster(address=address, folder=folder, node_types=deepcopy(config["available_node_types"]))
    finally:
        left = end(folder)
        head.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)
        assert not left, f"still running: {left}"


def test_a_sweeps_trials_start_on_a_head_without_cpus_and_a_roles_resource_brings_up_a_node_of_its_type(
    local_cluster: LocalCluster,
) -> None:
    file = local_cluster.folder / "lr.toml"
    file.write_text('[space]\n"trainer.learning_rate" = [1e-3]')
    answer = subprocess.run(
        [sys.executable, "-c", DRIVER, local_cluster.address, str(file), *ROLES],
        env=environment() | FAKE_NODES,
        cwd=local_cluster.folder,
        capture_output=True,
        text=True,
        timeout=700,
    )
    monitor = "\n".join(path.read_text()[-2000:] for path in local_cluster.folder.glob("session_2*/logs/monitor*"))
    assert answer.returncode == 0, f"{answer.stderr}\n{monitor}"
    said = json.loads(answer.stdout.splitlines()[-1])
    assert (said["trials"], said["cpus"]) == ({"finished": 1}, 0)
    assert len(set(said["found"].values())) == len(ROLES)
    for role, node_id in said["found"].items():
        expected = local_cluster.node_types[role]["resources"]
        found = said["resources"][node_id]
        assert {kind: found[kind] for kind in ("CPU", "GPU", role)} == {k: expected[k] for k in ("CPU", "GPU", role)}
        assert {other for other in ROLES if other in found} == {role}
