"""Importing big libraries without what they load or look up on the way and that we never use through them.

Most of the time that it takes to start a process, or to replace a lost one, goes into imports (docs/measurements.md, "The
code"). `without` hides optional packages, `quick_transformers` spares transformers two surveys.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, cached_property
from importlib import metadata
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

UNUSED_BY_MODELS = (
    "sklearn",  # one curve of assisted decoding
    "scipy",  # losses of object detection
    "boto3",  # Accelerate's questions about SageMaker
    "chardet",  # requests has another one
)
UNUSED_BY_VLLM = ("scipy", "chardet")  # scipy: the sound of multimodal models
SURVEYOR = "transformers.utils.import_utils"


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


@contextmanager
def quick_transformers() -> Iterator[None]:
    """The first import of transformers inside takes a third less processor time; what it finds out is the same.

    It asks all installed distributions for their packages, and reads all files of its hundreds of model folders twice for
    the names they offer. Inside, the first is left until a package's distribution has another name than the package, and
    the second done once, with a look at the ends of the files.
    """
    finder = _Surveyor()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _Surveyor(MetaPathFinder, Loader):
    """Loads transformers' module of surveys as Python does, and changes it before it is used."""

    _python: Loader

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path) if fullname == SURVEYOR else None
        if spec is not None and spec.loader is not None:
            self._python, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._python.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:  # who asks later sees Python's own loader
            module.__spec__.loader = module.__loader__ = self._python
        survey = metadata.packages_distributions
        metadata.packages_distributions = lambda: Packages(survey)  # type: ignore[assignment,return-value]
        try:
            self._python.exec_module(module)
        finally:
            metadata.packages_distributions = survey
        lighten(module)


class Packages(Mapping[str, list[str]]):
    """package -> the names of the distributions that hold it; the survey is made at the first look."""

    def __init__(self, survey: Callable[[], Mapping[str, list[str]]]) -> None:
        self._survey = survey

    @cached_property
    def _known(self) -> Mapping[str, list[str]]:
        return self._survey()

    def __getitem__(self, package: str) -> list[str]:
        return self._known[package]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)


def lighten(surveyor: Any) -> None:
    """Replace three functions of transformers' `utils.import_utils` by quicker ones with the same answers. A version without
    one of them keeps what it has."""
    if (names := getattr(surveyor, "_candidate_distribution_names", None)) is not None:

        def _candidate_distribution_names(package: str) -> list[str]:
            distribution = package.replace("_", "-")
            try:
                metadata.version(distribution)
            except metadata.PackageNotFoundError:
                return list(names(package))
            return [distribution]

        surveyor._candidate_distribution_names = _candidate_distribution_names
    if (offered := getattr(surveyor, "fetch__all__", None)) is not None:
        # Goes through all lines for the last that begins so.
        surveyor.fetch__all__ = lambda text: offered(text[text.rfind("\n__all__") + 1 :])
    structure = getattr(getattr(surveyor, "create_import_structure_from_path", None), "__wrapped__", None)
    if structure is not None:  # remembers 128 folders of more than 500
        surveyor.create_import_structure_from_path = cache(structure)
