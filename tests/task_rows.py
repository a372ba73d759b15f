"""A few generated rows for lm-eval's tasks of every kind, in the files and columns that `--task-data` expects."""

import json
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from raydistill.demo.stories import generate_stories

CHOICES = (["4", "5", "6", "7"], ["8", "9", "3", "2"], ["11", "12", "13", "1"], ["6", "7", "8", "9"])


def write_task_data(folder: Path) -> Path:
    """Rows of hellaswag, arc_easy, arc_challenge, winogrande, two subjects of mmlu, gsm8k and wikitext."""
    stories = list(islice(generate_stories("test", 5), 12))
    questions = [{"question": story.prompt, "answer": story.answer} for story in stories]
    _write(folder, "gsm8k", {"train": questions[6:], "test": questions[:6]})
    arc = [
        {
            "question": story.prompt,
            "choices": {"text": choices, "label": ["A", "B", "C", "D"]},
            "answerKey": "ABCD"[number % 4],
        }
        for number, (story, choices) in enumerate(zip(stories, CHOICES * 2, strict=False))
    ]
    _write(folder, "arc_easy", {"test": arc, "train": arc[:2]})
    _write(folder, "arc_challenge", {"test": arc[2:]})
    swag = [
        {
            "activity_label": "Counting",
            "ctx_a": story.prompt,
            "ctx_b": "then",
            "endings": [f"the answer is {choice}." for choice in choices],
            "label": str(number % 4),
        }
        for number, (story, choices) in enumerate(zip(stories, CHOICES, strict=False))
    ]
    _write(folder, "hellaswag", {"validation": swag})
    grande = [
        {
            "sentence": f"{story.prompt} so _ has more.",
            "option1": "Ann",
            "option2": "Bob",
            "answer": str(1 + number % 2),
        }
        for number, story in enumerate(stories[:6])
    ]
    _write(folder, "winogrande", {"validation": grande})
    mmlu = [
        {"question": story.prompt, "choices": choices, "answer": number % 4}
        for number, (story, choices) in enumerate(zip(stories, CHOICES, strict=False))
    ]
    for subject in ("mmlu_anatomy", "mmlu_astronomy"):
        _write(folder, subject, {"test": mmlu, "dev": mmlu[:2]})
    pages = ["\n".join(f"{s.prompt} {s.answer}" for s in stories[first : first + 5]) for first in (0, 4)]
    _write(folder, "wikitext", {"test": [{"page": f" = Title = \n {page} \n"} for page in pages]})
    return folder


def _write(folder: Path, task: str, splits: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
    (folder / task).mkdir(parents=True)
    for split, rows in splits.items():
        (folder / task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
