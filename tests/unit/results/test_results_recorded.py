"""A record around something that runs: how its end is recorded, and how long its delivery is waited for."""

import asyncio
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from raydistill.config import Config
from raydistill.errors import RunError, RunStopped, SweepStopped
from raydistill.results import recorded as recorded_module
from raydistill.results.deliver import FINISH_S
from raydistill.results.record_lines import read_record, start_of
from raydistill.results.recorded import STOPPED_S, recorded


class Delivery:
    """A store that is down."""

    problem = "the results store does not answer"

    def __init__(self) -> None:
        self.waited_s: list[float] = []

    def finish(self, timeout_s: float) -> bool:
        self.waited_s.append(timeout_s)
        return False


@pytest.fixture
def delivery(monkeypatch: pytest.MonkeyPatch) -> Delivery:
    found = Delivery()
    monkeypatch.setattr(recorded_module, "start_delivery", lambda *_: found)
    monkeypatch.setattr(recorded_module, "collect", dict)
    return found


def test_other_settings_of_a_resume_are_those_of_the_record(tmp_path: Path, delivery: Delivery) -> None:
    for num_steps in (3, 5):
        config = Config.model_validate({"trainer": {"num_steps": num_steps}})
        with recorded(tmp_path / "one", config, Console(file=io.StringIO()), delivers=False):
            pass
    start = start_of(tmp_path / "one")
    assert start is not None
    assert start["config"]["trainer"]["num_steps"] == 5


@pytest.mark.parametrize(
    ("error", "limit", "waited_s", "status"),
    [
        (None, lambda s: s, FINISH_S, "finished"),
        (RunError("no room"), lambda s: s, FINISH_S, "failed"),
        (RunStopped(3), lambda s: s, STOPPED_S, "interrupted"),
        (RunStopped(3), lambda s: min(s, 0.5), 0.5, "interrupted"),
        (SweepStopped("stopped with 2 of 4 trials to go"), lambda s: s, STOPPED_S, "interrupted"),
        (asyncio.CancelledError(), lambda s: s, STOPPED_S, "interrupted"),
        (KeyboardInterrupt(), lambda s: s, STOPPED_S, "interrupted"),
    ],
)
def test_a_store_that_is_down_is_not_waited_for_by_a_run_that_was_stopped(
    tmp_path: Path,
    delivery: Delivery,
    error: BaseException | None,
    limit: Callable[[float], float],
    waited_s: float,
    status: str,
) -> None:
    said = io.StringIO()
    folder = tmp_path / "runs" / "one"

    def whole() -> None:
        with recorded(folder, Config(), Console(file=said, width=500), limit=limit):
            if error is not None:
                raise error

    if error is None:
        whole()
    else:
        with pytest.raises(type(error)):
            whole()
    assert delivery.waited_s == [waited_s]
    assert f"deliver later with `python -m raydistill.results.deliver {folder}`" in said.getvalue()
    ends: list[Any] = [line["status"] for line in read_record(folder) if line["kind"] == "end"]
    assert ends == [status]
