"""A Ray cluster of two nodes on this machine that can lose either, and the processes of its actors by their titles."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

REFRESH_S = 0.2  # how old the list of a cluster's processes may be; titles are read anew each time


class TwoNodes:
    """`with TwoNodes() as nodes:` a head with the resource `trainer`, and a node with `rollout` and `teacher`.

    Touches processes of its own cluster only.
    """

    def __init__(self) -> None:
        with socket.socket() as listener:
            listener.bind(("", 0))
            self._port: int = listener.getsockname()[1]
        self._pids: list[int] = []
        self._read_s = 0.0

    def __enter__(self) -> TwoNodes:
        self._start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._cluster.shutdown()

    @property
    def address(self) -> str:
        address: str = self._cluster.address
        return address

    def _start(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 4, "resources": {"trainer": 1}, "gcs_server_port": self._port}
        self._cluster: Any = Cluster(initialize_head=True, head_node_args=head)
        self._add_worker()

    def _add_worker(self) -> None:
        self._worker = self._cluster.add_node(num_cpus=4, resources={"rollout": 1, "teacher": 1})

    def replace_worker(self) -> None:
        """`kill -9` the worker node's raylet (its actors die with it) and start an empty node."""
        self._cluster.remove_node(self._worker, allow_graceful=False)
        self._add_worker()

    def kill_head(self) -> None:
        """`kill -9` what makes the head node: the cluster's control store, its raylet, its dashboard."""
        self._cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)

    def restart(self) -> None:
        """End what the lost head left over and start a new cluster at the same address."""
        with suppress(Exception):  # the head's processes are gone already
            self._cluster.shutdown()
        self._start()

    def newest(self, title: str) -> int | None:
        """The id of the youngest of this cluster's workers whose title starts so: `ray::Feed`, `ray::Feed.lease`."""
        if time.monotonic() - self._read_s > REFRESH_S:
            self._pids, self._read_s = self._workers(), time.monotonic()
        wanted = title.encode()
        for pid in self._pids:
            with suppress(OSError):
                if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(wanted):
                    return pid
        return None

    def _workers(self) -> list[int]:
        """The children of the raylets, youngest first."""
        found: list[psutil.Process] = []
        for node in self._cluster.list_all_nodes():
            for raylet in node.all_processes.get("raylet", ()):
                with suppress(psutil.Error):
                    found += psutil.Process(raylet.process.pid).children()
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


def send(pid: int, number: int) -> None:
    """A signal; the process may have ended meanwhile."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)
