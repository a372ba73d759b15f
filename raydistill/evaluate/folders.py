"""The comparison table of finished models, each loaded from its folder exactly as it would be shipped.

One model is loaded after the other beside the teacher; nothing is taken on trust, the teacher's own row included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

from torch import nn
from transformers import AutoConfig, AutoTokenizer

from raydistill.data.encode import Example, num_known_ids
from raydistill.errors import ModelError
from raydistill.evaluate.generate import MatchScore, require_final_numbers, score_exact_match
from raydistill.evaluate.held_out import RowScores, answer_held_out, score_rows
from raydistill.evaluate.paired import EXACT_MATCH, KL, RowValues
from raydistill.evaluate.targets import Target
from raydistill.models import default_device, eos_ids
from raydistill.quant.export import MANIFEST, load_exported, packed_bytes, read_manifest
from raydistill.results.tables import Role, SummaryRow
from raydistill.tensors import CompletionModel

__all__ = ["ExactMatch", "Progress", "Target", "evaluate_folders", "has_tokenizer"]
ExactMatch = Literal["off", "final_number"]
Progress = Callable[[str, int, int], None]
"""Told (what is done now, rows done, rows in all); a row counts once for every pass over it."""
OnRows = Callable[[str, Mapping[str, RowValues]], None]
"""Given a target's name and its scores row by row, by measure."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def evaluate_folders(
    targets: Sequence[Target],
    teacher: Path,
    examples: Sequence[Example],
    tokenizer: Any,
    exact_match: ExactMatch = "off",
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    progress: Progress | None = None,
    on_rows: OnRows | None = None,
) -> list[SummaryRow]:
    """The teacher's row, then one for each target in order, all on the completions of `examples` that have one.

    tokenizer: the one that encoded the examples. temperature: softens both sides of the KL, not perplexity.
    A target that is the teacher's own folder gives its name to the teacher's row. ModelError where a target's token
    ids mean something else; checked for all before one is loaded.
    """
    answered = [example for example in examples if example.has_reference]
    named = next((target for target in targets if target.folder.resolve() == teacher.resolve()), None)
    others = [target for target in targets if target is not named]
    first = Target(named.name if named else "teacher", teacher, "teacher")
    for target in (first, *others):
        check_vocabulary(target, tokenizer, answered)
    if exact_match == "final_number":
        require_final_numbers(answered, tokenizer)

    passes = 2 if exact_match == "final_number" else 1
    say = _RowCounter(progress, len(answered), 1 + passes * (1 + len(others)))
    say.begin(f"{first.name}: answering the rows")
    teacher_model = _load(first)
    answers = answer_held_out(CompletionModel(teacher_model), answered, num_ids=num_known_ids(tokenizer))

    def measure(target: Target, model: nn.Module) -> SummaryRow:
        say.begin(f"{target.name}: KL to the teacher and perplexity")
        score = score_rows(CompletionModel(model), answers, temperature)
        match = None
        if exact_match == "final_number":
            stop_ids = eos_ids(target.folder, tokenizer)
            say.begin(f"{target.name}: greedy answers")
            match = score_exact_match(model, answered, tokenizer, stop_ids, max_new_tokens, say.within)
        values = score.values()
        if match is not None:
            values[EXACT_MATCH] = match.values(score.row_ids)
        if on_rows is not None:
            on_rows(target.name, values)
        return _summary(target, score, match)

    # A loaded student lives no longer than its call, so at most one stands beside the teacher.
    table = [measure(first, teacher_model), *(measure(target, _load(target)) for target in others)]
    say.within(len(answered))
    return table


class _RowCounter:
    """Turns passes over the same rows into one count for a progress bar."""

    def __init__(self, progress: Progress | None, num_rows: int, passes: int) -> None:
        self._progress, self._num_rows, self._total = progress, num_rows, num_rows * passes
        self._what, self._begun = "", 0

    def begin(self, what: str) -> None:
        """A new pass; the ones before it are done."""
        self._what, self._begun = what, self._begun + 1
        self.within(0)

    def within(self, done: int) -> None:
        """`done` rows of the current pass are done."""
        if self._progress is not None:
            self._progress(self._what, (self._begun - 1) * self._num_rows + done, self._total)


def check_vocabulary(target: Target, tokenizer: Any, examples: Sequence[Example]) -> None:
    """ModelError unless the model's ids are those of `tokenizer`. Ids that only one side has are padding."""
    size = int(AutoConfig.from_pretrained(target.folder).get_text_config().vocab_size)
    largest = max((int(max(e.prompt_ids.max(), e.reference_ids.max())) for e in examples), default=-1)
    if largest >= size:
        raise ModelError(
            f"{target.name} ({target.folder}) has a vocabulary of {size:,}, but the rows use id {largest:,}. "
            "Choose models that share a tokenizer"
        )
    if not has_tokenizer(target.folder):
        return
    mine = {i: token for token, i in AutoTokenizer.from_pretrained(target.folder).get_vocab().items()}
    theirs = {i: token for token, i in tokenizer.get_vocab().items()}
    shared = mine.keys() & theirs.keys()
    wrong = sorted(i for i in shared if mine[i] != theirs[i])
    if wrong or not shared:
        where = f", first at id {wrong[0]}: {theirs[wrong[0]]!r} vs {mine[wrong[0]]!r}" if wrong else ""
        raise ModelError(
            f"the rows' tokenizer and {target.name} ({target.folder}) disagree on {len(wrong):,} of {len(shared):,} "
            f"token ids{where}. Choose models that share a tokenizer"
        )


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder says what its token ids mean."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def role_of(folder: Path) -> Role:
    """What an export says about itself in raydistill.json (`extra.role`), else "student"; a plain folder: "control"."""
    if not (folder / MANIFEST).is_file():
        return "control"
    role = read_manifest(folder).get("extra", {}).get("role", "student")
    return cast(Role, role) if role in get_args(Role) else "student"


def format_of(folder: Path) -> str:
    """The name of the weight format of a folder, or "none"."""
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else {"format": None}
    return str(manifest["format"]["name"]) if manifest["format"] else "none"


def _load(target: Target) -> nn.Module:
    model = load_exported(target.folder).to(default_device())
    CompletionModel(model).check_head(f"{target.name} ({target.folder})")
    return model


def _summary(target: Target, score: RowScores, match: MatchScore | None) -> SummaryRow:
    return SummaryRow(
        name=target.name,
        role=target.role or role_of(target.folder),
        kl_nats=score.total.kl_nats,
        kl_se=score.values()[KL].standard_error,
        bytes=packed_bytes(target.folder),
        perplexity=score.total.perplexity,
        exact_match=match.share if match else None,
        exact_match_se=match.standard_error if match else None,
        num_rows=match.num_rows if match else None,
        extras={"format": format_of(target.folder)},
    )
