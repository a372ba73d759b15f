"""`raydistill results` without a store: arguments, sorting, comparing. The store itself is read in tests/engine."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from raydistill.errors import UserError
from raydistill.results import listing
from raydistill.results.query import compare, list_runs, sort_runs


def run(name: str, metrics: dict[str, float], started_s: float = 0.0, **params: str) -> dict[str, Any]:
    return {
        "name": name,
        "id": name * 8,
        "status": "finished",
        "started_s": started_s,
        "seconds": 1.0,
        "metrics": metrics,
        "params": params,
        "tags": {},
    }


RUNS = [
    run("a", {"evaluate/kl_nats": 0.2, "evaluate/exact_match": 0.9}, 1, beta="0"),
    run("b", {"evaluate/kl_nats": 0.1, "evaluate/exact_match": 0.8}, 2, beta="1", rank="8"),
    run("c", {}, 3),
    run("d", {"evaluate/kl_nats": float("nan")}, 4),
]


def test_runs_are_sorted_best_first_and_those_without_the_metric_last() -> None:
    assert [r["name"] for r in sort_runs(RUNS, "evaluate/kl_nats")] == ["b", "a", "d", "c"]
    assert [r["name"] for r in sort_runs(RUNS, "evaluate/exact_match")] == ["a", "b", "d", "c"]


def test_an_unknown_metric_names_those_there_are() -> None:
    with pytest.raises(UserError, match="evaluate/exact_match, evaluate/kl_nats"):
        sort_runs(RUNS, "kl")


def test_comparing_shows_differing_settings_and_all_metrics() -> None:
    found = compare(RUNS[0], RUNS[1])
    assert found["settings"] == {"beta": ("0", "1"), "rank": (None, "8")}
    assert found["metrics"]["evaluate/kl_nats"] == (0.2, 0.1)


def test_a_missing_store_is_a_user_error_and_is_not_created(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no results at"):
        listing.results_command(["--output", str(tmp_path)])
    with pytest.raises(UserError, match="no results at"):
        listing.results_command(["--output", str(tmp_path), "--ui"])
    with pytest.raises(UserError, match="no results at"):
        list_runs(f"sqlite:///{tmp_path}/results.db")
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_tables_and_strict_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(listing, "list_runs", lambda *_: RUNS)
    monkeypatch.setattr(listing, "compare_runs", lambda *_: compare(RUNS[0], RUNS[1]))
    assert listing.results_command([]) == 0
    assert "0.2" in capsys.readouterr().out
    assert listing.results_command(["--json"]) == 0
    out = capsys.readouterr().out
    assert "NaN" not in out
    assert '"evaluate/kl_nats": null' in out
    assert listing.results_command(["--compare", "a", "b"]) == 0
    assert "beta" in capsys.readouterr().out


def test_a_taken_port_is_a_user_error(tmp_path: Path) -> None:
    import socket

    (tmp_path / "results.db").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match="choose another one with --port"):
            listing.results_command(["--output", str(tmp_path), "--ui", "--port", str(port)])


def test_a_tracking_server_is_named_in_place_of_a_second_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert listing.results_command(["--uri", "http://host:5000", "--ui"]) == 0
    assert "http://host:5000" in capsys.readouterr().out


def test_help_and_the_driver_side_load_no_mlflow() -> None:
    code = (
        "import sys\n"
        "from raydistill.results import deliver, listing, plots, record, tables, verdict\n"
        "try:\n    listing.results_command(['--help'])\n"
        "except SystemExit:\n    pass\n"
        "assert not {'mlflow', 'matplotlib', 'torch', 'pandas'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--compare A B" in done.stdout
