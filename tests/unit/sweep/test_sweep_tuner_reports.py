"""How a trial's process hears of its evaluations."""

from types import SimpleNamespace
from typing import Any

import pytest

from raydistill.sweep import tuner

DONE = "done"


class FakeRay:
    """References are what they stand for; `None` in `told` is a report that never comes."""

    def __init__(self, told: list[Any], is_over: bool) -> None:
        self.told, self.is_over = told, is_over
        method = SimpleNamespace(remote=lambda name: ("told", self.told.pop(0)))
        self.host = SimpleNamespace(next_report=method)

    def wait(self, refs: list[Any], num_returns: int = 1, timeout: float | None = None) -> tuple[list[Any], list[Any]]:
        ready = [ref for ref in refs if (self.is_over if ref is DONE else ref[1] is not None)]
        assert ready or timeout is not None, "this would wait for ever"
        return ready[:num_returns], []

    def get(self, ref: Any) -> Any:
        return None if ref[1] == "no more" else ref[1]


@pytest.mark.parametrize(
    ("told", "is_over", "heard"),
    [
        ([{"version": 0.0}], False, {"version": 0.0}),
        ([{"version": 4.0}], True, {"version": 4.0}),  # the last ones of a run that is over
        (["no more"], True, None),
        ([None], True, None),  # asked of a host that was started again, and never heard of the run
    ],
)
def test_reports_come_until_there_are_no_more_or_the_host_that_knew_them_is_gone(
    told: list[Any], is_over: bool, heard: dict[str, float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeRay(told, is_over)
    monkeypatch.setattr(tuner, "ray", fake)
    assert tuner._next_report(fake.host, "lr-000", DONE) == heard
