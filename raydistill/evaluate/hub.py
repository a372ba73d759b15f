"""Models and data sets of the Hugging Face hub: taken from the local cache, downloaded where the hub can be reached."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from pathlib import Path

from raydistill.cli import console
from raydistill.errors import ModelError
from raydistill.progress import spinner

FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
"""What a model is made of; weights in safetensors only."""
OFFLINE = "HF_HUB_OFFLINE"
PROBE_S = 5.0


def is_hub_id(text: str) -> bool:
    """Whether a text that is no path here could name a model of the hub: NAME, or OWNER/NAME with no such folder OWNER."""
    path = Path(text)
    looks_like_a_path = text.startswith((".", "/", "~")) or text.count("/") > 1 or text.endswith("/")
    return not path.exists() and not looks_like_a_path and not (len(path.parts) == 2 and path.parent.is_dir())


def fetch(model: str) -> Path:
    """The folder of a hub model, as cached or downloaded now; ModelError where neither is possible."""
    go_offline_if_unreachable()
    from huggingface_hub import snapshot_download

    try:
        with spinner(console, f"looking for {model} on the hub"):
            return Path(snapshot_download(model, allow_patterns=list(FILES)))
    except hub_errors() as error:
        reason = "the hub cannot be reached" if os.environ.get(OFFLINE) else first_line(error)
        raise ModelError(
            f"{model} does not exist here, and is no model of the hub that is cached or can be downloaded ({reason}); give a "
            "model's folder, a run's, or the id of a model on the hub"
        ) from error


def hub_errors() -> tuple[type[Exception], ...]:
    """What the hub's library raises: errors of its own, and those of the HTTP library below it, which are no OSError."""
    from huggingface_hub import errors

    return OSError, ValueError, errors.HTTPError, errors.XetDownloadError


def first_line(error: Exception) -> str:
    """The message, or the error's name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def go_offline_if_unreachable() -> None:
    """Say once that only the cache counts, before the hub's libraries are imported: each of them would try for half a
    minute."""
    if os.environ.get(OFFLINE):
        return
    try:
        urllib.request.urlopen(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=PROBE_S).close()
    except urllib.error.HTTPError:
        return  # somebody answered
    except (OSError, ValueError):
        os.environ[OFFLINE] = "1"
