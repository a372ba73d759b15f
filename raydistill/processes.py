"""Processes of the cluster: starting Ray's own or joining them, and ending one of any node that no longer listens."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raydistill.errors import RunError, UserError

ANSWER_TIMEOUT_S = 10.0
END_TIMEOUT_S = 20.0
START_TRIES = 3


def start_ray(**options: Any) -> None:
    """`ray.init`; up to `START_TRIES` times where the machine is too busy for the 30 s that Ray gives its own processes.

    Raises RunError if the last one fails too; what Ray raises otherwise passes.
    """
    for tries_left in reversed(range(START_TRIES)):
        others = set(psutil.Process().children(recursive=True))
        try:
            with _sigterm_kept():
                ray.init(**options)
            return
        except Exception as error:
            if type(error) is not Exception or "startup" not in str(error):  # what Ray raises when it gives up waiting
                raise
            # Ray ends them with this process only, and the next ones would have to share the machine with them.
            for process in set(psutil.Process().children(recursive=True)) - others:
                with suppress(psutil.Error):
                    process.kill()
            if not tries_left:
                raise RunError(
                    f"Ray's own processes did not start in time, {START_TRIES} times; if this machine is busy try again when "
                    "it is less so, else look at the logs under /tmp/ray/session_latest/logs"
                ) from error


def check_address(address: str) -> None:
    """UserError if nothing listens at this `HOST:PORT`: Ray would try it for more than five minutes.

    Other kinds of address ("auto", "ray://...") are Ray's to judge, but for a dashboard's, which it does not understand.
    """
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"the cluster's address {address!r} (cluster.address, or RAY_ADDRESS) is that of its dashboard, where "
            "`ray job submit` takes jobs; a run joins HOST:PORT of `ray start --head`, 6379 if it was not told otherwise"
        )
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_TIMEOUT_S).close()
        except (OSError, OverflowError) as error:
            raise no_answer(address, error) from error


def no_answer(address: str | None, error: Exception) -> UserError:
    """For a cluster that cannot be joined."""
    return UserError(
        f"the cluster's address {address!r} (cluster.address, or RAY_ADDRESS) does not answer ({str(error).splitlines()[0]}); "
        "start it with `ray start --head`, or leave both out for a local cluster"
    )


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Ray takes SIGTERM for itself and would end the process without a word, also where somebody listens already."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One process of a run."""

    name: str
    node_id: str
    pid: int


def this_process(name: str) -> Member:
    """Called inside an actor or a training worker."""
    return Member(name=name, node_id=ray.get_runtime_context().get_node_id(), pid=os.getpid())


def end_processes(members: Sequence[Member], timeout_s: float = END_TIMEOUT_S) -> None:
    """`kill -9` on the members' nodes; harmless for one that has ended, or whose node is gone.

    timeout_s: of the answers of other nodes. Processes of this node are ended at once.
    """
    here, asked = ray.get_runtime_context().get_node_id(), []
    for member in members:
        if member.node_id == here:
            _kill(member.pid)
        else:
            where = NodeAffinitySchedulingStrategy(node_id=member.node_id, soft=False)
            kill: Any = ray.remote(_kill).options(num_cpus=0, scheduling_strategy=where)
            asked.append(kill.remote(member.pid))
    if asked:
        ray.wait(asked, num_returns=len(asked), timeout=timeout_s)


def _kill(pid: int) -> None:
    with suppress(OSError):
        # The id may belong to somebody else by now: Ray's workers name themselves.
        if b"ray" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
