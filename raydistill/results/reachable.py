"""Whether `results.uri` can be a results store, asked before a run: by its form, and by knocking at its door."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

from raydistill.errors import UserError
from raydistill.results.provenance import scrub

PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
KNOCK_S = 3.0


def check_uri(uri: str) -> None:
    """UserError for a URI that no library here can open. Connects to nothing."""
    if urlsplit(uri).scheme in ("http", "https") and urlsplit(uri).hostname:
        return
    from sqlalchemy import create_engine
    from sqlalchemy.exc import ArgumentError

    try:
        create_engine(uri)
    except (ArgumentError, ImportError, ValueError) as error:
        raise UserError(
            f"results.uri={scrub(uri)!r} is no results store ({scrub(str(error)).splitlines()[0]}); name an MLflow server "
            "(http://HOST:5000) or a database (postgresql://USER:PASSWORD@HOST/NAME, sqlite:////PATH), or leave it out"
        ) from error


def silence_of(uri: str) -> str | None:
    """Why nobody answers at a server's address; None if somebody does, or if the store is a file."""
    parts = urlsplit(uri)
    port = parts.port or PORTS.get(parts.scheme.partition("+")[0])
    if parts.hostname is None or port is None:
        return None
    try:
        with socket.create_connection((parts.hostname, port), timeout=KNOCK_S):
            return None
    except OSError as error:
        return f"{parts.hostname}:{port}: {error.strerror or error}"
