"""A sink through its own library, beside a real MLflow store."""

import json
import struct
from pathlib import Path

import pytest

from raydistill.results.deliver import deliver
from raydistill.results.record import RunRecord
from raydistill.results.store import default_uri

pytestmark = pytest.mark.engine


def offline_messages(path: Path) -> list[bytes]:
    """The messages of a `.wandb` file: LevelDB's log (blocks of 32 KiB; crc, length, type before each part) after 7 bytes."""
    raw, place, found, whole = path.read_bytes(), 7, [], b""
    while place + 7 <= len(raw):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack_from("<HB", raw, place + 4)
        whole += raw[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(whole)
            whole = b""
    return found


def test_wandb_holds_every_point_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    with RunRecord(tmp_path / "run") as record:
        record.start(name="run", config={}, provenance={}, seed=0)
        for step in range(300):
            record.step(step, {"m": float(step)})
        record.end("finished")
    assert deliver(tmp_path / "run", default_uri(tmp_path), "e", sinks=["wandb"])
    (file,) = (tmp_path / "run" / "wandb").rglob("*.wandb")
    rows = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in Record.FromString(raw).history.item}
        for raw in offline_messages(file)
    ]
    assert [(row["step"], row["m"]) for row in rows if "m" in row] == [(step, float(step)) for step in range(300)]
