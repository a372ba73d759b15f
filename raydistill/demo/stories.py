"""Arithmetic stories: short word problems whose answers can be checked exactly, made from a seed.

A story is a start sentence, one to three things that happen, and a question; the answer writes one sum per line and
ends with `#### n`. Which split a story belongs to is a property of its text (a hash of the prompt), so no held-out
problem can occur in training whatever the seeds. The same (split, count, seed) always gives the same rows.
"""

import hashlib
import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Split = Literal["train", "validation", "test"]

# Part of every cache key: raise it when the same seed would write other rows.
GENERATOR_VERSION = 1

LARGEST_START = 40
LARGEST_CHANGE = 40
LARGEST_TOTAL = 99  # two digits: enough carries to be hard for a 400k-parameter model, few enough to be learnt

NAMES: tuple[tuple[str, str], ...] = (
    ("Ada", "She"), ("Amir", "He"), ("Ben", "He"), ("Chloe", "She"), ("Diego", "He"), ("Emma", "She"),
    ("Finn", "He"), ("Grace", "She"), ("Hugo", "He"), ("Ines", "She"), ("Kenji", "He"), ("Leila", "She"),
    ("Mateo", "He"), ("Nina", "She"), ("Omar", "He"), ("Priya", "She"),
)  # fmt: skip
THINGS: tuple[str, ...] = (
    "apples", "beads", "books", "buttons", "candles", "cards", "coins", "cookies", "feathers", "flowers", "kites",
    "lemons", "marbles", "pencils", "postcards", "shells", "stamps", "stickers", "stones", "tickets",
)  # fmt: skip
CONTAINERS: tuple[str, ...] = ("bags", "boxes", "jars", "tins")

STARTS: tuple[str, ...] = (
    "{name} has {n} {things}.",
    "{name} starts the day with {n} {things}.",
    "{name} counts {n} {things}.",
    "{name} keeps {n} {things} in a drawer.",
)
ADDITIONS: tuple[str, ...] = (
    "{they} finds {n} more.",
    "{they} buys {n} {things}.",
    "{friend} brings {n} more {things}.",
    "Then {friend} gives {name} {n} more.",
)
SUBTRACTIONS: tuple[str, ...] = (
    "{they} gives {n} to {friend}.",
    "{they} loses {n} on a walk.",
    "{they} sells {n} {things}.",
    "Then {friend} borrows {n}.",
)
MULTIPLICATIONS: tuple[str, ...] = (
    "Then the number of {things} {times}.",
    "A week later the pile {times}.",
    "By magic the pile {times}.",
)
BAGS: tuple[str, ...] = (
    "{they} buys {k} {containers} of {m} {things}.",
    "{friend} brings {k} {containers} of {m}.",
)
QUESTIONS: tuple[str, ...] = (
    "How many {things} does {name} have now?",
    "How many {things} are there now?",
)
TIMES = {2: "doubles", 3: "triples"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """One problem and its worked answer."""

    prompt: str
    answer: str

    @property
    def split(self) -> Split:
        return split_of(self.prompt)

    def chat_row(self) -> dict[str, list[dict[str, str]]]:
        return {
            "messages": [
                {"role": "user", "content": self.prompt},
                {"role": "assistant", "content": self.answer},
            ]
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitPaths:
    """Where the three splits lie."""

    train: Path
    validation: Path
    test: Path

    @classmethod
    def inside(cls, folder: Path) -> "SplitPaths":
        return cls(train=folder / "train.jsonl", validation=folder / "validation.jsonl", test=folder / "test.jsonl")


def split_of(prompt: str) -> Split:
    """The split a prompt belongs to for ever: one tenth validation, one tenth test, by a hash of its text."""
    bucket = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big") % 10
    return "validation" if bucket == 0 else "test" if bucket == 1 else "train"


def generate_stories(split: Split, seed: int) -> Iterator[Story]:
    """Endless distinct stories of one split, the same for the same seed."""
    rng = random.Random(f"{split}-{seed}")
    seen: set[str] = set()
    while True:
        story = write_story(rng)
        if story.split == split and story.prompt not in seen:
            seen.add(story.prompt)
            yield story


def write_story(rng: random.Random) -> Story:
    """One story: a start, one to three events that keep the total within 1..99, a question."""
    (name, they), (friend, _) = rng.sample(NAMES, 2)
    words: dict[str, str | int] = {"name": name, "they": they, "friend": friend, "things": rng.choice(THINGS)}
    total = rng.randint(2, LARGEST_START)
    sentences = [rng.choice(STARTS).format(n=total, **words)]
    chain: list[str] = []
    for _ in range(rng.randint(1, 3)):
        sentence, lines, total = _write_event(rng, total, words)
        sentences.append(sentence)
        chain += lines
    sentences.append(rng.choice(QUESTIONS).format(**words))
    return Story(prompt=" ".join(sentences), answer="\n".join([*chain, f"#### {total}"]))


def _write_event(rng: random.Random, total: int, words: dict[str, str | int]) -> tuple[str, list[str], int]:
    """One event that the total allows: its sentence, its lines of the answer, the total after it."""
    kinds = ["subtract"] * (total > 1) + ["add"] * (total < LARGEST_TOTAL)
    kinds += ["multiply"] * (2 * total <= LARGEST_TOTAL) + ["bags"] * (total + 4 <= LARGEST_TOTAL)
    kind = rng.choice(kinds)
    if kind == "add":
        n = rng.randint(1, min(LARGEST_CHANGE, LARGEST_TOTAL - total))
        return rng.choice(ADDITIONS).format(n=n, **words), [f"{total}+{n}={total + n}"], total + n
    if kind == "subtract":
        n = rng.randint(1, min(LARGEST_CHANGE, total - 1))
        return rng.choice(SUBTRACTIONS).format(n=n, **words), [f"{total}-{n}={total - n}"], total - n
    if kind == "multiply":
        factor = rng.choice([factor for factor in TIMES if factor * total <= LARGEST_TOTAL])
        sentence = rng.choice(MULTIPLICATIONS).format(times=TIMES[factor], **words)
        return sentence, [f"{total}*{factor}={total * factor}"], total * factor
    room = min(LARGEST_CHANGE, LARGEST_TOTAL - total)
    k, m = rng.choice([(k, m) for k in range(2, 7) for m in range(2, 10) if k * m <= room])
    sentence = rng.choice(BAGS).format(k=k, m=m, containers=rng.choice(CONTAINERS), **words)
    return sentence, [f"{k}*{m}={k * m}", f"{total}+{k * m}={total + k * m}"], total + k * m


def write_splits(
    folder: Path, num_train: int = 40_000, num_validation: int = 512, num_test: int = 512, seed: int = 0
) -> SplitPaths:
    """Writes train.jsonl, validation.jsonl and test.jsonl of chat rows; each file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = SplitPaths.inside(folder)
    wanted: list[tuple[Split, Path, int]] = [
        ("train", paths.train, num_train),
        ("validation", paths.validation, num_validation),
        ("test", paths.test, num_test),
    ]
    for split, path, count in wanted:
        stories = generate_stories(split, seed)
        write_jsonl(path, (next(stories).chat_row() for _ in range(count)))
    return paths


def write_jsonl(path: Path, rows: Iterator[dict[str, list[dict[str, str]]]]) -> None:
    """One JSON object per line, under a temporary name until complete."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as lines:
        for row in rows:
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(partial, path)
