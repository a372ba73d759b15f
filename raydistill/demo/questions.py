"""Question and answer files ({"question", "answer"} per line, such as GSM8K) as chat rows in three splits."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from raydistill.demo.stories import SplitPaths, write_jsonl
from raydistill.errors import DataError

# One training question in fifteen becomes validation, chosen by a hash of its text: about 500 of GSM8K's 7,473.
VALIDATION_SHARE = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionAnswer:
    """One row of the source file."""

    question: str
    answer: str

    @property
    def is_validation(self) -> bool:
        digest = hashlib.sha256(self.question.encode()).digest()
        return int.from_bytes(digest[:4], "big") % VALIDATION_SHARE == 0

    def chat_row(self) -> dict[str, list[dict[str, str]]]:
        return {
            "messages": [
                {"role": "user", "content": self.question},
                {"role": "assistant", "content": self.answer},
            ]
        }


def load_questions(path: Path) -> list[QuestionAnswer]:
    """All rows of a file; a missing file or a malformed line is a `DataError` that says what to do."""
    if not path.is_file():
        raise DataError(
            f"no question file at {path}: it must hold one JSON object with 'question' and 'answer' per line. "
            f"For GSM8K fetch train.jsonl and test.jsonl of github.com/openai/grade-school-math and give their paths."
        )
    rows: list[QuestionAnswer] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                rows.append(_parse(line, f"{path} line {number}"))
    if not rows:
        raise DataError(f"{path} is empty: it must hold one JSON object with 'question' and 'answer' per line")
    return rows


def _parse(line: str, where: str) -> QuestionAnswer:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON ({error.msg}): write one object per line") from error
    question, answer = (row.get("question"), row.get("answer")) if isinstance(row, dict) else (None, None)
    if not (isinstance(question, str) and question.strip() and isinstance(answer, str) and answer.strip()):
        raise DataError(f"{where} needs the non-empty text fields 'question' and 'answer'")
    return QuestionAnswer(question=question, answer=answer)


def write_question_splits(folder: Path, train: list[QuestionAnswer], test: list[QuestionAnswer]) -> SplitPaths:
    """Writes train, validation and test files; a question of the test file is kept out of the other two."""
    paths = SplitPaths.inside(folder)
    held_out = {row.question for row in test}
    usable = [row for row in train if row.question not in held_out]
    write_jsonl(paths.train, (row.chat_row() for row in usable if not row.is_validation))
    write_jsonl(paths.validation, (row.chat_row() for row in usable if row.is_validation))
    write_jsonl(paths.test, (row.chat_row() for row in test))
    return paths
