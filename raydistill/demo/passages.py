"""Plain text files (WikiText-2, a book, notes) as rows: the first words of a passage ask, the words that follow answer."""

import re
from pathlib import Path

from raydistill.demo.questions import QuestionAnswer
from raydistill.errors import DataError

OPENING_WORDS = 24
PASSAGE_WORDS = 96  # opening and continuation
WORD = re.compile(r"\S+")


def load_passages(path: Path) -> list[QuestionAnswer]:
    """The passages of a UTF-8 text file with a paragraph in each line, in its order; equal openings stand once.

    A paragraph is cut after every `PASSAGE_WORDS` words; what is shorter than two openings (headings, ends of paragraphs) is
    left out. White space stays as it is; a continuation begins with that before its first word, as a language model's tokens
    do. Raises DataError for a file that cannot be read or holds no passage.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start}): is it compressed, or of another encoding?"
        ) from error
    except OSError as error:
        raise DataError(
            f"no text file at {path} ({error.strerror}): it must hold plain text, a paragraph per line"
        ) from error
    passages: dict[str, QuestionAnswer] = {}
    for paragraph in text.split("\n"):
        words = list(WORD.finditer(paragraph))
        for first in range(0, len(words), PASSAGE_WORDS):
            piece = words[first : first + PASSAGE_WORDS]
            if len(piece) < 2 * OPENING_WORDS:
                continue
            cut = piece[OPENING_WORDS - 1].end()
            opening, continuation = paragraph[piece[0].start() : cut], paragraph[cut : piece[-1].end()]
            passages.setdefault(opening, QuestionAnswer(question=opening, answer=continuation))
    if not passages:
        raise DataError(f"{path} holds no paragraph of {2 * OPENING_WORDS} words: write one paragraph per line")
    return list(passages.values())
