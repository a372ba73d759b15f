"""A vLLM server that another command needs: started by `raydistill serve`, waited for, ended with everything it started.

Only the standard library speaks HTTP here.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from raydistill.cli import console
from raydistill.errors import RunError, UserError
from raydistill.progress import spinner
from raydistill.serving.serve import HOST

START_TIMEOUT_S = 600.0  # a large model from a cold disk
END_TIMEOUT_S = 20.0
LOG_LINES = 15  # of a server that did not start
SERVE = (sys.executable, "-m", "raydistill", "serve")
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the server is on this machine: no proxy


def served_models(port: int) -> list[str] | None:
    """The names that a server on this port answers to; None if nothing listens."""
    try:
        with opener.open(f"http://{HOST}:{port}/v1/models", timeout=5) as answer:
            return [model["id"] for model in json.load(answer)["data"]]
    except (urllib.error.HTTPError, ValueError, KeyError, TypeError, http.client.HTTPException) as error:
        raise UserError(f"port {port} is taken by something else than a model server; give another --port") from error
    except OSError:
        return None


@contextmanager
def started_server(folder: Path, port: int, name: str, extra: Sequence[str]) -> Iterator[int]:
    """The process id of a server of this folder, ready to answer; it ends with the body, however that ends.

    folder: as `prepare_folder` returns it. extra: for vLLM. RunError with the server's last lines if it does not start.
    """
    with tempfile.NamedTemporaryFile("w+", prefix="raydistill-serve-", suffix=".log") as log:
        command = [*SERVE, str(folder), "--port", str(port), "--served-model-name", name, "--", *extra]
        with _ended_by_sigterm():
            # A session of its own: Ctrl-C in the terminal stops an answer, not the server.
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                _wait_until_ready(process, port, name, Path(log.name))
                yield process.pid
            finally:
                end_server(process)


def _wait_until_ready(process: subprocess.Popen[Any], port: int, name: str, log: Path) -> None:
    text = f"starting the server of {name} (vLLM; usually under a minute)"
    if not console.is_terminal:
        console.print(text, style="dim", soft_wrap=True)
    deadline = time.monotonic() + START_TIMEOUT_S
    with spinner(console, text):
        while served_models(port) is None:
            if process.poll() is not None:
                raise RunError(f"the server of {name} did not start; {_last_lines(log)}")
            if time.monotonic() > deadline:
                raise RunError(
                    f"the server of {name} is not ready after {START_TIMEOUT_S:.0f} s; start `raydistill serve` by itself"
                )
            time.sleep(0.5)


def _last_lines(log: Path) -> str:
    """Why a server ended: our own complaint alone if it made one, else the end of what vLLM wrote."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    own = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return own[-1] if own else "its last lines:\n" + "\n".join(lines[-LOG_LINES:])


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """While a server runs, `kill` unwinds this process like Ctrl-C: without this the server would stay behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def end_server(process: subprocess.Popen[Any]) -> None:
    """Ask the server to end; after a while end it and whatever it started."""
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_TIMEOUT_S)
        os.killpg(process.pid, signal.SIGKILL)  # its session: engine processes that outlived it
    process.wait()
