"""What the spans of a run say: who was busy, who waited for whom, and how much the stages overlapped."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from raydistill.messages import Span

Interval = tuple[float, float]
WAIT = "wait"
_DOWNTIME_S = 60.0  # no actor does anything for so long: the run was down
_LITTLE_WAITING = 0.1  # below this share of the wall time the trainer is as good as always busy
_ADVICE = {
    "rollout": "add rollout actors (rollout.num_actors) or raise sync.max_staleness",
    "teacher": "add teacher actors (teacher.num_actors) or raise sync.max_staleness",
    "sync": "check how long an engine takes to load weights, or lower sync.probe_sequences",
    "evaluate": "raise evaluation.eval_every or evaluate on fewer rows (data.eval_rows)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTime:
    """One stage over the whole run."""

    stage: str
    num_actors: int
    busy_s: float  # summed over its actors
    wait_s: float  # summed over its actors, from their wait spans
    busy_share: float  # of the wall time of all its actors
    wait_share: float


def wall_seconds(spans: Sequence[Span]) -> float:
    """From the first start to the last end, less the time between two lives of a resumed run."""
    active = _union((s.start_s, s.end_s) for s in spans)
    gaps = [later[0] - earlier[1] for earlier, later in pairwise(active)]
    return active[-1][1] - active[0][0] - sum(gap for gap in gaps if gap > _DOWNTIME_S) if active else 0.0


def stage_times(spans: Sequence[Span]) -> dict[str, StageTime]:
    """Busy and wait seconds per stage; a wait counts for the stage that its actor mostly works in."""
    wall, homes = wall_seconds(spans), _stage_of_actor(spans)
    actors: dict[str, set[str]] = defaultdict(set)
    busy: dict[str, float] = defaultdict(float)
    wait: dict[str, float] = defaultdict(float)
    for span in spans:
        stage = homes[span.actor] if span.stage == WAIT else span.stage
        actors[stage].add(span.actor)
        (wait if span.stage == WAIT else busy)[stage] += span.seconds
    return {
        stage: StageTime(
            stage=stage,
            num_actors=len(names),
            busy_s=busy[stage],
            wait_s=wait[stage],
            busy_share=busy[stage] / (wall * len(names)) if wall else 0.0,
            wait_share=wait[stage] / (wall * len(names)) if wall else 0.0,
        )
        for stage, names in actors.items()
    }


def device_seconds(spans: Sequence[Span], devices: Mapping[str, float]) -> dict[str, float]:
    """Stage -> busy seconds of its actors x the devices that one of them holds (`devices`, by stage; 1 where it says
    nothing). Waiting counts nowhere; what an actor does at the same time counts once, for the stage of most of its work.

    Property tested: an actor's seconds never exceed the time from its first to its last span.
    """
    seconds: dict[str, float] = defaultdict(float)
    for actor, home in _stage_of_actor(spans).items():
        seconds[home] += _length(_busy(spans, actor)) * devices.get(home, 1.0)
    return dict(seconds)


def stage_seconds_per_step(spans: Sequence[Span]) -> dict[int, dict[str, float]]:
    """Step -> stage -> seconds, summed over actors; waits under "wait"."""
    steps: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for span in spans:
        steps[span.step][span.stage] += span.seconds
    return {step: dict(stages) for step, stages in sorted(steps.items())}


def overlap_seconds(spans: Sequence[Span], first: str, second: str) -> float:
    """Seconds in which both were busy at once; each is a stage ("rollout") or an actor ("rollout-0").

    0 for a serial run. Two actors of one stage count once, so the result never exceeds the shorter side's time.
    """
    return _length(_intersect(_busy(spans, first), _busy(spans, second)))


def bottleneck(spans: Sequence[Span]) -> str:
    """One line: how long the trainer waited, for whom, and what to change."""
    times = stage_times(spans)
    if "trainer" not in times:
        return "no trainer spans in the record: nothing to say about waiting"
    share, wall = times["trainer"].wait_share, wall_seconds(spans)
    if share < _LITTLE_WAITING:
        return (
            f"the trainer was the bottleneck: busy {times['trainer'].busy_share:.0%} of the {wall:.0f} s wall time; "
            "add trainer workers (trainer.num_workers) to go faster"
        )
    blamed = waited_for(spans)
    if not blamed:
        return (
            f"trainer waited {share:.0%} of the wall time, and no other actor was busy meanwhile: start-up or transfers"
        )
    actor, stage = blamed
    advice = _ADVICE.get(stage, "look at its log")
    return f"trainer waited {share:.0%} of the wall time, mostly for {actor}; {advice}"


def waited_for(spans: Sequence[Span]) -> tuple[str, str] | None:
    """The actor (and its stage) that was busy during most of the trainer's waiting; None if nobody was."""
    homes = _stage_of_actor(spans)
    waits = _union((s.start_s, s.end_s) for s in spans if s.stage == WAIT and homes[s.actor] == "trainer")
    others = sorted({actor for actor, stage in homes.items() if stage not in ("trainer", WAIT)})
    seconds = {actor: _length(_intersect(waits, _busy(spans, actor))) for actor in others}
    if not seconds or max(seconds.values()) <= 0:
        return None
    actor = max(seconds, key=lambda name: seconds[name])
    return actor, homes[actor]


def _stage_of_actor(spans: Sequence[Span]) -> dict[str, str]:
    """Each actor's home: the stage of most of its work; "trainer" if it does nothing but wait (that is who waits)."""
    work: dict[str, Counter[str]] = defaultdict(Counter)
    for span in spans:
        stages = work[span.actor]
        if span.stage != WAIT:
            stages[span.stage] += 1
    return {actor: stages.most_common(1)[0][0] if stages else "trainer" for actor, stages in work.items()}


def _busy(spans: Sequence[Span], who: str) -> list[Interval]:
    return _union((s.start_s, s.end_s) for s in spans if s.stage != WAIT and who in (s.stage, s.actor))


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        elif end > start:
            merged.append((start, end))
    return merged


def _intersect(first: Sequence[Interval], second: Sequence[Interval]) -> list[Interval]:
    common, i, j = [], 0, 0
    while i < len(first) and j < len(second):
        start, end = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if start < end:
            common.append((start, end))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return common


def _length(intervals: Sequence[Interval]) -> float:
    return sum(end - start for start, end in intervals)
