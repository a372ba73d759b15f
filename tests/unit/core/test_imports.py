"""Optional packages hidden from a library that is being imported."""

import gc
import importlib.util
import sys
from contextlib import suppress
from functools import cache
from types import SimpleNamespace

import pytest

from raydistill.imports import without

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
