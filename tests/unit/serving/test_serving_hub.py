"""Uploads to a hub that cannot be reached, by the hub's own library: no network, one line, at once."""

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from finished_models import write_run
from huggingface_hub import HfApi, constants, errors

from raydistill.errors import ModelError, RunError, UserError
from raydistill.evaluate import hub
from raydistill.serving.export import export_run, push


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a hub where nobody listens."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_an_upload_that_finds_no_hub_is_one_line(closed: str, tmp_path: Path) -> None:
    api = HfApi(endpoint=closed, token="secret")
    with pytest.raises(
        RunError, match=r"is written, but --push-to-hub me/student failed: .*refused; the same command"
    ) as caught:
        push(tmp_path, "me/student", api)
    assert isinstance(caught.value.__cause__, errors.HTTPError) and not isinstance(caught.value.__cause__, OSError)
    assert "\n" not in str(caught.value)


def test_the_same_command_uploads_what_an_upload_that_failed_left(closed: str, tiny: Any, tmp_path: Path) -> None:
    tiny.model("llama").save_pretrained(tmp_path / "base")
    run = write_run(
        tmp_path / "runs" / "mine", tmp_path / "base", tmp_path / "rows.jsonl", mode="served", versions=(0, 2)
    )
    out, uploaded = tmp_path / "student", []
    with pytest.raises(RunError, match="is written, but"):
        export_run(run, out, checkpoint="last", push_to="me/s", hub=HfApi(endpoint=closed, token="secret"))
    written = (out / "model.safetensors").stat().st_mtime_ns
    works = SimpleNamespace(
        token="secret", create_repo=lambda *_, **__: None, upload_folder=lambda **kwargs: uploaded.append(kwargs)
    )

    def again(**settings: Any) -> Any:
        return export_run(run, out, **({"checkpoint": "last", "push_to": "me/s", "hub": works} | settings))

    report = again()
    assert (report.version, report.pushed_to, len(uploaded)) == (2, "me/s", 1)
    assert (out / "model.safetensors").stat().st_mtime_ns == written
    others: list[dict[str, Any]] = [
        {"checkpoint": "0"},  # the codes are the same: its adapter is not
        {"layout": "dequantized"},
        {"layout": "packed"},
    ]
    for settings in others:
        with pytest.raises(UserError, match="exists and is not this export; choose another folder"):
            again(**settings)
    with pytest.raises(UserError, match="exists; choose another folder"):
        again(push_to=None)
    (out / "raydistill.json").unlink()
    with pytest.raises(UserError, match="is not this export"):
        again()
    assert len(uploaded) == 1


def test_a_download_that_breaks_off_is_one_line(closed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_off(*_: object, **__: object) -> None:
        HfApi(endpoint=closed).whoami(token="secret")

    monkeypatch.setattr("huggingface_hub.snapshot_download", break_off)
    monkeypatch.setattr(hub, "go_offline_if_unreachable", lambda: None)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(ModelError, match=r"org/model does not exist here.*\(.*refused\)"):
        hub.fetch("org/model")
