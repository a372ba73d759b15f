"""A results store by its URI, before a run: what cannot be one is refused, what does not answer is told."""

import socket

import pytest

from raydistill.config import ResultsSection
from raydistill.errors import UserError
from raydistill.preflight.findings import results_findings
from raydistill.results import query
from raydistill.results.reachable import check_uri, silence_of


@pytest.mark.parametrize(
    "uri", ["http://mlflow:5000", "https://mlflow", "sqlite:////data/results.db", "postgresql://me:secret@db/results"]
)
def test_what_mlflow_can_open_passes(uri: str) -> None:
    check_uri(uri)


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("s3://bucket/results", "s3"),
        ("results.db", "URL"),
        ("http://", "http"),
        ("postgresql://me:secret@db:port/results", "port"),
        ("mysql+nosuchdriver://me:secret@db/results", "nosuchdriver"),
    ],
)
def test_what_cannot_be_a_store_is_refused_without_its_password(uri: str, reason: str) -> None:
    with pytest.raises(UserError, match=rf"results\.uri=.*{reason}.*name an MLflow server") as caught:
        check_uri(uri)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["http", "postgresql"])
def test_a_store_that_is_down_is_one_short_line(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        uri = f"{scheme}://me:secret@127.0.0.1:{free.getsockname()[1]}/results"

    from mlflow.exceptions import MlflowException

    def ask(*_: object) -> None:
        """As MLflow does: the cause within what two libraries say around it."""
        try:
            raise ConnectionRefusedError(111, "Connection refused")
        except OSError as error:
            raise MlflowException("API request failed with exception " + 20 * "Max retries exceeded " + uri) from error

    monkeypatch.setattr(query, "open_client", ask)
    with pytest.raises(
        UserError, match=r"does not answer \((127\.0\.0\.1:\d+: )?Connection refused\); start it"
    ) as caught:
        query.list_runs(uri)
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_what_a_library_says_at_length_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.exceptions import MlflowException

    def ask(*_: object) -> None:
        raise MlflowException("Unsupported URI. " + 50 * "See the documentation. ")

    monkeypatch.setattr(query, "open_client", ask)
    with pytest.raises(UserError, match=r"\(Unsupported URI\. See .* \.\.\.\); start it") as caught:
        query.list_runs("http://127.0.0.1:1")
    assert len(str(caught.value)) < 300


def test_a_door_is_knocked_at() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert silence_of(f"postgresql://me:secret@127.0.0.1:{port}/results") is None
    (finding,) = results_findings(ResultsSection(uri=f"http://127.0.0.1:{port}"))
    assert finding.status == "warning"
    assert f"127.0.0.1:{port}" in finding.text
    assert silence_of("sqlite:////data/results.db") is None
    (finding,) = results_findings(ResultsSection())
    assert (finding.status, finding.text) == ("ok", "go to results.db under run.output")
