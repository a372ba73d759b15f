"""Submit a job to a cluster of two nodes on this machine, and look where its actors land and what its metrics say.

    python benchmarks/job.py [--what train|sweep] [--steps 40] [--engine hf|vllm] [--working-dir .] [--output outputs/job]
        [--json]

`ray start` twice, on free ports and with a token that the cluster asks for: a head with the resource `trainer`, a node with
`rollout` and `teacher`. Then, as the README says, `ray job submit -- python -m raydistill.train @configs/demo.toml`, with a
teacher that is hardly trained, cluster.by_role and an absolute run.output; with --what sweep `python tune/sweep.py
tune/lr_onpolicy.toml` with two trials, and the same settings. While the job runs its actors are listed with
their nodes, and every metrics endpoint that Ray tells Prometheus of is scraped.

Prints a row for each actor (the node type that `raydistill plan` names, and the one where it ran) and one for each other
claim: the job succeeded, a job without the token was refused, every metric of deploy/grafana.json was there. Exit code 1 if
something differs. Ends the processes of its own cluster and no others; the job's log is <output>/job.log.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from tiny_runs import RUN_S, TRAINER_TITLE, command, json_of

from raydistill.cli import console, main_with_errors, print_table
from raydistill.errors import RunError

ROOT = Path(__file__).parents[1]
NAME = "job"
HEAD, WORKER = {"trainer": 1}, {"rollout": 1, "teacher": 1}
CPUS = 4  # of each node, whatever the machine has
OBJECT_STORE_BYTES = 200_000_000
STARTS = 4
START_S, END_S, REFUSED_S = 180.0, 15.0, 120.0
PLANNED = {  # how Ray names the actors of each role of the plan
    "rollout": r"rollout-\d+",
    "teacher": r"teacher-\d+",
    "evaluation": r"evaluator-\d+",
    "trainer": TRAINER_TITLE.removeprefix("ray::"),
}
BAD_TOKEN_SAYS = re.compile(r"(?i)authenticat|token|unauthorized")
SETTINGS: Mapping[str, object] = {
    "world.recipe": '{"num_layers": 2, "mlp_size": 192, "num_steps": 60, "batch_size": 16}',
    "data.max_rows": 400,
    "data.eval_rows": 16,
    "evaluation.eval_every": 10,
    "evaluation.exact_match": "off",
    "run.name": NAME,
    "cluster.by_role": "true",
}
SWEEP = ("tune/lr_onpolicy.toml", "--name", NAME, "--sampler", "random", "--num-samples", "2")
OF_THE_SWEEP = {"objective.on_policy_fraction": 1.0, "objective.beta": 1.0}  # as its file says


@dataclass(kw_only=True)
class Seen:
    """What was there at any time while the job ran: actors with their nodes, names of our metrics."""

    actors: dict[str, tuple[str, str]] = field(default_factory=dict)  # actor id -> name or class, node id
    nodes: dict[str, set[str]] = field(default_factory=dict)  # node id -> its role resources
    metrics: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Two nodes; every process of theirs has the folder in its command line, or a parent that has."""

    folder: Path
    dashboard: str
    environment: Mapping[str, str]


def main(argv: Sequence[str]) -> int:
    """Run the job and compare."""
    options = parse(argv)
    output = options.output.absolute()
    for folder in ("runs", "sweeps"):
        shutil.rmtree(output / folder, ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)
    log = output / "job.log"
    log.unlink(missing_ok=True)
    settings, entrypoint = asked_for(options, output)
    start = time.monotonic()
    with two_nodes(output / "cluster.log") as cluster:
        console.print(f"two nodes after {time.monotonic() - start:.0f} s")
        refused = is_refused(cluster)
        start = time.monotonic()
        code, seen = submit(cluster, options.working_dir, entrypoint, log)
        seconds = time.monotonic() - start
    plan = json_of(command("plan", f"@{ROOT / 'configs/demo.toml'}", settings=settings), log)
    rows = placement_rows(plan["placement"], seen)
    shown = set(re.findall(r"ray_raydistill_\w+", (ROOT / "deploy/grafana.json").read_text()))
    missing = sorted(shown - seen.metrics)
    rows += [
        row("job", "exit code 0", f"exit code {code} after {seconds:.0f} s", code == 0),
        row("job without the token", "refused", "refused" if refused else "accepted", refused),
        row("metrics", f"{len(shown)} names", ", ".join(missing) + " missing" if missing else "all seen", not missing),
    ]
    print_table(rows, list(rows[0]), json=options.json)
    return 0 if all(line["as planned"] for line in rows) else 1


def asked_for(options: argparse.Namespace, output: Path) -> tuple[dict[str, object], list[str]]:
    """The settings that `plan` gets too, and the job's command."""
    settings = {
        **SETTINGS,
        "run.output": output,
        "rollout.engine": options.engine,
        "trainer.num_steps": options.steps,
    }
    entrypoint = ["python", "-m", "raydistill.train", "@configs/demo.toml"]
    if options.what == "sweep":
        entrypoint = ["python", "tune/sweep.py", *SWEEP]
        del settings["run.name"]
    fields = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    return settings | (OF_THE_SWEEP if options.what == "sweep" else {}), [*entrypoint, *fields]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=("train", "sweep"), default="train", help="the job (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--engine", choices=("vllm", "hf"), default="hf", help="rollout.engine (default: %(default)s)")
    parser.add_argument("--working-dir", type=Path, default=ROOT, help="what is uploaded (default: this checkout)")
    parser.add_argument("--output", type=Path, default=Path("outputs/job"), help="folder for the run and the logs")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    return parser.parse_args(list(argv))


def row(what: str, planned: str, found: str, good: bool) -> dict[str, Any]:
    return {"what": what, "role": None, "planned": planned, "found": found, "as planned": good}


def placement_rows(plan: Sequence[Mapping[str, Any]], seen: Seen) -> list[dict[str, Any]]:
    """A row for each actor of the plan, and one for a role of which there were not as many."""
    rows = []
    for demand in plan:
        role, resource = demand["role"], demand["node_resource"]
        mine = sorted((name, node) for name, node in seen.actors.values() if re.fullmatch(PLANNED[role], name))
        for name, node in mine:
            there = seen.nodes.get(node, set())
            rows.append(
                {
                    "what": name,
                    "role": role,
                    "planned": f"node with {resource}",
                    "found": f"{node[:8]} ({', '.join(sorted(there)) or 'no role'})",
                    "as planned": resource in there,
                }
            )
        if len(mine) != demand["count"]:
            rows.append(row(f"{role} actors", str(demand["count"]), str(len(mine)), good=False) | {"role": role})
    return rows


# The job --------------------------------------------------------------------------------------------------------------


def submit(cluster: Cluster, working_dir: Path, entrypoint: Sequence[str], log: Path) -> tuple[int, Seen]:
    """`ray job submit` until it ends; its exit code, and what could be seen meanwhile."""
    seen = Seen()
    asked = [
        *ray("job", "submit"),
        "--address",
        cluster.dashboard,
        "--working-dir",
        str(working_dir),
        "--",
        *entrypoint,
    ]
    with log.open("ab") as stream:
        process = subprocess.Popen(asked, stdout=stream, stderr=stream, env=cluster.environment, cwd=cluster.folder)
        try:
            deadline = time.monotonic() + RUN_S
            while process.poll() is None and time.monotonic() < deadline:
                with suppress(OSError, RuntimeError):  # a busy head: asked again
                    look(cluster, seen)
                time.sleep(1)
        finally:
            if process.poll() is None:
                process.kill()
            code = process.wait()
    return code, seen


def is_refused(cluster: Cluster) -> bool:
    """Whether the cluster takes no job from somebody without the token."""
    nobody = {key: value for key, value in cluster.environment.items() if not key.startswith("RAY_AUTH")}
    (cluster.folder / "home").mkdir()
    asked = [*ray("job", "submit"), "--address", cluster.dashboard, "--no-wait", "--", "true"]
    done = subprocess.run(
        asked,
        env=nobody | {"RAY_AUTH_MODE": "disabled", "HOME": str(cluster.folder / "home")},
        cwd=cluster.folder,
        capture_output=True,
        text=True,
        timeout=REFUSED_S,
    )
    return done.returncode != 0 and BAD_TOKEN_SAYS.search(done.stdout + done.stderr) is not None


def look(cluster: Cluster, seen: Seen) -> None:
    """Add the actors, nodes and metrics of this moment."""
    from ray.util.state import list_actors, list_nodes

    for node in list_nodes(address=cluster.dashboard):
        seen.nodes[node.node_id] = {*HEAD, *WORKER} & set(node.resources_total or {})
    for actor in list_actors(address=cluster.dashboard, filters=[("state", "=", "ALIVE")], limit=1000):
        seen.actors[actor.actor_id] = (actor.name or actor.class_name, actor.node_id)
    discovery = next(iter(cluster.folder.glob("*/prom_metrics_service_discovery.json")), None)
    targets = json.loads(discovery.read_text()) if discovery else []
    for target in (target for group in targets for target in group["targets"]):
        with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        seen.metrics |= set(re.findall(rf'^(ray_raydistill_\w+){{[^}}]*run="{NAME}(?:-\d+)?"', text, re.M))


# The cluster ----------------------------------------------------------------------------------------------------------


@contextmanager
def two_nodes(log: Path) -> Iterator[Cluster]:
    """A head and a node in a folder of their own, until the block ends. Tried again where a busy machine needs more than
    the 30 seconds that Ray gives a raylet."""
    cluster, token = None, secrets.token_hex(32)
    for _ in range(STARTS):
        folder = Path(tempfile.mkdtemp(prefix="rd-", dir="/tmp"))  # socket paths must stay short
        try:
            cluster = start_nodes(folder, log, token)
            if cluster is not None:
                yield cluster
                break
        finally:
            left = end(folder)
            shutil.rmtree(folder, ignore_errors=True)
            if left:
                console.print(f"still running: {', '.join(map(str, left))}", style="red")
    if cluster is None:
        raise RunError(f"`ray start` gave no node, {STARTS} times; see {log}")


def start_nodes(folder: Path, log: Path, token: str) -> Cluster | None:
    """The cluster, or None if a node ended while it started."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment = kept | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # the job's `python` is the nodes'
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_metrics_report_interval_ms": "1000",
        "RAY_prestart_worker_first_driver": "0",
    }
    os.environ.update({key: value for key, value in environment.items() if key.startswith("RAY_AUTH")})
    from ray.util import get_node_ip_address  # reads how to authenticate when it is imported

    gcs, dashboard = free_port(), free_port()
    head = [
        *("--head", f"--port={gcs}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"),
        *(
            f"--ray-client-server-port={free_port()}",
            f"--temp-dir={folder / 'head'}",
            f"--resources={json.dumps(HEAD)}",
        ),
    ]
    # Each has a folder of its own: in a common one, the second to need the job's files removes and unpacks them again.
    worker = [
        f"--temp-dir={folder / 'node'}",
        f"--address={get_node_ip_address()}:{gcs}",
        f"--resources={json.dumps(WORKER)}",
    ]
    with log.open("wb") as stream:
        started: list[subprocess.Popen[bytes]] = []
        for arguments in (head, worker):
            node = [*ray("start"), *arguments, *each_node()]
            started.append(subprocess.Popen(node, stdout=stream, stderr=stream, env=environment, cwd=folder))
            if not has_started(started, log):
                return None
    return Cluster(folder=folder, dashboard=f"http://127.0.0.1:{dashboard}", environment=environment)


def each_node() -> list[str]:
    return [
        *("--block", f"--num-cpus={CPUS}", f"--object-store-memory={OBJECT_STORE_BYTES}", "--disable-usage-stats"),
        *(f"--metrics-export-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}"),
    ]


def has_started(nodes: Sequence[subprocess.Popen[bytes]], log: Path) -> bool:
    """Wait until each said so; False if one ended."""
    deadline = time.monotonic() + START_S
    while log.read_text(errors="replace").count("Ray runtime started") < len(nodes):
        if any(node.poll() is not None for node in nodes) or time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def ray(*words: str) -> list[str]:
    """Ray's command line with this interpreter."""
    return [sys.executable, "-m", "ray.scripts.scripts", *words]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        port: int = listener.getsockname()[1]
        return port


def end(folder: Path) -> list[int]:
    """Kill what the folder's name is in, and what those started; the ids of those that did not go."""
    deadline = time.monotonic() + END_S
    while (alive := processes_of(folder)) and time.monotonic() < deadline:
        for process in alive:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(alive, timeout=2)
    return [process.pid for process in alive]


def processes_of(folder: Path) -> list[psutil.Process]:
    """Processes that name the folder, and their children (workers rename themselves); not this one."""
    family: set[psutil.Process] = set()
    for process in psutil.process_iter(["cmdline"]):
        if any(str(folder) in word for word in process.info["cmdline"] or ()):
            family.add(process)
            with suppress(psutil.Error):
                family |= set(process.children(recursive=True))
    return [process for process in family if process.pid != os.getpid()]


if __name__ == "__main__":
    sys.exit(main_with_errors(main))
