"""Debian's PostgreSQL server for tests: in a temporary folder, on a free loopback port, by a user who is not root."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

USER, PASSWORD = "raydistill", "hunter2"
START_S = 240.0


def binaries() -> Path | None:
    """Where `initdb` and `postgres` are; the newest version."""
    found = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    return max(found, key=lambda path: int(path.parent.name), default=None)


class Postgres:
    """One server that can be stopped and started again."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self._folder, self._programs, self._process = folder, programs, None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.uri = f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{self._port}/postgres"
        self._owner = _owner()
        if self._owner:
            os.chown(folder, self._owner["user"], self._owner["group"])
        password_file = folder / "password"
        password_file.write_text(PASSWORD)
        password_file.chmod(0o644)
        self._run(
            "initdb", "-U", USER, "--auth=scram-sha-256", f"--pwfile={password_file}", "--no-locale", "-E", "UTF8"
        )

    def start(self) -> None:
        import psycopg

        options = ("listen_addresses=127.0.0.1", "unix_socket_directories=", "fsync=off", "logging_collector=off")
        command = self._command("postgres", "-p", str(self._port), *(part for one in options for part in ("-c", one)))
        with (self._folder / "server.log").open("ab") as log:
            self._process: Any = subprocess.Popen(command, stdout=log, stderr=log, cwd="/", **self._owner)
        until = time.monotonic() + START_S
        while True:
            assert self._process.poll() is None, (self._folder / "server.log").read_text()
            with suppress(psycopg.OperationalError):
                psycopg.connect(self.uri, connect_timeout=5).close()
                return
            assert time.monotonic() < until, (self._folder / "server.log").read_text()
            time.sleep(0.1)

    def stop(self) -> None:
        """Break all connections and end (PostgreSQL's fast shutdown)."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(START_S)
            self._process = None

    def _command(self, program: str, *arguments: str) -> list[str]:
        return [str(self._programs / program), "-D", str(self._folder / "data"), *arguments]

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            self._command(program, *arguments), capture_output=True, text=True, check=False, cwd="/", **self._owner
        )
        assert done.returncode == 0, done.stderr


def _owner() -> dict[str, Any]:
    """PostgreSQL refuses to run as root: the package's user then, or nobody."""
    if os.getuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            entry = pwd.getpwnam(name)
            return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    raise AssertionError("neither a user postgres nor nobody")


@contextmanager
def postgres(programs: Path) -> Iterator[Postgres]:
    """A running server that ends with the block, with all it wrote."""
    folder = Path(tempfile.mkdtemp(prefix="raydistill-postgres-"))
    server = Postgres(folder, programs)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder)
