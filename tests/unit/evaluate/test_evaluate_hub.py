"""Whether the hub is asked at all: a closed door is noticed before the hub's libraries knock at it for half a minute."""

import os
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from raydistill.evaluate.hub import go_offline_if_unreachable


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "")  # and back to what it was, whatever the code sets
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture(params=[200, 404])
def hub(request: pytest.FixtureRequest) -> Iterator[str]:
    """A server that answers everything with one status."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(request.param)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_hub_that_answers_is_asked(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub)
    go_offline_if_unreachable()
    assert os.environ["HF_HUB_OFFLINE"] == ""


def test_without_a_hub_only_the_cache_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    go_offline_if_unreachable()
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_who_wants_to_stay_offline_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: object, **__: object) -> None:
        raise AssertionError("somebody was asked")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("urllib.request.urlopen", ask)
    go_offline_if_unreachable()
