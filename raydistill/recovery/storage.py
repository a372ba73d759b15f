"""A folder at a URL (`run.storage`), reached through fsspec: s3://bucket/prefix, or whatever fsspec opens.

    run = Storage("s3://bucket/prefix").below("runs", name)
    run.put(folder / "record.jsonl", "record.jsonl")

Names are relative, with slashes. An object is whole or absent: object stores promise that, elsewhere it is written under
another name and renamed. Every call has a time limit and a few tries, and blocks until then; what fails is a
`StorageError` that names run.storage. Retries of the libraries below are turned off: one place decides how long to try.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

from raydistill.background import begin
from raydistill.errors import StorageError, UserError
from raydistill.results.provenance import scrub

Answer = TypeVar("Answer")
PAUSES_S = (0.5, 2.0)  # before the second and the third try
TIMEOUT_S = 60.0  # of one try, beside the time for its bytes
SLOWEST_BYTES_PER_S = 1e6
OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "memory"})
"""Where an upload appears whole; elsewhere (file, sftp, hdfs, ...) a half-written file would be seen."""
S3 = {"connect_timeout": 10, "read_timeout": 60, "retries": {"total_max_attempts": 1}}
NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError")
NO_ANSWER = (
    "EndpointConnectionError",
    "ConnectTimeoutError",
    "ReadTimeoutError",
    "ConnectionClosedError",
    "HTTPClientError",
)
"""Names of botocore's errors, which are no OSErrors; the library is there only where s3fs is."""


@dataclass(frozen=True, slots=True)
class Storage:
    """One folder there; in a text, its URL without the password.

    deadline: a `time.monotonic()` after which nothing more is tried.
    """

    url: str
    deadline: float | None = None

    def __str__(self) -> str:
        """The URL as it may be shown: without its password."""
        return str(scrub(self.url))

    def below(self, *parts: str) -> Storage:
        """A folder in this one."""
        return replace(self, url="/".join([self.url.rstrip("/"), *parts]))

    def within(self, seconds: float) -> Storage:
        """The same folder, for calls that together may take this long."""
        return replace(self, deadline=time.monotonic() + seconds)

    def put(self, path: Path, name: str) -> None:
        """Bring a file there."""
        try:
            size = path.stat().st_size
        except OSError as error:
            raise StorageError(f"{path} cannot be brought to run.storage: {error.strerror or error}") from error
        self._place(name, lambda fs, there: fs.put_file(str(path), there), size)

    def write(self, data: bytes, name: str) -> None:
        """The same for a few bytes."""
        self._place(name, lambda fs, there: fs.pipe_file(there, data), len(data))

    def get(self, name: str, path: Path, size: int = 0) -> bool:
        """Bring an object here, whole or not at all; False if there is none. size: its bytes, which earn it time."""
        unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._ask(lambda fs, root: fs.get_file(f"{root}/{name}", str(unfinished)), size)
            os.replace(unfinished, path)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise StorageError(f"{path} cannot be written: {error.strerror or error}") from error
        finally:
            unfinished.unlink(missing_ok=True)
        return True

    def read(self, name: str, end: int | None = None) -> bytes | None:
        """An object's bytes (the first `end` of them); None if there is none."""
        try:
            data: bytes = self._ask(lambda fs, root: fs.cat_file(f"{root}/{name}", end=end))
        except FileNotFoundError:
            return None
        return data

    def list(self, below: str = "") -> dict[str, int]:
        """Name -> bytes of every object, at any depth; nothing where there is no such folder."""

        def find(fs: Any, root: str) -> dict[str, int]:
            found = fs.find(f"{root}/{below}".rstrip("/"), detail=True)
            return {path.removeprefix(root).lstrip("/"): int(facts["size"] or 0) for path, facts in found.items()}

        with suppress(FileNotFoundError):
            return self._ask(find)
        return {}

    def remove(self, name: str) -> None:
        """Remove an object, if there is one."""
        with suppress(FileNotFoundError):
            self._ask(lambda fs, root: fs.rm_file(f"{root}/{name}"))

    def remove_folder(self, name: str) -> None:
        """Remove every object of a folder."""
        with suppress(FileNotFoundError):
            self._ask(lambda fs, root: fs.rm(f"{root}/{name}", recursive=True))

    def move_to(self, other: Storage) -> None:
        """Give every object of this folder the same name in another one, which does not exist yet."""

        def move(fs: Any, root: str, name: str = "") -> None:
            there = _open(other.url)[1] + name
            if not self._shows_whole:
                fs.makedirs(there.rpartition("/")[0], exist_ok=True)
            fs.mv(root + name, there, recursive=not name)

        if not self._shows_whole:
            self._ask(move)
            return
        for name in self.list():  # an object store has no folders
            self._ask(partial(move, name=f"/{name}"))

    @property
    def _shows_whole(self) -> bool:
        return self.url.partition("://")[0] in OBJECT_STORES

    def check(self) -> None:
        """Write, read back and remove a small object; StorageError if any of it fails."""
        name, data = f".raydistill-check-{uuid.uuid4().hex[:8]}", os.urandom(16)
        self.write(data, name)
        if self.read(name) != data:
            raise StorageError(f"run.storage={str(self)!r} does not give back what was written to it")
        self.remove(name)

    def _place(self, name: str, write: Callable[[Any, str], object], size: int) -> None:
        def place(fs: Any, root: str) -> None:
            there = f"{root}/{name}"
            if self._shows_whole:
                write(fs, there)
                return
            unfinished = f"{there}.{uuid.uuid4().hex[:8]}.partial"
            fs.makedirs(there.rpartition("/")[0], exist_ok=True)
            try:
                write(fs, unfinished)
                fs.mv(unfinished, there)
            except BaseException:
                with suppress(Exception):  # what went wrong first is what counts
                    fs.rm_file(unfinished)
                raise

        try:
            self._ask(place, size)
        except FileNotFoundError as error:
            raise StorageError(
                f"run.storage={str(self)!r} does not exist; create the bucket or folder first"
            ) from error

    def _ask(self, call: Callable[[Any, str], Answer], size: int = 0) -> Answer:
        """Try a few times. FileNotFoundError is an answer; anything else becomes a StorageError."""
        for pause in (*PAUSES_S, None):
            limit = TIMEOUT_S + size / SLOWEST_BYTES_PER_S
            if self.deadline is not None:
                limit = min(limit, self.deadline - time.monotonic())
            try:
                if limit <= 0:
                    raise TimeoutError
                return begin(lambda: call(*_open(self.url)), "run-storage").result(limit)
            except (FileNotFoundError, UserError):
                raise
            except Exception as error:  # every kind of storage has errors of its own
                is_late = self.deadline is not None and time.monotonic() + (pause or 0) >= self.deadline
                if pause is None or is_late or not _may_pass(error):
                    raise StorageError(f"run.storage={str(self)!r} {scrub(_reason(error))}") from error
                time.sleep(pause)
        raise AssertionError("the last try returns or raises")


@cache
def _open(url: str) -> tuple[Any, str]:
    """(file system, path there). UserError for a URL that cannot be opened on this machine."""
    import fsspec
    from fsspec.registry import known_implementations

    scheme = url.partition("://")[0]
    try:
        fs, root = fsspec.core.url_to_fs(url, **_options(scheme))
    except ImportError as error:
        home = str(known_implementations[scheme]["class"]).partition(".")[0]
        package = f"`pip install {home}`" if home != "fsspec" else str(error)
        raise UserError(f"run.storage={scrub(url)!r} needs a package that is not installed here: {package}") from error
    except ValueError as error:
        raise UserError(
            f'run.storage={scrub(url)!r} cannot be opened ({error}); s3://bucket/prefix is the usual form, `python -c "import '
            'fsspec; print(fsspec.available_protocols())"` lists all'
        ) from error
    if hasattr(fs, "retries"):
        fs.retries = 1
    return fs, root.rstrip("/")


def _options(scheme: str) -> dict[str, Any]:
    if scheme in ("s3", "s3a"):
        return {"config_kwargs": S3, "use_listings_cache": False, "skip_instance_cache": True}
    return {"use_listings_cache": False}


def _may_pass(error: Exception) -> bool:
    return (
        not isinstance(error, (PermissionError, ImportError, ValueError)) and type(error).__name__ not in NO_CREDENTIALS
    )


def _reason(error: Exception) -> str:
    """What is wrong and what to do, for the line that begins with the URL."""
    said = (str(error).strip().splitlines() or [""])[0]
    name = type(error).__name__
    if name in NO_CREDENTIALS:
        return (
            "finds no credentials on this node; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment of every "
            "node, or give the nodes a role that may read and write there"
        )
    if isinstance(error, PermissionError):
        return f"refuses access ({said}); check the credentials of this node and what they may do there"
    if isinstance(error, (TimeoutError, ConnectionError)) or name in NO_ANSWER:
        return f"does not answer ({said or 'no answer in time'}); check the network (a server of your own: AWS_ENDPOINT_URL)"
    return f"failed: {said or name}"
