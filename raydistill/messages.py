"""What travels between actors: frozen messages, checked when they are made.

Shape letters: B sequences, T tokens, N completion tokens (ragged rows, flattened in order), K teacher candidates,
V vocabulary. Arrays are numpy on the wire (Ray shares them without a copy, read-only); tensors live inside actors.
Each stage makes a new type; nothing is filled in later:

    PromptBatch -> Samples -> Scored -> StepOutcome          StudentWeights -> LoadReport
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

import numpy as np

FinishReason = Literal["stop", "length", "reference"]
REFERENCE_VERSION = -1
"""`policy_version` of a completion that no policy sampled: it comes from the data set."""


class ShapeError(AssertionError):
    """A message was built from arrays that do not belong together; our bug, never the user's."""


def check_shapes(message: object, dtypes: dict[str, type]) -> None:
    """Check dtypes and that every `_<LETTERS>` suffix means the same size in all arrays of one message."""
    sizes: dict[str, tuple[int, str]] = {}
    for spec in fields(message):  # type: ignore[arg-type]
        value = getattr(message, spec.name)
        if not isinstance(value, np.ndarray):
            continue
        letters = spec.name.rsplit("_", 1)[-1]
        if value.ndim != len(letters):
            raise ShapeError(f"{spec.name} should have {len(letters)} dimensions, it has shape {value.shape}")
        for letter, size in zip(letters, value.shape, strict=True):
            known, where = sizes.setdefault(letter, (size, spec.name))
            if known != size:
                raise ShapeError(f"{spec.name} has {letter}={size} but {where} has {letter}={known}")
        expected = dtypes.get(spec.name)
        if expected is not None and value.dtype != np.dtype(expected):
            raise ShapeError(f"{spec.name} should be {np.dtype(expected)}, it is {value.dtype}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRows:
    """B ragged rows of token ids, flattened."""

    ids_T: np.ndarray  # int32
    lengths_B: np.ndarray  # int32

    def __post_init__(self) -> None:
        check_shapes(self, {"ids_T": np.int32, "lengths_B": np.int32})
        if (self.lengths_B < 0).any():
            raise ShapeError(f"lengths_B has the negative length {int(self.lengths_B.min())}")
        if int(self.lengths_B.sum()) != self.ids_T.size:
            raise ShapeError(f"lengths_B sums to {int(self.lengths_B.sum())} but ids_T has {self.ids_T.size} tokens")

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[int] | np.ndarray]) -> TokenRows:
        """Flatten rows of ids; an empty row stays an empty row."""
        arrays = [np.asarray(row, dtype=np.int32) for row in rows]
        ids = np.concatenate(arrays) if arrays else np.zeros(0, np.int32)
        return cls(ids_T=ids.astype(np.int32, copy=False), lengths_B=np.array([a.size for a in arrays], np.int32))

    def rows(self) -> list[np.ndarray]:
        """The B rows as views."""
        return np.split(self.ids_T, np.cumsum(self.lengths_B)[:-1]) if len(self) else []

    def __len__(self) -> int:
        return int(self.lengths_B.size)

    @property
    def num_tokens(self) -> int:
        return int(self.ids_T.size)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptBatch:
    """B prompts to be answered in one optimizer step; `indices` is each one's place in that step."""

    step: int
    indices: tuple[int, ...]
    row_ids: tuple[str, ...]
    prompts: TokenRows

    def __post_init__(self) -> None:
        if not len(self.indices) == len(self.row_ids) == len(self.prompts):
            raise ShapeError(f"{len(self.indices)} indices, {len(self.row_ids)} ids, {len(self.prompts)} prompts")


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """B prompts with their completions: sampled by a policy, or references of the data set."""

    step: int
    indices: tuple[int, ...]
    row_ids: tuple[str, ...]
    prompts: TokenRows
    completions: TokenRows
    policy_versions: tuple[int, ...]  # optimizer steps applied to the weights that sampled; REFERENCE_VERSION if none
    finish_reasons: tuple[FinishReason, ...]

    def __post_init__(self) -> None:
        sizes = {len(self.indices), len(self.row_ids), len(self.prompts), len(self.completions)}
        sizes |= {len(self.policy_versions), len(self.finish_reasons)}
        if len(sizes) != 1:
            raise ShapeError(f"the parts of Samples disagree on B: {sorted(sizes)}")

    def __len__(self) -> int:
        return len(self.indices)

    def take(self, rows: Sequence[int]) -> Samples:
        """The same message with only the given rows (positions in this message)."""
        prompts, completions = self.prompts.rows(), self.completions.rows()
        return Samples(
            step=self.step,
            indices=tuple(self.indices[r] for r in rows),
            row_ids=tuple(self.row_ids[r] for r in rows),
            prompts=TokenRows.from_rows([prompts[r] for r in rows]),
            completions=TokenRows.from_rows([completions[r] for r in rows]),
            policy_versions=tuple(self.policy_versions[r] for r in rows),
            finish_reasons=tuple(self.finish_reasons[r] for r in rows),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherTopK:
    """The teacher's K most likely next tokens at each completion position, at the objective's temperature."""

    ids_NK: np.ndarray  # int32
    logprobs_NK: np.ndarray  # float32, nats, sorted high to low, softmax over the full vocabulary
    tail_logprob_N: np.ndarray  # float32, nats, log of the mass of all other tokens; -inf where K == V

    def __post_init__(self) -> None:
        check_shapes(self, {"ids_NK": np.int32, "logprobs_NK": np.float32, "tail_logprob_N": np.float32})

    @property
    def num_tokens(self) -> int:
        return int(self.tail_logprob_N.size)

    @property
    def is_finite(self) -> bool:
        """False if any answer is NaN or +inf; -inf is a legal log-probability of zero."""
        return not any(np.isnan(a).any() or np.isposinf(a).any() for a in (self.logprobs_NK, self.tail_logprob_N))


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherDense:
    """The teacher's log-probabilities over its whole vocabulary; for small vocabularies."""

    logprobs_NV: np.ndarray  # float32, nats

    def __post_init__(self) -> None:
        check_shapes(self, {"logprobs_NV": np.float32})

    @property
    def num_tokens(self) -> int:
        return int(self.logprobs_NV.shape[0])

    @property
    def is_finite(self) -> bool:
        return not bool(np.isnan(self.logprobs_NV).any() or np.isposinf(self.logprobs_NV).any())


TeacherTarget = TeacherTopK | TeacherDense


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """Samples with what the teacher said about each completion token (None: an objective without a teacher)."""

    samples: Samples
    target: TeacherTarget | None

    def __post_init__(self) -> None:
        if self.target is not None and self.target.num_tokens != self.samples.completions.num_tokens:
            raise ShapeError(
                f"the teacher answered {self.target.num_tokens} positions for "
                f"{self.samples.completions.num_tokens} completion tokens"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One actor busy with one piece of work, in seconds since the epoch."""

    stage: Literal["rollout", "teacher", "trainer", "wait", "sync", "evaluate"]
    actor: str
    step: int
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A number that knows its own reduction: the mean of many is sum(total) / sum(weight).

    Names are `room/what_unit`, for example `trainer/kl_nats`.
    """

    name: str
    total: float
    weight: float = 1.0

    @property
    def value(self) -> float:
        return self.total / self.weight if self.weight else float("nan")


def reduce_metrics(metrics: Sequence[Metric]) -> dict[str, float]:
    """Merge metrics of one name over actors and ranks, each by its own weight."""
    totals: dict[str, tuple[float, float]] = {}
    for m in metrics:
        total, weight = totals.get(m.name, (0.0, 0.0))
        totals[m.name] = (total + m.total, weight + m.weight)
    return {name: total / weight if weight else float("nan") for name, (total, weight) in totals.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class StageReport:
    """The small numbers that go to the driver in place of a rollout's or a teacher's tensors."""

    step: int
    num_sequences: int
    num_tokens: int  # completion tokens
    metrics: tuple[Metric, ...] = ()
    span: Span | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeAnswers:
    """Log-probs of the fixed probe sequences under one policy: what both sides of a sync are compared on."""

    logprobs_N: np.ndarray  # float32, nats, of each probe token given the ones before

    def __post_init__(self) -> None:
        check_shapes(self, {"logprobs_N": np.float32})


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentWeights:
    """One version of what travels from trainer to engines: the adapter's A and B (or all weights without an adapter).

    `version` = optimizer steps applied. Keys are "<module>.lora_A" / "<module>.lora_B" by Hugging Face module name, or
    plain parameter names for full-parameter training.
    """

    version: int
    tensors: dict[str, np.ndarray] = field(repr=False)
    probe: ProbeAnswers | None = field(repr=False)  # None: this sync is not checked

    @property
    def size_bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What an engine says after loading one version."""

    actor: str
    version: int
    weights_hash: str  # of the tensors it now holds
    codes_hash: str | None  # of the quantized codes it rebuilt; None where it was not asked or has none
    gap_mean_nats: float | None  # mean |engine - trainer| over the probe tokens
    gap_p99_nats: float | None
    size_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutcome:
    """What the trainer group says after one optimizer step."""

    step: int
    version: int  # of the weights after this step
    weights_hash: str
    codes_hash: str | None
    skipped: str | None  # why the update was not applied, None if it was
    metrics: dict[str, float]
    spans: tuple[Span, ...]
    stored: tuple[int, ...] = ()  # versions whose checkpoints run.storage took since the last outcome
    storage_problem: str | None = None  # why it did not take one


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What the evaluation actor says of an export that it wrote."""

    codes_hash: str
    files: dict[str, list[int | str]] = field(default_factory=dict)  # name -> [bytes, sha256], with run.storage
    storage_problem: str | None = None  # why run.storage did not take it


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    """Held-out quality of one policy version."""

    version: int
    metrics: dict[str, float]  # evaluate/kl_nats, evaluate/perplexity, evaluate/exact_match, ..._se
    span: Span
    stale_answers: int = 0  # held-out answers that other weights wrote; exact match is left out then
