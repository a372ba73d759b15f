"""Which examples each optimizer step uses, which of them the student answers, and with which sampling seeds.

Everything here is a pure function of (seed, step, index): any process can ask for any step in any order, as often as
it likes, and gets the same answer. Epochs are drawn without replacement and follow each other without a gap, so a
step may hold the end of one epoch and the start of the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import numpy as np

from raydistill.data.encode import Example, require_references
from raydistill.errors import DataError
from raydistill.messages import REFERENCE_VERSION, FinishReason, PromptBatch, Samples, TokenRows


class _Stream(IntEnum):
    """Independent random streams of one seed. The numbers are part of every run's identity: never renumber."""

    EPOCH_ORDER = 1
    ON_POLICY_DRAW = 2
    SAMPLING_SEED = 3


def _seed_sequence(seed: int, stream: _Stream, *place: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(entropy=seed, spawn_key=(int(stream), *place))


def _raw_bits(seed: int, stream: _Stream, place: int, size: int) -> np.ndarray:
    """uint64 draws. Raw bits: numpy promises that these never change, unlike `Generator.permutation`."""
    return np.random.Philox(_seed_sequence(seed, stream, place)).random_raw(size)


def sampling_seed(seed: int, step: int, index: int) -> int:
    """The engine's sampling seed for one completion, in 1 .. 2^31 - 1."""
    state = int(_seed_sequence(seed, _Stream.SAMPLING_SEED, step, index).generate_state(1, np.uint64)[0])
    return 1 + state % (2**31 - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """The prompts of one step for the student to answer, and the reference completions used as they are.

    Together their `indices` are 0 .. sequences_per_step - 1; a side without sequences is None.
    """

    step: int
    prompts: PromptBatch | None
    references: Samples | None


class StepSchedule:
    """The plan of every step of a run."""

    def __init__(
        self,
        examples: Sequence[Example],
        seed: int,
        sequences_per_step: int,
        on_policy_fraction: float,
        mixing: Literal["step", "sequence"],
    ) -> None:
        if not len(examples):
            raise DataError("there are no training examples to schedule; check data.path and the structural filter")
        if on_policy_fraction < 1:
            require_references(examples)
        self._examples = examples
        self._seed = seed
        self._sequences_per_step = sequences_per_step
        self._on_policy_fraction = on_policy_fraction
        self._mixing = mixing
        self._epoch_orders: dict[int, np.ndarray] = {}

    def plan(self, step: int) -> StepPlan:
        """What step `step` (from 0) samples and what it takes from the data set."""
        chosen = [self._examples[number] for number in self.example_numbers(step)]
        on_policy = self.is_on_policy(step)
        sampled = [index for index in range(len(chosen)) if on_policy[index]]
        given = [index for index in range(len(chosen)) if not on_policy[index]]
        return StepPlan(
            step=step,
            prompts=_prompt_batch(step, sampled, chosen) if sampled else None,
            references=_references(step, given, chosen) if given else None,
        )

    def example_numbers(self, step: int) -> list[int]:
        """Place in the data set of each sequence of a step."""
        assert step >= 0, f"steps count from 0, asked for {step}"
        start = step * self._sequences_per_step
        places = [divmod(start + index, len(self._examples)) for index in range(self._sequences_per_step)]
        return [int(self._epoch_order(epoch)[offset]) for epoch, offset in places]

    def is_on_policy(self, step: int) -> np.ndarray:
        """The lambda draw of each sequence of a step, bool; exact at 0 and 1, the same on every rank."""
        draws = 1 if self._mixing == "step" else self._sequences_per_step
        bits = _raw_bits(self._seed, _Stream.ON_POLICY_DRAW, step, draws)
        uniform = (bits >> np.uint64(11)) * 2.0**-53  # in [0, 1), as a double has 53 bits
        return np.broadcast_to(uniform < self._on_policy_fraction, self._sequences_per_step)

    def epochs_before(self, step: int) -> float:
        """How many times the data was gone through before this step."""
        return step * self._sequences_per_step / len(self._examples)

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """The permutation of one epoch; the last two are kept, as a step may lie across a border."""
        if epoch not in self._epoch_orders:
            while len(self._epoch_orders) > 1:
                del self._epoch_orders[next(iter(self._epoch_orders))]
            bits = _raw_bits(self._seed, _Stream.EPOCH_ORDER, epoch, len(self._examples))
            self._epoch_orders[epoch] = np.argsort(bits, kind="stable")
        return self._epoch_orders[epoch]


def rank_of(index: int, num_ranks: int) -> int:
    """Which trainer rank trains on a step's sequence `index`: equal counts for every rank."""
    return index % num_ranks


HELD_OUT = -2  # the "step" of held-out rows, which no optimizer step trains on


def held_out_prompts(examples: Sequence[Example]) -> PromptBatch | None:
    """All held-out prompts, to be answered greedily; None if there are none."""
    return _prompt_batch(HELD_OUT, range(len(examples)), examples) if examples else None


def held_out_references(examples: Sequence[Example]) -> Samples | None:
    """The held-out rows that have a reference completion; None if there are none."""
    with_reference = [index for index, example in enumerate(examples) if example.has_reference]
    return _references(HELD_OUT, with_reference, examples) if with_reference else None


def _prompt_batch(step: int, indices: Sequence[int], chosen: Sequence[Example]) -> PromptBatch:
    return PromptBatch(
        step=step,
        indices=tuple(indices),
        row_ids=tuple(chosen[i].row_id for i in indices),
        prompts=TokenRows.from_rows([chosen[i].prompt_ids for i in indices]),
    )


def _references(step: int, indices: Sequence[int], chosen: Sequence[Example]) -> Samples:
    reason: FinishReason = "reference"
    return Samples(
        step=step,
        indices=tuple(indices),
        row_ids=tuple(chosen[i].row_id for i in indices),
        prompts=TokenRows.from_rows([chosen[i].prompt_ids for i in indices]),
        completions=TokenRows.from_rows([chosen[i].reference_ids for i in indices]),
        policy_versions=(REFERENCE_VERSION,) * len(indices),
        finish_reasons=(reason,) * len(indices),
    )
