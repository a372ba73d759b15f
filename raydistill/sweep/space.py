"""The search space of a sweep: for each config field that varies, the values it may take. Pure; knows no Ray.

"trainer.learning_rate" = { log_range = [1e-5, 1e-3], num = 5 }   # num: points of a grid
"objective.beta" = [0.0, 0.5, 1.0]                                 # a list, of any type that the field takes
"trainer.sequences_per_step" = { range = [16, 64], num = 4 }       # whole numbers where both ends are
adapter = [{ rank = 8, alpha = 16 }, { rank = 16, alpha = 32 }]    # fields of one section that vary together
"""

from __future__ import annotations

import itertools
import json
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raydistill.errors import ConfigError

KEYS = ("range", "log_range", "num")
MOST_MISSES = 100_000  # draws in a row that are all known: of a range that is too narrow for the digits of its values
MIN_LOG = 3  # listed numbers that may show a log scale


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One of several values."""

    values: tuple[Any, ...]

    @property
    def is_log(self) -> bool:
        """Positive numbers whose median is nearer to their geometric than to their arithmetic middle, over a decade or more."""
        numbers = sorted(one for one in self.values if isinstance(one, (int, float)) and not isinstance(one, bool))
        if (
            len(numbers) < len(self.values)
            or len(numbers) < MIN_LOG
            or numbers[0] <= 0
            or numbers[-1] < 10 * numbers[0]
        ):
            return False
        middle, ends = statistics.median(numbers), (numbers[0], numbers[-1])
        return abs(middle - math.sqrt(ends[0] * ends[1])) < abs(middle - sum(ends) / 2)

    @property
    def size(self) -> float:
        """How many different values there are."""
        return len({repr(value) for value in self.values})

    def grid(self) -> tuple[Any, ...]:
        return self.values

    def draw(self, source: random.Random) -> Any:
        return self.values[source.randrange(len(self.values))]

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values that show whether the config takes them all."""
        return self.values


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Any value from low to high, both included; on a log scale where that is how it varies."""

    low: float
    high: float
    is_log: bool
    num: int | None  # points of a grid

    @property
    def is_whole(self) -> bool:
        """Whole numbers only: both ends are written as such."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def size(self) -> float:
        """How many different values there are."""
        return self.high - self.low + 1 if self.is_whole else math.inf

    def grid(self) -> tuple[Any, ...]:
        """`num` points from low to high, evenly spaced (in the logarithm); equal ones once."""
        assert self.num is not None
        points = [self._at(i / (self.num - 1)) for i in range(self.num)]
        return tuple(dict.fromkeys(points))

    def draw(self, source: random.Random) -> Any:
        return self._at(source.random())

    def _at(self, share: float) -> float | int:
        if self.is_log:
            value = math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + share * (self.high - self.low)
        value = min(max(value, self.low), self.high)
        return round(value) if self.is_whole else float(f"{value:.6g}")

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values that show whether the config takes them all."""
        return (self.low, self.high)


Values = Choice | Interval


def parse_values(where: str, written: Any, needs_grid: bool) -> Values:
    """What stands behind a field in `[space]`; ConfigError names `where` and what is wrong. needs_grid: an interval needs
    its number of points."""
    if isinstance(written, list):
        if not written:
            raise ConfigError(f"{where}: an empty list; name at least one value")
        twice = next((value for value in written if written.count(value) > 1), None)
        if twice is not None:
            raise ConfigError(f"{where}: {twice!r} stands there twice; to repeat trials vary run.seed")
        return Choice(values=tuple(tuple(value) if isinstance(value, list) else value for value in written))
    if not isinstance(written, Mapping):
        raise ConfigError(
            f"{where}: give a list of values, or {{ range = [low, high] }} or {{ log_range = [low, high] }}"
        )
    unknown = sorted(set(written) - set(KEYS))
    if unknown or ("range" in written) == ("log_range" in written):
        what = f"{unknown[0]!r} means nothing here" if unknown else "give either range or log_range"
        raise ConfigError(f"{where}: {what}; write a list, {{ range = [low, high] }} or {{ log_range = [low, high] }}")
    return _parse_interval(where, written, needs_grid)


def _parse_interval(where: str, written: Mapping[str, Any], needs_grid: bool) -> Interval:
    is_log = "log_range" in written
    ends, num = written["log_range" if is_log else "range"], written.get("num")
    numbers = isinstance(ends, list) and all(
        isinstance(end, (int, float)) and not isinstance(end, bool) for end in ends
    )
    if not numbers or len(ends) != 2:
        raise ConfigError(f"{where}: a range is [low, high], two numbers; found {ends!r}")
    low, high = ends
    if not low < high:
        raise ConfigError(f"{where}: the range from {low} to {high} is empty; the lower end comes first")
    if is_log and low <= 0:
        raise ConfigError(f"{where}: a log range starts above 0, found {low}")
    if num is not None and (not isinstance(num, int) or isinstance(num, bool) or num < 2):
        raise ConfigError(f"{where}: num is the number of points, 2 or more; found {num!r}")
    if needs_grid and num is None:
        raise ConfigError(
            f"{where}: a grid needs the number of points of a range: add num = 5, or set sampler = 'random'"
        )
    return Interval(low=low, high=high, is_log=is_log, num=num)


def parse_together(where: str, written: Any, base: Mapping[str, Any]) -> Choice:
    """Fields of one section that vary together: a list of tables. base: the section's values where a table is silent."""
    if not isinstance(written, list) or not written or not all(isinstance(one, dict) and one for one in written):
        raise ConfigError(
            f"{where} is a section: list what its fields are together, as in [{{ rank = 8, alpha = 16 }}, ...]"
        )
    names = list(dict.fromkeys(name for one in written for name in one))
    return Choice(values=tuple({name: one.get(name, base[name]) for name in names} for one in written))


def spread(point: Mapping[str, Any]) -> dict[str, Any]:
    """A point with a value for each field, also for those that vary together."""
    found: dict[str, Any] = {}
    for name, value in point.items():
        found |= {f"{name}.{leaf}": one for leaf, one in value.items()} if isinstance(value, dict) else {name: value}
    return found


def gathered(space: Mapping[str, Values], point: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `spread`: one value for each entry of the space, a listed one as the space has it. The point may have
    been through JSON, which turns tuples into lists."""
    return {
        name: _listed(
            values,
            point[name]
            if name in point
            else {leaf.removeprefix(f"{name}."): one for leaf, one in point.items() if leaf.startswith(f"{name}.")},
        )
        for name, values in space.items()
    }


def _listed(values: Values, value: Any) -> Any:
    if not isinstance(values, Choice):
        return value
    return next((one for one in values.values if json.dumps(one) == json.dumps(value)), value)


def grid_points(space: Mapping[str, Values]) -> list[dict[str, Any]]:
    """Every combination, the last field varying fastest."""
    fields = list(space)
    points = itertools.product(*(space[field].grid() for field in fields))
    return [spread(dict(zip(fields, point, strict=True))) for point in points]


def random_points(space: Mapping[str, Values], number: int, seed: int) -> list[dict[str, Any]]:
    """Up to `number` draws, each point once: a function of the seed and the order of the fields. A space with no more points
    than that gives all it has."""
    source = random.Random(seed)
    enough = min(number, math.prod(values.size for values in space.values()))
    found: dict[str, dict[str, Any]] = {}
    misses = 0
    while len(found) < enough and misses < MOST_MISSES:
        point = spread({field: values.draw(source) for field, values in space.items()})
        misses = misses + 1 if repr(point) in found else 0
        found.setdefault(repr(point), point)
    return list(found.values())


def corner_points(space: Mapping[str, Values]) -> list[dict[str, Any]]:
    """For each field every end (or listed value) of its own, with the first of all others: what to check beforehand."""
    first = {field: values.ends[0] for field, values in space.items()}
    return [spread(first | {field: end}) for field, values in space.items() for end in values.ends]


def with_seeds(points: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Each point once for every seed; as they are without seeds."""
    return [{**point, "run.seed": seed} for point in points for seed in seeds] if seeds else [dict(p) for p in points]
