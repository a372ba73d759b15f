"""Reads a record while it grows: new lines as they come, everything anew where a resumed run has cut it back.

For readers on any machine that sees the folder; nothing is written and no lock is taken.
"""

from __future__ import annotations

import os
from pathlib import Path

from raydistill.results.record_lines import RECORD_FILE, Line, decode_line


class RecordFollower:
    """One record; `new_lines` is called again and again."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / RECORD_FILE
        self._inode, self._offset, self._head = -1, 0, b""

    def new_lines(self) -> tuple[bool, list[Line]]:
        """(whether these are all lines from the beginning on, the whole lines that were not returned before)."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:  # between two lives of a mount, or not yet written
            return False, []
        with file:
            begins_anew = self._is_another(file.fileno(), file.read(len(self._head)))
            if begins_anew:
                self._offset = 0
            file.seek(self._offset)
            data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            if begins_anew or len(self._head) < _HEAD:
                file.seek(0)
                self._head = file.read(min(_HEAD, self._offset + len(whole)))
        self._offset += len(whole)
        return begins_anew, [decode_line(raw) for raw in whole.splitlines(keepends=True) if raw.strip()]

    def _is_another(self, descriptor: int, head: bytes) -> bool:
        """A cut record is another file; its length and its first bytes tell where inodes do not, as on some mounts."""
        stat = os.fstat(descriptor)
        changed = stat.st_ino != self._inode or stat.st_size < self._offset or head != self._head
        self._inode = stat.st_ino
        return changed


_HEAD = 4096
