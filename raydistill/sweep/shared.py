"""Pools that the trials of a sweep share: who holds what a run needs, as long as any run needs it.

Teachers answer any trial (and keep their answers to rows of the data set); one evaluation actor serves all; trials whose
student has the same base, format and adapter share rollout engines, where each trial has weights of its own. A pool that nobody
uses is armed anew for a trial that needs another engine: its actors and what they imported stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from raydistill.actors.engine import engine_needs
from raydistill.config import Config
from raydistill.roles import Pools


@dataclass(kw_only=True)
class _Slot:
    """One pool: what its actors hold, what they were started as, and the runs that use it."""

    holds: object
    kind: object
    pool: Any
    runs: set[str] = field(default_factory=set)


class SharedPools:
    """Hands out pools by what a config needs; `makers` start them (see `pools.POOL_MAKERS`)."""

    def __init__(self, makers: Mapping[str, Callable[[Config], Any]], num_adapters: int) -> None:
        self._makers, self._num_adapters = makers, num_adapters
        self._slots: dict[str, list[_Slot]] = {name: [] for name in makers}

    def lease(self, run: str, config: Config) -> Pools:
        """The pools of one run, until `release`."""
        pools = Pools(num_adapters=self._num_adapters)
        for name, (holds, kind) in pool_needs(config).items():
            slot = self._slot_of(name, holds, kind)
            if slot is None:
                slot = _Slot(holds=holds, kind=kind, pool=self._makers[name](config))
                self._slots[name].append(slot)
            slot.holds = holds
            slot.runs.add(run)
            setattr(pools, name, slot.pool)
        return pools

    def release(self, run: str) -> None:
        """The run is over; its pools stay for others."""
        for slots in self._slots.values():
            for slot in slots:
                slot.runs.discard(run)

    def _slot_of(self, name: str, holds: object, kind: object) -> _Slot | None:
        """A pool that holds just this, else an idle one whose actors can be given it."""
        fitting = [slot for slot in self._slots[name] if slot.kind == kind]
        same = next((slot for slot in fitting if slot.holds == holds), None)
        return same or next((slot for slot in fitting if not slot.runs), None)

    async def teacher_rows(self) -> dict[str, int]:
        """Rows of all teachers so far: computed, and answered from those kept."""
        counts = [await slot.pool.counts() for slot in self._slots["teachers"]]
        return {name: sum(count[name] for count in counts) for name in ("computed_rows", "kept_rows")}

    def num_pools(self) -> dict[str, int]:
        """How many pools of each kind were started."""
        return {name: len(slots) for name, slots in self._slots.items()}

    async def close(self) -> None:
        """End every actor."""
        for slots in self._slots.values():
            for slot in slots:
                await slot.pool.close()


def pool_needs(config: Config) -> dict[str, tuple[object, object]]:
    """Of each pool that a run needs: what its actors are to hold, and what they are started as. An idle pool can be given
    something else to hold; its actors stay what they were started as."""
    needs: dict[str, tuple[object, object]] = {}
    if config.needs_rollout_pool:
        engine = engine_needs(config.student, config.quant, config.adapter, config.rollout)
        needs["rollouts"] = ((*engine, _teachers_ids(config)), _actors_of(config.rollout))
    if config.needs_teacher:
        needs["teachers"] = (config.teacher, _actors_of(config.teacher))
    needs["evaluator"] = ("any student", config.evaluation.num_gpus)
    needs["trainers"] = ("any job", None)
    return needs


def _actors_of(section: Any) -> object:
    """What pool actors are started as."""
    names = ("engine", "num_actors", "num_gpus", "num_cpus", "tensor_parallel_size", "kv_cache_gib", "cache_gib")
    return tuple((name, getattr(section, name)) for name in names if hasattr(section, name))


def _teachers_ids(config: Config) -> int | None:
    """How many ids the teacher has: an engine samples no others."""
    model = config.teacher.model
    if not config.needs_teacher or model in (None, config.student.model):
        return None
    return _num_ids(model, config.teacher.trust_remote_code)


@cache
def _num_ids(model: str, trust_remote_code: bool) -> int | None:
    """Of a model; None where it cannot be read: the run will say why."""
    from raydistill.models import AutoConfig

    try:
        return int(AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code).get_text_config().vocab_size)
    except (OSError, ValueError):
        return None
