"""Builds an embedded world once and finds it again: a teacher and train, validation and test files in one folder.

    folder/teacher/  train.jsonl  validation.jsonl  test.jsonl  world.json

`world.json` names the fingerprint of everything the world depends on. A folder with the wanted fingerprint is used
as it is; any other world there is replaced. Building happens beside the folder, which appears by one rename, so a
world that exists is complete. One process builds at a time; a second one waits and then finds it.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console

from raydistill.demo.pretrain import Progress, TeacherRecipe, TeacherReport, train_language_model
from raydistill.demo.progress import announce, shown
from raydistill.demo.questions import load_questions, write_question_splits
from raydistill.demo.stories import GENERATOR_VERSION, SplitPaths, write_splits
from raydistill.demo.tokenizer import Message, encode_chats, train_tokenizer
from raydistill.errors import UserError

# Part of every fingerprint: raise it when the same recipe would train another teacher.
TRAINING_VERSION = 1
TOKENIZER_ROWS = 4_000  # enough to see every word of the stories; keeps tokenizer training below a second

STORIES_RECIPE = TeacherRecipe()
# About one pass over GSM8K's training questions: language enough for perplexity and KL, far from solving problems.
QUESTIONS_RECIPE = TeacherRecipe(
    hidden_size=128,
    num_layers=4,
    mlp_size=384,
    vocab_size=2048,
    num_steps=400,
    batch_size=16,
    warmup_steps=40,
    loss_on="all",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What a demo run needs: a teacher and three files of chat rows."""

    teacher_folder: Path
    train_path: Path
    validation_path: Path
    test_path: Path
    cached: bool
    report: TeacherReport = field(repr=False)  # of the training, also when cached


def prepare_stories(
    folder: Path,
    recipe: TeacherRecipe = STORIES_RECIPE,
    num_train: int = 40_000,
    num_validation: int = 512,
    num_test: int = 512,
    seed: int = 0,
    console: Console | None = None,
    progress: Progress | None = None,
) -> World:
    """The arithmetic-stories world in `folder`, built unless it is already there."""
    sizes = {"train": num_train, "validation": num_validation, "test": num_test}
    fingerprint = fingerprint_of(kind="stories", recipe=recipe, data={"version": GENERATOR_VERSION, "seed": seed} | sizes)

    def write(inside: Path) -> None:
        announce(console, f"Writing {num_train:,} arithmetic stories")
        write_splits(inside, num_train, num_validation, num_test, seed)

    return _prepare(folder, recipe, fingerprint, write, console, progress)


def prepare_question_answers(
    folder: Path,
    train_jsonl: Path,
    test_jsonl: Path,
    recipe: TeacherRecipe = QUESTIONS_RECIPE,
    console: Console | None = None,
    progress: Progress | None = None,
) -> World:
    """A world of {question, answer} rows such as GSM8K: a small language model of that text as the teacher."""
    train, test = load_questions(train_jsonl), load_questions(test_jsonl)
    hashes = {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in ()}
    fingerprint = fingerprint_of(kind="questions", recipe=recipe, data=hashes)
    return _prepare(folder, recipe, fingerprint, lambda inside: write_question_splits(inside, train, test), console, progress)


def _prepare(
    folder: Path,
    recipe: TeacherRecipe,
    fingerprint: str,
    write: Callable[[Path], object],
    console: Console | None,
    progress: Progress | None,
) -> World:
    folder = Path(folder)
    with _one_builder(folder):
        if (world := find_world(folder, fingerprint)) is not None:
            announce(console, f"Using the world in {folder}")
            return world
        _refuse_foreign(folder)
        building = folder.with_name(folder.name + ".building")
        shutil.rmtree(building, ignore_errors=True)  # what a killed builder left
        building.mkdir()
        write(building)
        report = _train_teacher(building, recipe, console, progress)
        note = {"fingerprint": fingerprint, "recipe": asdict(recipe), "report": asdict(report)}
        (building / "world.json").write_text(json.dumps(note, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(building, folder)
    world = find_world(folder, fingerprint)
    assert world is not None
    return World(**{name: getattr(world, name) for name in World.__slots__} | {"cached": False})
