"""MLflow's web page on this machine only, as a child process that ends with Ctrl-C."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

from raydistill.errors import UserError
from raydistill.results.store import QUIET_ENVIRONMENT, sqlite_path

HOST = "127.0.0.1"
_STOP_S = 10.0


def serve_page(uri: str, port: int) -> int:
    """Serve until Ctrl-C or SIGTERM; for a tracking server, say where its own page is. Returns the exit code."""
    if uri.startswith("http"):
        print(f"the tracking server has its own page: {uri}")
        return 0
    database = sqlite_path(uri)
    if database and not database.exists():
        raise UserError(f"there are no results at {database} yet; name the folder of your runs with --output")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(f"port {port} is taken ({error.strerror}); choose another one with --port") from error
    command = [sys.executable, "-m", "mlflow", "ui", "--host", HOST, "--port", str(port), "--workers", "1"]
    # The URI may hold a password: it goes through the environment, not the command line that all users can see.
    environment = os.environ | QUIET_ENVIRONMENT | {"MLFLOW_BACKEND_STORE_URI": uri}
    environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # starts helper processes that results do not need
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    before = signal.signal(signal.SIGTERM, _interrupt)
    print(f"http://{HOST}:{port} answers in about 20 s; end with Ctrl-C", flush=True)
    try:
        return process.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        signal.signal(signal.SIGTERM, before)
        _end_group(process)


def _interrupt(*_: object) -> None:
    """Not by raising SIGINT: a shell starts its background jobs with that one ignored."""
    raise KeyboardInterrupt


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End the server and its workers: they are a process group of their own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(_STOP_S)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
