"""What the ranks of one group tell each other about a checkpoint; each call is made by all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import distributed

Fact = TypeVar("Fact")


def from_first(fact: Fact | None) -> Fact:
    """What rank 0 gives, on every rank; also a barrier."""
    found = [fact]
    if _several():
        distributed.broadcast_object_list(found, src=0)
    assert found[0] is not None
    return found[0]


def from_all(fact: Fact) -> Sequence[Fact]:
    """What every rank gives, by rank; also a barrier."""
    if not _several():
        return [fact]
    facts: list[Fact] = [fact] * distributed.get_world_size()
    distributed.all_gather_object(facts, fact)
    return facts


def _several() -> bool:
    return distributed.is_initialized() and distributed.get_world_size() > 1
