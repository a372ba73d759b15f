"""Spans: busy and waiting seconds, overlap and the bottleneck, on timelines small enough to compute by hand."""

import pytest

from raydistill.messages import Span
from raydistill.results.timeline import (
    bottleneck,
    device_seconds,
    overlap_seconds,
    stage_seconds_per_step,
    stage_times,
    waited_for,
    wall_seconds,
)


def span(stage: str, actor: str, start_s: float, end_s: float, step: int = 0) -> Span:
    return Span(stage=stage, actor=actor, step=step, start_s=start_s, end_s=end_s)  # type: ignore[arg-type]


SERIAL = [
    span("rollout", "rollout-0", 0, 4),
    span("wait", "trainer-0", 0, 5),
    span("teacher", "teacher-0", 4, 5),
    span("trainer", "trainer-0", 5, 10),
]
OVERLAPPED = [
    span("rollout", "rollout-0", 0, 4),
    span("rollout", "rollout-1", 1, 3),
    span("rollout", "rollout-0", 4, 8, 1),
    span("trainer", "trainer-0", 6, 10),
]


def test_stage_times_sum_actors_and_share_the_wall_time() -> None:
    times = stage_times(SERIAL)
    assert times["rollout"].busy_s == 4
    assert times["rollout"].busy_share == pytest.approx(0.4)
    assert times["trainer"].busy_s == 5
    assert times["trainer"].wait_s == 5
    assert times["trainer"].wait_share == pytest.approx(0.5)
    assert "wait" not in times
    two = stage_times(OVERLAPPED)["rollout"]
    assert two.num_actors == 2
    assert two.busy_s == 10
    assert two.busy_share == pytest.approx(10 / 20)


def test_device_seconds_are_busy_seconds_times_devices_and_waiting_is_free() -> None:
    assert device_seconds(SERIAL, {}) == {"rollout": 4, "trainer": 5, "teacher": 1}
    assert device_seconds(SERIAL, {"trainer": 8, "teacher": 0.5}) == {"rollout": 4, "trainer": 40, "teacher": 0.5}
    assert device_seconds(OVERLAPPED, {"rollout": 2}) == {"rollout": 2 * (8 + 2), "trainer": 4}


def test_what_an_actor_does_at_the_same_time_costs_its_device_once() -> None:
    spans = [span("rollout", "rollout-0", 0, 4), span("rollout", "rollout-0", 1, 3), span("sync", "rollout-0", 3, 6)]
    assert device_seconds(spans, {}) == {"rollout": 6}
    assert device_seconds([], {}) == {}


def test_a_serial_run_overlaps_for_zero_seconds() -> None:
    assert overlap_seconds(SERIAL, "rollout", "trainer") == 0


def test_overlap_counts_a_moment_once_however_many_actors_work() -> None:
    assert overlap_seconds(OVERLAPPED, "rollout", "trainer") == 2
    assert overlap_seconds(OVERLAPPED, "rollout-0", "rollout-1") == 2
    both = [*OVERLAPPED, span("rollout", "rollout-1", 6, 8)]
    assert overlap_seconds(both, "rollout", "trainer") == 2
    assert overlap_seconds(both, "trainer", "rollout") == 2


def test_waiting_is_not_being_busy() -> None:
    assert overlap_seconds(SERIAL, "rollout", "trainer-0") == 0


def test_the_bottleneck_is_who_was_busy_while_the_trainer_waited() -> None:
    assert waited_for(SERIAL) == ("rollout-0", "rollout")
    line = bottleneck(SERIAL)
    assert "trainer waited 50% of the wall time" in line
    assert "rollout-0" in line
    assert "sync.max_staleness" in line


def test_a_trainer_that_never_waits_is_the_bottleneck() -> None:
    assert "the trainer was the bottleneck" in bottleneck([span("trainer", "t", 0, 10), span("rollout", "r", 0, 2)])


def test_waiting_while_nobody_works_blames_nobody() -> None:
    assert "no other actor was busy" in bottleneck([span("wait", "t", 0, 5), span("trainer", "t", 5, 6)])


def test_no_spans_are_no_error() -> None:
    assert wall_seconds([]) == 0
    assert stage_times([]) == {}
    assert overlap_seconds([], "rollout", "trainer") == 0
    assert "nothing to say" in bottleneck([])


def test_the_time_a_killed_run_was_down_is_no_wall_time() -> None:
    assert wall_seconds([span("trainer", "t", 0, 10), span("trainer", "t", 5000, 5010)]) == 20
    assert wall_seconds([span("trainer", "t", 0, 10), span("trainer", "t", 12, 20)]) == 20


def test_seconds_per_step_keep_steps_and_stages_apart() -> None:
    assert stage_seconds_per_step(OVERLAPPED) == {0: {"rollout": 6, "trainer": 4}, 1: {"rollout": 4}}
