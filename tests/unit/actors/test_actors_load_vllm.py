"""vLLM's import, with a package that stands for vLLM."""

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from raydistill.actors import vllm_engine

UNUSED = "xmlrpc.client"  # of the standard library, and loaded by nothing here


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    gc.unfreeze()
    sys.modules.pop("vllm", None)


@pytest.mark.parametrize(
    ("imports", "is_loaded"),
    [(f"try:\n    import {UNUSED}\nexcept ImportError:\n    pass", False), (f"import {UNUSED}", True)],
    ids=["optional", "needed"],
)
def test_what_vllm_can_do_without_is_not_loaded_and_what_it_needs_is(
    imports: str, is_loaded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vllm.py").write_text(f"{imports}\nclass LLM:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(vllm_engine, "UNUSED_BY_VLLM", (UNUSED,))
    for name in ("vllm", UNUSED):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert vllm_engine.load_vllm().__name__ == "LLM"
    assert (UNUSED in sys.modules) is is_loaded
