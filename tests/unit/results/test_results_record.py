"""The run's record: what is written can be read back, whatever happens in between."""

import json
import math
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from raydistill.errors import RunError
from raydistill.messages import EvalReport, LoadReport, Span
from raydistill.results import record as record_module
from raydistill.results.record import RunRecord, read_record, read_spans
from raydistill.results.record_lines import start_of
from raydistill.results.runs import row_of_record


def span(step: int, stage: str = "rollout", start_s: float = 0.0) -> Span:
    return Span(stage=stage, actor=f"{stage}-0", step=step, start_s=start_s + step, end_s=start_s + step + 0.5)


def evaluation(version: int, kl: float = 0.1) -> EvalReport:
    return EvalReport(version=version, metrics={"evaluate/kl_nats": kl}, span=span(version, "evaluate"))


def sync(version: int) -> LoadReport:
    return LoadReport(
        actor="rollout-0",
        version=version,
        weights_hash="w",
        codes_hash=None,
        gap_mean_nats=1e-6,
        gap_p99_nats=None,
        size_bytes=10,
        seconds=0.1,
    )


def started(folder: Path) -> RunRecord:
    record = RunRecord(folder)
    record.start(name="demo", config={"trainer": {"num_steps": 3}}, provenance={"git": None}, seed=7)
    return record


def kinds(folder: Path) -> list[str]:
    return [line["kind"] for line in read_record(folder)]


def test_record_reads_back_what_was_written(tmp_path: Path) -> None:
    record = started(tmp_path)
    record.step(0, {"trainer/loss": 0.5})
    record.spans([span(0)])
    record.spans([])
    record.evaluation(evaluation(1))
    record.sync(sync(1))
    record.warning("careful", step=0)
    record.table("summary", [{"name": "a", "bytes": 3}], markdown="| a |")
    record.artifact("checkpoint", tmp_path)
    record.end("finished")
    lines = list(read_record(tmp_path))
    assert [line["kind"] for line in lines] == [
        "start", "step", "spans", "evaluation", "sync", "warning", "table", "artifact", "end"
    ]  # fmt: skip
    assert lines[0]["config"] == {"trainer": {"num_steps": 3}}
    assert lines[0]["seed"] == 7
    assert len(lines[0]["record_id"]) == 32
    assert lines[4]["gap_p99_nats"] is None
    assert read_spans(tmp_path) == [span(0), span(1, "evaluate")]


def test_numbers_that_are_not_finite_survive_and_the_file_is_strict_json(tmp_path: Path) -> None:
    record = started(tmp_path)
    written = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": np.float32(0.5), "e": np.int64(3)}
    record.step(0, written)

    def refuse(text: str) -> None:
        raise AssertionError(text)

    for raw in record.path.read_text().splitlines():
        json.loads(raw, parse_constant=refuse)
    metrics = list(read_record(tmp_path))[-1]["metrics"]
    assert math.isnan(metrics["a"])
    assert metrics["b"] == math.inf
    assert metrics["c"] == -math.inf
    assert metrics["d"] == 0.5
    assert metrics["e"] == 3


def test_text_that_looks_like_a_number_stays_text(tmp_path: Path) -> None:
    started(tmp_path).warning("nan")
    assert list(read_record(tmp_path))[-1]["text"] == "nan"


def test_a_resumed_run_has_the_settings_that_it_goes_on_with(tmp_path: Path) -> None:
    """Results, the model card, `reproduce` and the next resume all ask the start line."""
    first = {"trainer": {"num_steps": 3, "zero_stage": 2}, "results": {"uri": None}}
    record = RunRecord(tmp_path)
    record.start(name="demo", config=first, provenance={}, seed=7)
    record.step(0, {"m": 1.0})
    record.cut_back(1, first)
    now = {"trainer": {"num_steps": 5, "zero_stage": 2}, "results": {"uri": "http://me:secret@host"}}
    record.cut_back(1, now)
    start = start_of(tmp_path)
    assert start is not None
    assert start["config"] == {"trainer": {"num_steps": 5, "zero_stage": 2}, "results": {"uri": "http://***@host"}}
    assert (start["seed"], start["name"]) == (7, "demo")
    changed = [line["changed"] for line in read_record(tmp_path) if line["kind"] == "resume"]
    assert changed == [
        {},
        {"results.uri": {"was": None, "is": "http://***@host"}, "trainer.num_steps": {"was": 3, "is": 5}},
    ]
    assert row_of_record(read_record(tmp_path), tmp_path).settings["trainer.num_steps"] == 5


@pytest.mark.parametrize("torn", [b'{"kind":"step","time_s":1.0,"st', b'{"kind":"end","time_s":1.0}', b"\xc3"])
def test_a_torn_last_line_is_as_if_never_written(tmp_path: Path, torn: bytes) -> None:
    record = started(tmp_path)
    record.step(0, {"m": 1.0})
    record.close()
    with record.path.open("ab") as file:
        file.write(torn)
    assert kinds(tmp_path) == ["start", "step"]
    again = RunRecord(tmp_path)
    assert again.is_started
    assert again.last_step == 0
    again.step(1, {"m": 2.0})
    assert kinds(tmp_path) == ["start", "step", "step"]


def test_a_file_that_is_one_torn_line_becomes_empty(tmp_path: Path) -> None:
    (tmp_path / "record.jsonl").write_bytes(b"x" * 200_000)
    record = RunRecord(tmp_path)
    assert not record.is_started
    assert record.path.stat().st_size == 0


def test_a_folder_without_record_reads_as_nothing(tmp_path: Path) -> None:
    assert list(read_record(tmp_path / "none")) == []


def test_cut_back_forgets_what_the_resumed_run_does_again(tmp_path: Path) -> None:
    record = started(tmp_path)
    for step in range(4):
        record.step(step, {"m": float(step)})
        record.spans([span(step), span(step + 1, "teacher")])
        record.sync(sync(step + 1))
    record.evaluation(evaluation(2))
    record.evaluation(evaluation(4))
    record.warning("an actor died")
    record.end("interrupted")
    record.cut_back(2)
    lines = list(read_record(tmp_path))
    assert [line["step"] for line in lines if line["kind"] == "step"] == [0, 1]
    assert {s.step for s in read_spans(tmp_path) if s.stage != "evaluate"} == {0, 1}
    assert [line["version"] for line in lines if line["kind"] == "evaluation"] == [2]
    assert [line["version"] for line in lines if line["kind"] == "sync"] == [1]
    assert [line["text"] for line in lines if line["kind"] == "warning"] == ["an actor died"]
    assert lines[0]["kind"] == "start"
    assert lines[-1]["kind"] == "resume"
    assert "end" not in kinds(tmp_path)
    assert record.is_started
    assert record.last_step == 1
    record.step(2, {"m": 2.0})
    assert not record.evaluation(evaluation(2, kl=9.0)), "an evaluation that is kept is not repeated"
    assert record.evaluation(evaluation(4))


def test_a_step_is_never_recorded_twice(tmp_path: Path) -> None:
    started(tmp_path).step(0, {})
    with pytest.raises(AssertionError, match="cut_back"):
        RunRecord(tmp_path).step(0, {})


def test_a_crash_during_cut_back_leaves_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = started(tmp_path)
    for step in range(3):
        record.step(step, {})
    before = record.path.read_bytes()

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(record_module.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        record.cut_back(1)
    assert record.path.read_bytes() == before
    monkeypatch.undo()
    again = RunRecord(tmp_path)
    again.cut_back(1)
    assert again.last_step == 0


def test_a_full_disk_is_one_clear_line_and_leaves_whole_lines() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    code = """
import resource, signal, sys, tempfile
from pathlib import Path
from raydistill.errors import RunError
from raydistill.results.record import RunRecord, read_record
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = Path(tempfile.mkdtemp())
record = RunRecord(folder)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    for step in range(100):
        record.step(step, {"m": 1.0})
except RunError as error:
    print(str(error).count("\\n"), "cannot write" in str(error), "resume" in str(error))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
done = [line["step"] for line in read_record(folder)]
assert record.path.read_bytes().endswith(b"\\n") and done == list(range(step)), done
record.step(step, {"m": 1.0})
assert [line["step"] for line in read_record(folder)] == list(range(step + 1))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0 True True"


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_a_run_error(tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IREAD | stat.S_IEXEC)
    with pytest.raises(RunError, match="cannot write"):
        RunRecord(tmp_path)


def test_a_run_folder_that_is_a_file_is_a_run_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(RunError, match="cannot write the run's record"):
        RunRecord(tmp_path / "run")


def test_lines_of_several_threads_do_not_mix(tmp_path: Path) -> None:
    record = started(tmp_path)
    threads = [
        threading.Thread(target=lambda k=k: [record.step(k * 100 + i, {"m": 1.0}) for i in range(100)])
        for k in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(line["step"] for line in read_record(tmp_path) if line["kind"] == "step") == list(range(400))


def test_secrets_do_not_reach_the_file(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    config = {"results": {"uri": "postgresql://me:hunter2@db/x", "tags": {"api_key": "abc123"}}}
    record.start(name="n", config=config, provenance={}, seed=0)
    record.warning("cannot reach postgresql://me:hunter2@db/x")
    record.end("failed", "login with token=abc123 refused")
    text = record.path.read_text()
    assert "hunter2" not in text
    assert "abc123" not in text
