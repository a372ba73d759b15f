"""Importing big libraries without the optional packages that they load on the way and that we never use through them.

Most of the time that it takes to start a process, or to replace a lost one, goes into imports (docs/measurements.md, "The
code").
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

UNUSED_BY_MODELS = (
    "sklearn",  # one curve of assisted decoding
    "scipy",  # losses of object detection
    "boto3",  # Accelerate's questions about SageMaker
    "chardet",  # requests has another one
)


@contextmanager
def without(*packages: str) -> Iterator[None]:
    """What is imported inside sees these packages as not installed; afterwards they can be imported as ever.

    A package that is loaded already stays as it is. Only for packages that the imported library treats as optional. Garbage
    collection rests inside: what is imported stays, and to look through it again and again is a seventh of the time.
    """
    collects = gc.isenabled()
    gc.disable()
    hidden = [name for name in packages if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # the import system's own sign for "is not there"
    _forget_answers(hidden)
    try:
        yield
    finally:
        for name in hidden:
            if sys.modules.get(name, name) is None:
                del sys.modules[name]
        if collects:
            gc.enable()


def _forget_answers(packages: Iterable[str]) -> None:
    """transformers remembers whether a package is there: what it was told before would hold inside, where it is not."""
    told = sys.modules.get("transformers.utils.import_utils")
    for name in packages:
        if (answer := getattr(told, f"is_{name}_available", None)) is not None:
            answer.cache_clear()
