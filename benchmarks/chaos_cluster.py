"""Ray nodes on this machine that can be lost and replaced, and the processes of their actors by their titles."""

from __future__ import annotations

import socket
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

REFRESH_S = 0.2  # how old the list of a cluster's processes may be; titles are read anew each time
NODE_STARTS = 4
HALVES = ("gcs_server", "raylet")  # what a node that did not start in time leaves behind
WORKER = {"num_cpus": 4, "resources": {"rollout": 1, "teacher": 1}}
TRAINER = {"num_cpus": 4, "resources": {"trainer": 1}}


class Workers:
    """Ray's worker processes by id, youngest first, with their titles: `ray::Feed`, or `ray::Feed.lease` while it works."""

    def __init__(self, titles: dict[int, str]) -> None:
        self._titles = titles

    def newest(self, title: str) -> int | None:
        """The id of the youngest one whose title starts so."""
        return next((pid for pid, found in self._titles.items() if found.startswith(title)), None)


class Nodes:
    """`with Nodes() as nodes:` a head with the resource `trainer`, and a node with `rollout` and `teacher`.

    head: Ray's own object for a head that runs already (`ray._private.worker._global_node`): it stays, and both resources come
    on nodes of their own. Touches processes of this cluster only.
    """

    def __init__(self, head: Any = None) -> None:
        self._foreign_head = head
        with socket.socket() as listener:
            listener.bind(("", 0))
            self._port: int = listener.getsockname()[1]
        self._pids: list[int] = []
        self._read_s = 0.0

    def __enter__(self) -> Nodes:
        self._start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._foreign_head is None:
            self._cluster.shutdown()
        else:
            for node in list(self._cluster.worker_nodes):
                self._cluster.remove_node(node, allow_graceful=False)

    @property
    def address(self) -> str:
        address: str = self._cluster.address
        return address

    def _start(self) -> None:
        from ray.cluster_utils import Cluster

        # At a process's end Ray's own hooks end what is left; only a main thread can set them, and a node is replaced in any.
        self._cluster: Any = Cluster(shutdown_at_exit=self._foreign_head is None)
        if self._foreign_head is None:
            self._add_node(**TRAINER, gcs_server_port=self._port, include_dashboard=False)
        else:
            self._cluster.head_node = self._foreign_head
            self._add_node(**TRAINER)
        self._worker = self._add_node(**WORKER)

    def _add_node(self, **options: Any) -> Any:
        """A new node; tried again where a busy machine needs more than the 30 seconds that Ray gives a raylet."""
        for _ in range(NODE_STARTS - 1):
            try:
                return self._cluster.add_node(**options)
            except Exception as error:
                if "timed out during startup" not in str(error):
                    raise
                self._end_half_started()
        return self._cluster.add_node(**options)

    def _known(self, kind: str) -> list[int]:
        nodes = self._cluster.list_all_nodes()
        return [one.process.pid for node in nodes for one in node.all_processes.get(kind, ())]

    def _end_half_started(self) -> None:
        """It would join the cluster later as a node that nobody knows, or hold the port of its control store."""
        known = {pid for kind in HALVES for pid in self._known(kind)}
        for process in psutil.Process().children():
            with suppress(psutil.Error):
                if process.name() in HALVES and process.pid not in known:
                    process.kill()
                    process.wait(10)

    def replace_worker(self) -> None:
        """`kill -9` the raylet of the node with `rollout` and `teacher` (its actors die with it) and start an empty node."""
        self._cluster.remove_node(self._worker, allow_graceful=False)
        self._worker = self._add_node(**WORKER)

    def kill_head(self) -> None:
        """`kill -9` what makes the head node: the cluster's control store, its raylet, its dashboard."""
        self._cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)

    def restart(self) -> None:
        """End what the lost head left over and start a new cluster at the same address."""
        with suppress(Exception):  # the head's processes are gone already
            self._cluster.shutdown()
        self._start()

    def workers(self) -> Workers:
        """This cluster's worker processes at this moment."""
        if time.monotonic() - self._read_s > REFRESH_S:
            self._pids, self._read_s = self._workers(), time.monotonic()
        titles = {}
        for pid in self._pids:
            with suppress(OSError):
                titles[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        return Workers(titles)

    def _workers(self) -> list[int]:
        """The children of the raylets, youngest first."""
        found: list[psutil.Process] = []
        for raylet in self._known("raylet"):
            with suppress(psutil.Error):
                found += psutil.Process(raylet).children()
        return [process.pid for process in sorted(found, key=_age)]


def _age(process: psutil.Process) -> float:
    with suppress(psutil.Error):
        return -float(process.create_time())
    return 0.0


def computes(pid: int) -> bool:
    """Whether a thread of the process runs at this moment."""
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        with suppress(OSError):
            if stat.read_text().rpartition(")")[2].split()[0] == "R":
                return True
    return False
