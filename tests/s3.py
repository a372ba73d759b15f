"""A real S3-compatible server on loopback (moto's), for the tests of `run.storage`; skipped where moto is not installed."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

BUCKET = "bucket"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}


def environment(port: int) -> dict[str, str]:
    """What leads s3:// to the server at a port of this machine."""
    return CREDENTIALS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


class S3:
    """The server; `stop` and `start` again keep its address and what it holds."""

    def __init__(self, port: int = 0) -> None:
        server = pytest.importorskip("moto.server", reason="needs moto (requirements/dev.txt): a local S3 server")
        pytest.importorskip("s3fs", reason="needs s3fs (requirements/cpu.txt)")
        self._make = server.ThreadedMotoServer
        self._port = port
        self._server: Any = None

    def start(self) -> None:
        self._server = self._make(ip_address="127.0.0.1", port=self._port, verbose=False)
        self._server.start()
        _, self._port = self._server.get_host_and_port()

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None

    @property
    def environment(self) -> dict[str, str]:
        return environment(self._port)


@contextmanager
def s3_server(port: int = 0) -> Iterator[S3]:
    """A server with an empty bucket, and an environment that leads s3:// to it."""
    import logging

    from raydistill.recovery import storage

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = S3(port)
    server.start()
    before = {name: os.environ.get(name) for name in server.environment}
    os.environ |= server.environment
    storage._open.cache_clear()
    try:
        import s3fs

        s3fs.S3FileSystem(skip_instance_cache=True).mkdir(BUCKET)
        yield server
    finally:
        server.stop()
        storage._open.cache_clear()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
