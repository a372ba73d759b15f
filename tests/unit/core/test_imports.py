"""Optional packages hidden from a library that is being imported."""

import gc
import importlib.util
import subprocess
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raydistill.imports import Packages, lighten, without

UNUSED = "xmlrpc.client"  # of the standard library, and loaded by nothing here


@pytest.fixture
def unused(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delitem(sys.modules, UNUSED, raising=False)
    return UNUSED


def test_a_hidden_package_is_not_installed_inside_and_there_again_afterwards(unused: str) -> None:
    with without(unused):
        assert importlib.util.find_spec(unused) is None
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(unused)
    assert importlib.import_module(unused).ServerProxy


def test_what_is_loaded_stays_and_an_error_inside_leaves_nothing_hidden(unused: str) -> None:
    with without("json", unused), pytest.raises(ModuleNotFoundError):
        importlib.import_module(unused)
    with pytest.raises(ModuleNotFoundError), without("json", unused):
        importlib.import_module(unused)
    assert sys.modules["json"] is not None
    assert unused not in sys.modules


def test_what_transformers_was_told_before_does_not_hold_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "colorsys"  # of the standard library as well
    monkeypatch.delitem(sys.modules, name, raising=False)
    told = SimpleNamespace(is_colorsys_available=cache(lambda: importlib.util.find_spec(name) is not None))
    monkeypatch.setitem(sys.modules, "transformers.utils.import_utils", told)  # type: ignore[arg-type]
    assert told.is_colorsys_available()
    with without(name):
        assert not told.is_colorsys_available()


@pytest.mark.parametrize("collects", [True, False])
def test_garbage_collection_rests_inside_and_is_afterwards_as_before(collects: bool) -> None:
    before = gc.isenabled()
    try:
        gc.enable() if collects else gc.disable()
        with suppress(ZeroDivisionError), without(UNUSED):
            assert not gc.isenabled()
            raise ZeroDivisionError
        assert gc.isenabled() is collects
    finally:
        gc.enable() if before else gc.disable()


@pytest.fixture(scope="module")
def surveyors() -> tuple[SimpleNamespace, SimpleNamespace]:
    """transformers' functions as they are, and after `lighten`."""
    from transformers.utils import import_utils as installed

    spec = importlib.util.spec_from_file_location("transformers.utils.surveyor", installed.__file__)
    assert spec is not None and spec.loader is not None
    modules = importlib.util.module_from_spec(spec), importlib.util.module_from_spec(spec)
    for module in modules:
        spec.loader.exec_module(module)
    lighten(modules[1])
    return modules  # type: ignore[return-value]


def test_transformers_finds_the_same_names_in_its_models(surveyors: tuple[Any, Any]) -> None:
    from transformers import models

    folders = [Path(models.__path__[0], name) for name in ("qwen3", "llama", "auto", "clip", "gemma3")]
    before, after = ([one.define_import_structure(str(folder)) for folder in folders] for one in surveyors)
    assert before == after
    assert any("Qwen3ForCausalLM" in names for modules in after[0].values() for names in modules.values())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x = 1",
        '__all__ = ["a", "b"]\nx = 1\n',
        '__all__ = [\n    "a",\n]',
        '"""__all__"""\n__all__ = []\n__all__ = ["b"]',
    ],
)
def test_what_a_file_offers_is_read_from_its_end(text: str, surveyors: tuple[Any, Any]) -> None:
    before, after = (one.fetch__all__(text) for one in surveyors)
    assert before == after


def test_a_distribution_by_another_name_than_its_package_is_still_found(surveyors: tuple[Any, Any]) -> None:
    for package in ("torch", "yaml", "PIL", "huggingface_hub", "not_installed_anywhere"):
        before, after = (one._is_package_available(package, return_version=True) for one in surveyors)
        assert before == after, package


def test_packages_are_surveyed_at_the_first_look_and_once() -> None:
    surveys = []
    packages = Packages(lambda: surveys.append(1) or {"yaml": ["PyYAML"]})  # type: ignore[func-returns-value]
    assert not surveys
    assert (packages.get("yaml"), packages.get("none", []), packages["yaml"]) == (["PyYAML"], [], ["PyYAML"])
    assert (list(packages), len(packages), len(surveys)) == (["yaml"], 1, 1)


def test_a_version_without_these_functions_is_left_as_it_is() -> None:
    lighten(other := SimpleNamespace(fetch=1))
    assert vars(other) == {"fetch": 1}


def test_transformers_is_imported_with_them_and_the_surveys_are_python_s_own_again() -> None:
    """In a process of its own: here it is loaded already."""
    script = (
        "from raydistill.imports import quick_transformers; from importlib import metadata; import sys\n"
        "own, finders = metadata.packages_distributions, list(sys.meta_path)\n"
        "with quick_transformers():\n    from transformers.utils import import_utils as found\n"
        "assert metadata.packages_distributions is own and sys.meta_path == finders\n"
        "assert 'raydistill' not in type(found.__spec__.loader).__module__ + type(found.__loader__).__module__\n"
        "hits = found.create_import_structure_from_path.cache_info().hits\n"
        "print(type(found.PACKAGE_DISTRIBUTION_MAPPING).__name__, hits >= 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["Packages", "True"]
