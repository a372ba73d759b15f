"""Ray's own processes on a machine that is too busy for them, and a cluster that is not there."""

import signal
import socket
import subprocess
import sys
from typing import Any

import pytest

from raydistill.config import Config
from raydistill.errors import RunError, UserError
from raydistill.launch import start_cluster
from raydistill.processes import START_TRIES, check_address, start_ray

TIMED_OUT = "The current node timed out during startup. This could happen because some of the raylet failed to startup"


class SlowRay:
    """Gives up so many times, and leaves a process behind each time."""

    def __init__(self, failures: int) -> None:
        self.failures, self.left = failures, list[subprocess.Popen[bytes]]()

    def init(self, **_: Any) -> None:
        self.left.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        if len(self.left) <= self.failures:
            raise Exception(TIMED_OUT)  # as Ray does

    def end(self) -> list[int | None]:
        """Exit codes of all but the last, which is the one that started; then that one ends too."""
        codes = [process.wait(5) for process in self.left[: self.failures]]
        for process in self.left:
            process.kill()
            process.wait()
        return [*codes]


def slow_ray(monkeypatch: pytest.MonkeyPatch, failures: int) -> SlowRay:
    slow = SlowRay(failures)
    monkeypatch.setattr("raydistill.processes.ray.init", slow.init)
    return slow


def test_ray_is_started_again_without_what_a_slow_start_left(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = slow_ray(monkeypatch, START_TRIES - 1)
    start_ray(address="local")
    assert slow.left[-1].poll() is None, "the one that started was ended"
    assert slow.end() == [-9] * (START_TRIES - 1)


def test_a_ray_that_never_starts_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = slow_ray(monkeypatch, START_TRIES)
    with pytest.raises(RunError, match=r"did not start in time, 3 times; if this machine is busy"):
        start_ray(address="local")
    assert slow.end() == [-9] * START_TRIES


def test_who_listens_to_sigterm_still_does_when_ray_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    monkeypatch.setattr("raydistill.processes.ray.init", lambda **_: signal.signal(signal.SIGTERM, signal.SIG_IGN))
    try:
        start_ray(address="local")
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]


def test_other_errors_of_rays_pass_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def init(**options: Any) -> None:
        tries.append(options)
        raise ConnectionError("nobody there")

    monkeypatch.setattr("raydistill.processes.ray.init", init)
    with pytest.raises(ConnectionError, match="nobody there"):
        start_ray(address="10.0.0.1:1")
    assert len(tries) == 1


def test_an_address_where_nobody_listens_is_refused_before_ray_tries_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raydistill.processes.ray.init", lambda **_: pytest.fail("Ray was asked"))
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        check_address(address)
    with pytest.raises(
        UserError, match=rf"'{address}' \(cluster.address, or RAY_ADDRESS\) does not answer \(.*refused\)"
    ):
        start_cluster(Config.model_validate({"cluster": {"address": address}}))


@pytest.mark.parametrize("address", ["auto", "ray://head:10001", "local"])
def test_what_is_not_host_and_port_is_left_to_ray(address: str) -> None:
    check_address(address)


def test_a_dashboards_address_is_told_apart() -> None:
    with pytest.raises(UserError, match=r"'http://127.0.0.1:8265' .* is that of its dashboard"):
        check_address("http://127.0.0.1:8265")
