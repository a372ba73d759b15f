"""A teacher's answers to rows of the data set, kept so that each distinct row costs one forward pass: over epochs, and over
all runs of a sweep. The least recently used go first when the limit is reached."""

from __future__ import annotations

from collections import OrderedDict
from hashlib import blake2b

import numpy as np

Answer = tuple[np.ndarray, ...]


class KeptAnswers:
    """Row -> arrays, up to `limit_bytes`; 0 keeps none."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes, self._size_bytes = limit_bytes, 0
        self._answers: OrderedDict[bytes, Answer] = OrderedDict()

    def get(self, key: bytes) -> Answer | None:
        """The kept answer, now the most recently used."""
        answer = self._answers.get(key)
        if answer is not None:
            self._answers.move_to_end(key)
        return answer

    def put(self, key: bytes, answer: Answer) -> None:
        """Keep an answer; arrays are copied, as a view would keep its whole batch in memory."""
        size = _size(answer)
        if key in self._answers or size > self._limit_bytes:
            return
        self._answers[key] = tuple(array.copy() for array in answer)
        self._size_bytes += size
        while self._size_bytes > self._limit_bytes:
            _, dropped = self._answers.popitem(last=False)
            self._size_bytes -= _size(dropped)

    def __len__(self) -> int:
        return len(self._answers)


def answer_key(request: object, prompt_ids: np.ndarray, completion_ids: np.ndarray) -> bytes:
    """What an answer depends on: the request and every token before and in the completion."""
    digest = blake2b(repr(request).encode(), digest_size=16)
    digest.update(f"{prompt_ids.size} {completion_ids.size}\n".encode())
    digest.update(prompt_ids.astype("<i4").tobytes() + completion_ids.astype("<i4").tobytes())
    return digest.digest()


def _size(answer: Answer) -> int:
    return sum(array.nbytes for array in answer)
