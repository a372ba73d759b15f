"""A disk that does not take what is written is one clear line, whoever writes."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors import SafetensorError

from raydistill.actors import evaluator as evaluator_module
from raydistill.actors.evaluator import EvaluatorActor
from raydistill.errors import RunError, StorageError, disk_errors

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class StrangeError(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (FULL, "cannot write the plots to p: No space left on device; make room"),
        (OSError("broken"), "cannot write the plots to p: broken; make room"),
        (StrangeError("io\nmore"), "cannot write the plots to p: io; make room"),
        (StrangeError(), "cannot write the plots to p: StrangeError; make room"),
    ],
)
def test_a_disk_error_becomes_one_line(error: Exception, line: str) -> None:
    with pytest.raises(RunError) as found, disk_errors("the plots to p", StrangeError):
        raise error
    assert str(found.value).startswith(line)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("error", [StorageError("a clear line"), ValueError("a bug"), StrangeError("not asked for")])
def test_other_errors_stay_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as found, disk_errors("the plots to p"):
        raise error
    assert found.value is error


@pytest.mark.parametrize("error", [FULL, SafetensorError("Error while serializing: No space left on device")])
def test_an_export_that_does_not_fit_the_disk_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def export(*_: Any) -> str:
        raise error

    actor: Any = EvaluatorActor("evaluator-0")
    actor._runs["one"] = SimpleNamespace(spec=SimpleNamespace(model="m"))
    actor._model, actor._load = None, lambda *_: None
    for name, value in {
        "make_whole": lambda *_: None,
        "load_checkpoint": lambda _: None,
        "export_live": export,
    }.items():
        monkeypatch.setattr(evaluator_module, name, value)
    with pytest.raises(
        RunError, match=r"^cannot write the export to .*export: .*No space left on device; make room"
    ) as found:
        actor.export_checkpoint("one", tmp_path / "step-000004", tmp_path / "export", {})
    assert "\n" not in str(found.value)
