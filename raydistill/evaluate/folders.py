"""The comparison table of finished models, each loaded from its folder exactly as it would be shipped.

One model is loaded after the other beside the teacher; nothing is taken on trust, the teacher's own row included. What
needs the whole distribution (KL, perplexity of the rows) is computed by transformers; every other measurement by the engine
that is asked for.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from raydistill.data.encode import Example, num_known_ids
from raydistill.errors import UserError
from raydistill.evaluate.answerers import Answerer, HfAnswerer
from raydistill.evaluate.final_numbers import FinalNumbers
from raydistill.evaluate.held_out import RowScores, TeacherAnswers, answer_held_out, score_alone, score_rows
from raydistill.evaluate.loading import Loader, format_of, load_teacher, role_of
from raydistill.evaluate.measured import Measured, Measurement, share
from raydistill.evaluate.paired import CROSS_ENTROPY, EXACT_MATCH, KL, RowValues
from raydistill.evaluate.targets import Target
from raydistill.evaluate.vocabulary import check_vocabulary, positions_of
from raydistill.models import eos_ids
from raydistill.results.tables import SummaryRow
from raydistill.tensors import CompletionModel

__all__ = ["EngineName", "ExactMatch", "Progress", "Target", "evaluate_folders"]
ExactMatch = Literal["off", "final_number"]
EngineName = Literal["hf", "vllm"]
Progress = Callable[[str, int, int], None]
"""Told (what is done now, rows done, rows in all); a row counts once for every pass over it."""
OnRows = Callable[[str, Mapping[str, RowValues]], None]
"""Given a target's name and its scores row by row, by measure."""


def evaluate_folders(
    targets: Sequence[Target],
    teacher: Path | None,
    examples: Sequence[Example],
    tokenizer: Any,
    exact_match: ExactMatch = "off",
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    progress: Progress | None = None,
    on_rows: OnRows | None = None,
    *,
    measurements: Sequence[Measurement] = (),
    engine: EngineName = "hf",
) -> list[SummaryRow]:
    """The teacher's row, then one for each target in order, all on the completions of `examples` that have one, and by the
    other measurements.

    teacher: None where there is none: no row of its own, no KL. tokenizer: the one that encoded the examples. temperature:
    softens both sides of the KL, not perplexity. A target that is the teacher's own folder gives its name to the teacher's
    row. UserError where another target is called as that row is, ModelError where a target's token ids mean something else;
    checked for all before one is loaded.
    """
    answered = [example for example in examples if example.has_reference]
    everyone = _in_rows(targets, teacher)
    for target in everyone:
        check_vocabulary(target, tokenizer, answered)
    asked = [*measurements]
    if exact_match == "final_number":
        asked.insert(0, FinalNumbers(answered, tokenizer, max_new_tokens))
    passes = [len(answered)] * (len(everyone) + (teacher is not None)) if answered else []
    passes += [measurement.num_sequences for measurement in asked] * len(everyone)
    say = _Counter(progress, sum(passes))

    comparison = _Comparison(everyone, teacher, answered, tokenizer, temperature, asked, say)
    if answered or engine == "hf":
        comparison.with_transformers(asked if engine == "hf" else ())
    if asked and engine == "vllm":
        comparison.with_vllm()
    table = comparison.rows(on_rows)
    say.finish()
    return table


def _in_rows(targets: Sequence[Target], teacher: Path | None) -> list[Target]:
    """The teacher first, under the name of the target that is its folder, if there is one. UserError if another target
    has the name that is then left for it: one would take the other's place."""
    if teacher is None:
        return list(targets)
    named = next((target for target in targets if _is_teacher(target, teacher)), None)
    first = Target(named.name if named else "teacher", teacher, "teacher")
    others = [target for target in targets if target is not named]
    if same := next((target for target in others if target.name == first.name), None):
        folder = same.checkpoint or same.adapter or same.folder
        raise UserError(
            f"the target {folder} is called {same.name!r}, as is the row of the teacher {teacher}; name it apart, as in "
            f"first={folder}"
        )
    return [first, *others]


def _is_teacher(target: Target, teacher: Path) -> bool:
    is_plain = target.adapter is None and target.checkpoint is None
    return is_plain and target.folder.resolve() == teacher.resolve()


@dataclass(slots=True)
class _Finding:
    """What is known about one target so far."""

    score: RowScores | None = None
    measured: list[Measured] = field(default_factory=list)

    @property
    def values(self) -> dict[str, RowValues]:
        found = self.score.values() if self.score is not None else {}
        for measured in self.measured:
            found |= measured.rows
        return found


class _Comparison:
    """The targets, in the order of their rows, and what was found about each."""

    def __init__(
        self,
        targets: Sequence[Target],
        teacher: Path | None,
        examples: Sequence[Example],
        tokenizer: Any,
        temperature: float,
        measurements: Sequence[Measurement],
        say: _Counter,
    ) -> None:
        self._targets, self._teacher, self._examples = targets, teacher, examples
        self._tokenizer, self._temperature, self._say = tokenizer, temperature, say
        self._measurements = measurements
        self._found = {target.name: _Finding() for target in targets}
        self._loader = Loader()

    def with_transformers(self, measurements: Sequence[Measurement]) -> None:
        """Score the examples and take the measurements; a loaded student lives no longer than its turn, so at most one
        stands beside the teacher."""
        answers, others = None, list(self._targets)
        if self._teacher is not None:
            first = others.pop(0)
            model = load_teacher(first.folder, {target.folder for target in others})
            if self._examples:
                self._say.begin(f"{first.name}: answering the rows", len(self._examples))
                known = num_known_ids(self._tokenizer)
                answers = answer_held_out(CompletionModel(model), self._examples, num_ids=known)
            self._turn(first, model, answers, measurements)
            del model
        for target in others:
            self._turn(target, self._loader.load(target), answers, measurements)

    def _turn(
        self, target: Target, model: nn.Module, answers: TeacherAnswers | None, measurements: Sequence[Measurement]
    ) -> None:
        finding = self._found[target.name]
        if self._examples:
            what = "KL to the teacher and perplexity" if answers else "perplexity"
            self._say.begin(f"{target.name}: {what}", len(self._examples))
            student = CompletionModel(model)
            finding.score = (
                score_rows(student, answers, self._temperature) if answers else score_alone(student, self._examples)
            )
        answerer = HfAnswerer(
            model, self._tokenizer, eos_ids(target.folder, self._tokenizer), positions_of(target.folder)
        )
        finding.measured += self._take(target, answerer, measurements)

    def with_vllm(self) -> None:
        """Take the measurements, with one engine start for all that lies over one base."""
        from raydistill.evaluate.vllm_answerer import engine_groups, engine_process

        self._loader.release()  # the engine takes most of a device
        gc.collect()
        torch.cuda.empty_cache()
        longest = max(measurement.max_tokens for measurement in self._measurements)
        groups = engine_groups(self._targets, self._tokenizer, longest)
        with engine_process() as process:
            for group in groups:
                self._say.about(f"starting vLLM on {group.base.model} for {', '.join(t.name for t in group.targets)}")
                with process.engine(group) as engine:
                    for target in group.targets:
                        engine.select(target)
                        self._found[target.name].measured += self._take(target, engine, self._measurements)

    def _take(self, target: Target, model: Answerer, measurements: Sequence[Measurement]) -> list[Measured]:
        found = []
        for measurement in measurements:
            self._say.begin(f"{target.name}: {measurement.what}", measurement.num_sequences)
            found.append(measurement.measure(model, self._say.within))
        return found

    def rows(self, on_rows: OnRows | None) -> list[SummaryRow]:
        """The table."""
        if on_rows is not None:
            for target in self._targets:
                on_rows(target.name, self._found[target.name].values)
        return [self._row(target, self._found[target.name]) for target in self._targets]

    def _row(self, target: Target, finding: _Finding) -> SummaryRow:
        values = finding.values
        kl, text, match = (values.get(measure) for measure in (KL, CROSS_ENTROPY, EXACT_MATCH))
        perplexity, perplexity_se = text.perplexity if text else (None, None)
        return SummaryRow(
            name=target.name,
            role=role_of(target),
            kl_nats=kl.mean if kl else None,
            kl_se=kl.standard_error if kl else None,
            bytes=self._loader.size(target),
            perplexity=perplexity,
            perplexity_se=perplexity_se,
            exact_match=match.mean if match else None,
            exact_match_se=share(match)["se"] if match else None,
            num_rows=match.values_R.size if match else None,
            extras={"format": format_of(target)},
            measures={name: value for measured in finding.measured for name, value in measured.measures.items()},
        )


class _Counter:
    """Turns passes over rows into one count for a progress bar."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total = progress, max(1, total)
        self._what, self._before, self._size = "", 0, 0

    def begin(self, what: str, size: int) -> None:
        """A new pass over `size` rows; the ones before it are done."""
        self._before, self._size = self._before + self._size, size
        self.about(what)

    def about(self, what: str) -> None:
        """Something that moves no bar."""
        self._what = what
        self.within(0)

    def within(self, done: int) -> None:
        """`done` rows of the current pass are done."""
        if self._progress is not None:
            self._progress(self._what, self._before + done, self._total)

    def finish(self) -> None:
        """All of them."""
        self.within(self._size)
