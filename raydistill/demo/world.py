"""Builds an embedded world once and finds it again: a teacher and train, validation and test files in one folder.

    folder/teacher/  train.jsonl  validation.jsonl  test.jsonl  world.json

`world.json` names the fingerprint of everything the world depends on. A folder with the wanted fingerprint is used
as it is; any other world there is replaced. Building happens beside the folder, which appears by one rename, so a
world that exists is complete. One process builds at a time; a second one waits and then finds it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from filelock import FileLock
from rich.console import Console

from raydistill.demo.passages import load_passages
from raydistill.demo.pretrain import TeacherRecipe, TeacherReport, train_language_model
from raydistill.demo.progress import StepProgress, announce, training_progress
from raydistill.demo.questions import QuestionAnswer, load_questions, write_question_splits
from raydistill.demo.stories import GENERATOR_VERSION, SplitPaths, write_splits
from raydistill.demo.tokenizer import Message, encode_chats, train_tokenizer
from raydistill.errors import UserError

# Part of every fingerprint: raise it when the same recipe would train another teacher.
TRAINING_VERSION = 1
NOTE = "world.json"
TOKENIZER_ROWS = 4_000  # enough to see every word of the stories; keeps tokenizer training below a second

STORIES_RECIPE = TeacherRecipe()
# Real text, such as GSM8K (about one pass): language enough for perplexity and KL, far from solving problems.
LANGUAGE_RECIPE = TeacherRecipe(
    hidden_size=128,
    num_layers=4,
    mlp_size=384,
    rope_theta=10_000.0,
    vocab_size=2048,
    num_steps=400,
    batch_size=16,
    warmup_steps=40,
    loss_on="all",
)

TextWorld = Literal["question_answers", "text"]
LOADERS: Mapping[TextWorld, Callable[[Path], list[QuestionAnswer]]] = {
    "question_answers": load_questions,
    "text": load_passages,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What a demo run needs: a teacher and three files of chat rows."""

    teacher_folder: Path
    train_path: Path
    validation_path: Path
    test_path: Path
    cached: bool
    report: TeacherReport  # of the training, also when cached


def prepare_stories(
    folder: Path,
    recipe: TeacherRecipe = STORIES_RECIPE,
    num_train: int = 40_000,
    num_validation: int = 512,
    num_test: int = 512,
    seed: int = 0,
    console: Console | None = None,
    progress: StepProgress | None = None,
) -> World:
    """The arithmetic-stories world in `folder`, built unless it is already there."""
    sizes = {"train": num_train, "validation": num_validation, "test": num_test}
    fingerprint = fingerprint_of("stories", recipe, {"version": GENERATOR_VERSION, "seed": seed, **sizes})

    def write(inside: Path) -> None:
        announce(console, f"Writing {num_train:,} arithmetic stories")
        write_splits(inside, num_train, num_validation, num_test, seed)

    return _prepare(folder, recipe, fingerprint, write, console, progress)


def prepare_text(
    name: TextWorld,
    folder: Path,
    train_path: Path,
    test_path: Path,
    recipe: TeacherRecipe = LANGUAGE_RECIPE,
    console: Console | None = None,
    progress: StepProgress | None = None,
) -> World:
    """A world of the user's own text in `folder`: a small language model of it as the teacher, built unless already there.

    name: "question_answers" for JSONL rows {question, answer} such as GSM8K, "text" for plain text such as WikiText-2, whose
    passages are continued.
    """
    files, load = [Path(train_path), Path(test_path)], LOADERS[name]
    train, test = (load(path) for path in files)
    data = {"sha256": [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]}

    def write(inside: Path) -> None:
        announce(console, f"Writing {len(train):,} rows of {name}")
        write_question_splits(inside, train, test)

    return _prepare(folder, recipe, fingerprint_of(name, recipe, data), write, console, progress)


def _prepare(
    folder: Path,
    recipe: TeacherRecipe,
    fingerprint: str,
    write: Callable[[Path], object],
    console: Console | None,
    progress: StepProgress | None,
) -> World:
    folder = Path(folder).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if (world := find_world(folder, fingerprint)) is not None:
            announce(console, f"Using the world in {folder}")
            return world
        _refuse_foreign(folder)
        building = folder.with_name(f".{folder.name}.building")
        shutil.rmtree(building, ignore_errors=True)  # what a killed builder left
        building.mkdir()
        write(building)
        report = _train_teacher(building, recipe, console, progress)
        note = {"fingerprint": fingerprint, "recipe": asdict(recipe), "report": asdict(report)}
        (building / NOTE).write_text(json.dumps(note, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(building, folder)
        return _world_in(folder, report, cached=False)


def _train_teacher(
    folder: Path, recipe: TeacherRecipe, console: Console | None, progress: StepProgress | None
) -> TeacherReport:
    """Trains tokenizer and model on the folder's train file."""
    needed = recipe.num_steps * recipe.batch_size  # tokenise no row that training never reaches
    with SplitPaths.inside(folder).train.open(encoding="utf-8") as lines:
        chats: list[list[Message]] = [json.loads(line)["messages"] for line in islice(lines, needed)]
    texts = [message["content"] for chat in chats[:TOKENIZER_ROWS] for message in chat]
    tokenizer = train_tokenizer(texts, recipe.vocab_size, recipe.max_length)
    rows = encode_chats(tokenizer, chats)
    with training_progress(console, recipe.num_steps, progress) as after_step:
        report = train_language_model(rows, recipe, folder / "teacher", tokenizer, after_step)
    announce(
        console,
        f"Teacher: {report.num_parameters:,} parameters, {report.num_steps} steps in {report.wall_s:.0f} s, "
        f"loss {report.final_loss_nats:.3f} nats",
    )
    return report


def fingerprint_of(kind: str, recipe: TeacherRecipe, data: Mapping[str, object]) -> str:
    """Changes whenever another world would come out."""
    parts = {"kind": kind, "training": TRAINING_VERSION, "recipe": asdict(recipe), "data": data}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def find_world(folder: Path, fingerprint: str) -> World | None:
    """The world in `folder`, if it is the wanted one and all its parts are there."""
    try:
        note = json.loads((folder / NOTE).read_text())
        world = _world_in(folder, TeacherReport(**note["report"]), cached=True)
    except (OSError, ValueError, KeyError, TypeError):  # absent, or damaged: build it again
        return None
    parts = [world.teacher_folder / "config.json", world.train_path, world.validation_path, world.test_path]
    return world if note["fingerprint"] == fingerprint and all(part.exists() for part in parts) else None


def _world_in(folder: Path, report: TeacherReport, cached: bool) -> World:
    paths = SplitPaths.inside(folder)
    return World(
        teacher_folder=folder / "teacher",
        train_path=paths.train,
        validation_path=paths.validation,
        test_path=paths.test,
        cached=cached,
        report=report,
    )


def _refuse_foreign(folder: Path) -> None:
    """Never delete what is not part of a world."""
    parts = {"teacher", "train.jsonl", "validation.jsonl", "test.jsonl", NOTE}
    foreign = [path.name for path in folder.iterdir() if path.name not in parts] if folder.is_dir() else []
    if foreign or (folder.exists() and not folder.is_dir()):
        raise UserError(
            f"{folder} holds things that are no part of a world ({', '.join(sorted(foreign)[:3]) or 'a file'}) and "
            f"building one would replace them: choose another folder or move them away"
        )
