"""The ledger holds what was trained, each sequence once, and is cut back to what a checkpoint knows."""

import errno
import json
import os
from pathlib import Path

import pytest

from raydistill.errors import RunError
from raydistill.messages import Samples, TokenRows
from raydistill.recovery.ledger import Ledger, ledger_path, ledger_problems, read_ledger


def samples(step: int, indices: tuple[int, ...]) -> Samples:
    size = len(indices)
    return Samples(
        step=step,
        indices=indices,
        row_ids=tuple(f"row-{index}" for index in indices),
        prompts=TokenRows.from_rows([[1]] * size),
        completions=TokenRows.from_rows([[step, index] for index in indices]),
        policy_versions=(step,) * size,
        finish_reasons=("stop",) * size,
    )


def test_lines_say_what_was_trained(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, rank=1)
    ledger.add(samples(3, (4, 6)))
    assert ledger.commit() == ledger_path(tmp_path, 1).stat().st_size
    first, second = read_ledger(tmp_path)
    text = first.pop("text")
    assert first == {"step": 3, "index": 4, "row": "row-4", "version": 3}
    assert text != second["text"]
    assert len(text) == 16


def test_a_ledger_is_cut_back_to_its_checkpoint(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, rank=0)
    ledger.add(samples(0, (0, 1)))
    size = ledger.commit()
    ledger.add(samples(1, (0, 1)))
    ledger.commit()
    again = Ledger(tmp_path, 0, size)
    again.add(samples(1, (0, 1)))
    again.commit()
    assert [(line["step"], line["index"]) for line in read_ledger(tmp_path)] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert ledger_problems(tmp_path, range(2), 2) == []


def test_a_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    """A RunError ends the run; any other error of a rank counts as its death, and would be tried again."""
    ledger = Ledger(tmp_path, rank=0)

    class Full:
        def write(self, data: bytes) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    ledger._file = Full()  # type: ignore[assignment]
    with pytest.raises(RunError, match=r"^cannot write what was trained to .*rank-0.jsonl: No space left") as error:
        ledger.add(samples(0, (0,)))
    assert "\n" not in str(error.value)
    (tmp_path / "file").write_text("where a folder should be")
    with pytest.raises(RunError, match="cannot write what was trained"):
        Ledger(tmp_path / "file", rank=0)


def test_a_torn_line_does_not_count(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, rank=0)
    ledger.add(samples(0, (0,)))
    ledger.commit()
    with ledger_path(tmp_path, 0).open("a") as file:
        file.write(json.dumps({"step": 1, "index": 0})[:-3])
    assert len(list(read_ledger(tmp_path))) == 1


def test_missing_double_and_foreign_sequences_are_found(tmp_path: Path) -> None:
    for rank, indices in enumerate([(0, 1), (1, 2, 9)]):
        ledger = Ledger(tmp_path, rank)
        ledger.add(samples(0, indices))
        ledger.commit()
    assert ledger_problems(tmp_path, [0], 4) == [
        "1 sequences trained more than once, first (step, index) (0, 1)",
        "1 sequences missing, first (step, index) (0, 3)",
        "1 sequences of no known step, first (step, index) (0, 9)",
    ]


def test_a_ledger_on_another_disk_is_brought_and_a_foreign_one_replaced(tmp_path: Path) -> None:
    from raydistill.errors import RunError
    from raydistill.recovery.ledger import bring_ledger
    from raydistill.recovery.storage import Storage

    ledger = Ledger(tmp_path / "here", rank=0)
    ledger.add(samples(0, (0, 1)))
    size, digest = ledger.commit(), ledger.sha256
    run = Storage(f"file://{tmp_path}/remote")
    run.put(ledger_path(tmp_path / "here", 0), "ledger/rank-0.jsonl")
    other = ledger_path(tmp_path / "other", 0)
    bring_ledger(tmp_path / "other", 0, size, digest, run)
    assert other.read_bytes() == ledger_path(tmp_path / "here", 0).read_bytes()
    other.write_bytes(b"x" * (size + 10))  # of another life of the run, and longer
    bring_ledger(tmp_path / "other", 0, size, digest, run)
    assert other.stat().st_size == size
    again = Ledger(tmp_path / "other", 0, size)
    again.add(samples(1, (0, 1)))
    ledger.add(samples(1, (0, 1)))
    assert (again.commit(), again.sha256) == (ledger.commit(), ledger.sha256)
    with pytest.raises(RunError, match="neither here nor in file://"):
        bring_ledger(tmp_path / "other", 0, size, "another", run)
