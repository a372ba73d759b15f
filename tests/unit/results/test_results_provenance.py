"""Provenance names code and machine, never the user, and scrub removes secrets and nothing else."""

import getpass
import json
import socket
import subprocess
from pathlib import Path

import pytest

from raydistill.results.provenance import HIDDEN, collect, git_state, package_versions, scrub


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("password", "x"),
        ("api_key", "x"),
        ("OPENAI_API_KEY", "x"),
        ("hf_token", "x"),
        ("dbPassword", "x"),
        ("client-secret", "x"),
        ("aws_secret_access_key", "x"),
        ("credentials", {"user": "a"}),
    ],
)
def test_scrub_hides_secrets_by_key(key: str, value: object) -> None:
    assert scrub({"outer": [{key: value}]}) == {"outer": [{key: HIDDEN}]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("postgresql://me:pw@db:5432/x", f"postgresql://{HIDDEN}@db:5432/x"),
        ("https://tok@host/path", f"https://{HIDDEN}@host/path"),
        ("http://host/x?token=abc&run=1", f"http://host/x?token={HIDDEN}&run=1"),
        ("call with api_key=abc failed", f"call with api_key={HIDDEN} failed"),
        ("header Bearer abc.def", f"header Bearer {HIDDEN}"),
        ("used hf_abcdefghijklmnopqrstuv here", f"used {HIDDEN} here"),
    ],
)
def test_scrub_hides_secrets_inside_text(text: str, expected: str) -> None:
    assert scrub(text) == expected


def test_scrub_leaves_settings_alone() -> None:
    settings = {
        "max_new_tokens": 128,
        "batch_tokens": 16384,
        "token": 5,
        "eos_token": "<|im_end|>",
        "tokenizer": "bpe",
        "uri": "sqlite:////data/results.db",
        "password": None,
        "url": "http://host:5000/path",
        "monkey": "x",
        "text": "a sentence about max_tokens=5 and user@host",
    }
    assert scrub(settings) == settings


def test_collect_names_neither_host_nor_user() -> None:
    facts = json.dumps(collect())
    assert socket.gethostname() not in facts
    assert getpass.getuser() not in facts or getpass.getuser() == "root"
    assert json.loads(facts)["machine"]["num_cpus"] >= 1


def test_versions_hold_installed_packages_only() -> None:
    versions = package_versions()
    assert versions["torch"]
    assert "not-a-package" not in versions


def test_git_state_is_none_outside_a_repository(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None


def test_git_state_is_none_where_a_repository_does_not_track_the_package(tmp_path: Path) -> None:
    _git(tmp_path, "init", "-q")
    (tmp_path / "__init__.py").write_text("")
    assert git_state(tmp_path) is None


def test_git_state_tells_a_changed_tree(tmp_path: Path) -> None:
    _git(tmp_path, "init", "-q")
    (tmp_path / "__init__.py").write_text("")
    _git(tmp_path, "add", ".")
    _git(tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "first")
    clean = git_state(tmp_path)
    assert clean is not None
    assert len(clean["revision"]) == 40
    assert clean["is_dirty"] is False
    (tmp_path / "__init__.py").write_text("changed = 1\n")
    changed = git_state(tmp_path)
    assert changed is not None
    assert changed["is_dirty"] is True


def _git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True)
