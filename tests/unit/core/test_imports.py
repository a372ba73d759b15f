"""Optional packages hidden from a library that is being imported."""

import importlib.util
import sys

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
