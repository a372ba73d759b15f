"""A teacher's answers to rows of the data set, kept so that each distinct row costs one forward pass: over epochs, and over
all runs of a sweep.

Runs go through the same rows again and again in the same order. With room for some of them only, the least recently used
is the one that comes back next: dropping it would give no hit at all. So what is there stays, and one new answer in four
takes the place of any; rows that do not come back (of another request, of other data) are gone after a few rounds.
"""

from __future__ import annotations

import random
from hashlib import blake2b

import numpy as np

Answer = tuple[np.ndarray, ...]
ADMITTED = 0.25  # of the new answers once there is no room


class KeptAnswers:
    """Row -> arrays, up to `limit_bytes`; 0 keeps none."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes, self._size_bytes = limit_bytes, 0
        self._answers: dict[bytes, Answer] = {}
        self._keys: list[bytes] = []  # in any order, to draw from
        self._draws = random.Random(0)

    def get(self, key: bytes) -> Answer | None:
        """The kept answer."""
        return self._answers.get(key)

    def put(self, key: bytes, answer: Answer) -> None:
        """Keep an answer, or not; arrays are copied, as a view would keep its whole batch in memory."""
        size = _size(answer)
        if key in self._answers or size > self._limit_bytes:
            return
        if self._size_bytes + size > self._limit_bytes and self._draws.random() >= ADMITTED:
            return
        while self._size_bytes + size > self._limit_bytes:
            self._drop_any()
        self._answers[key] = tuple(array.copy() for array in answer)
        self._keys.append(key)
        self._size_bytes += size

    def _drop_any(self) -> None:
        place = self._draws.randrange(len(self._keys))
        self._keys[place], self._keys[-1] = self._keys[-1], self._keys[place]
        self._size_bytes -= _size(self._answers.pop(self._keys.pop()))

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
