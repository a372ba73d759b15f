"""`raydistill watch`: lines as they come, cut-backs, and frames whose numbers can be counted by hand."""

import io
import threading
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from raydistill.errors import UserError
from raydistill.messages import EvalReport, LoadReport, Span
from raydistill.report import watch
from raydistill.report.watch_frame import frame, sparkline
from raydistill.report.watch_state import WatchState
from raydistill.results.follow import RecordFollower
from raydistill.results.record import RunRecord


def started(folder: Path, num_steps: int = 10) -> RunRecord:
    record = RunRecord(folder)
    record.start(name=folder.name, config={"trainer": {"num_steps": num_steps}}, provenance={}, seed=0)
    return record


def kinds(lines: list[dict[str, Any]]) -> list[str]:
    return [line["kind"] for line in lines]


def shown(state: WatchState, now_s: float = 0.0) -> str:
    out = io.StringIO()
    Console(file=out, width=110).print(frame(state, Path("/runs/[mine]"), now_s))
    return out.getvalue()


def span(stage: str, actor: str, step: int, start_s: float, end_s: float) -> Span:
    return Span(stage=stage, actor=actor, step=step, start_s=start_s, end_s=end_s)  # type: ignore[arg-type]


def test_lines_come_once_each_and_a_torn_one_waits_for_its_end(tmp_path: Path) -> None:
    follower = RecordFollower(tmp_path)
    assert follower.new_lines() == (False, [])
    record = started(tmp_path)
    begins, lines = follower.new_lines()
    assert begins
    assert kinds(lines) == ["start"]
    with record.path.open("ab") as file:
        file.write(b'{"kind":"warning","time_s":1.0,')
        file.flush()
        assert follower.new_lines() == (False, [])
        file.write(b'"text":"w"}\n')
    assert kinds(follower.new_lines()[1]) == ["warning"]
    assert follower.new_lines() == (False, [])


def test_a_cut_record_is_read_anew_even_where_the_file_keeps_its_number(tmp_path: Path) -> None:
    follower, record = RecordFollower(tmp_path), started(tmp_path)
    for step in range(5):
        record.step(step, {"m": float(step)})
    follower.new_lines()
    record.cut_back(2)
    begins, lines = follower.new_lines()
    assert begins
    assert kinds(lines) == ["start", "step", "step", "resume"]
    text = record.path.read_bytes()
    record.path.write_bytes(text[: text.rindex(b'{"kind":"resume"')])
    assert follower.new_lines()[0], "shorter than what was read"
    longer = text.replace(b'"m":0.0', b'"m":9.0') + text[-10:].replace(b"\n", b"")
    record.path.write_bytes(longer)
    begins, lines = follower.new_lines()
    assert begins, "other bytes at the beginning"
    assert lines[1]["metrics"] == {"m": 9.0}


def test_progress_and_time_left_follow_from_the_steps(tmp_path: Path) -> None:
    state = WatchState()
    state.add([{"kind": "start", "time_s": 100.0, "name": "n", "config": {"trainer": {"num_steps": 100}}}])
    assert state.eta_s is None
    state.add({"kind": "step", "time_s": 110.0 + 2 * k, "step": k, "metrics": {"trainer/loss": 1.0}} for k in range(40))
    assert state.steps_done == 40
    assert state.seconds_per_step == 2.0
    assert state.eta_s == 120.0
    assert "40 of 100 steps" in shown(state, now_s=190.0)
    assert "about 2 min 0 s left" in shown(state, now_s=190.0)
    assert "no new line" not in shown(state, now_s=190.0)
    assert "no new line for 5 min 0 s" in shown(state, now_s=188.0 + 300.0)
    state.add([{"kind": "end", "time_s": 200.0, "status": "failed", "message": "loss is NaN"}])
    assert state.eta_s is None
    assert "failed after 1 min 40 s: loss is NaN" in shown(state, now_s=9999.0)
    state.add([{"kind": "resume", "time_s": 300.0, "step": 40}])
    assert state.status == "running"
    assert "resumed 1 time" in shown(state)


def test_stage_shares_are_of_the_recent_wall_time(tmp_path: Path) -> None:
    state = WatchState()
    state.add([{"kind": "step", "time_s": 0.0, "step": 0, "metrics": {}}])
    spans = [
        span("rollout", "rollout-0", 0, 0, 4),
        span("rollout", "rollout-1", 0, 0, 2),
        span("wait", "trainer-0", 0, 0, 5),
        span("trainer", "trainer-0", 0, 5, 10),
    ]
    state.add([{"kind": "spans", "time_s": 0.0, "spans": [_plain(s) for s in spans]}])
    state.add(
        [{"kind": "sync", "time_s": 0.0, "actor": f"rollout-{k}", "version": 1, "seconds": 1.0} for k in range(2)]
    )
    shares = {one.stage: (one.busy, one.waiting) for one in state.stage_shares()}
    assert shares["rollout"] == (pytest.approx(0.3), pytest.approx(0.7))
    assert shares["trainer"] == (pytest.approx(0.5), pytest.approx(0.5))
    assert shares["sync"] == (pytest.approx(0.1), 0.0)


def _plain(one: Span) -> dict[str, Any]:
    return {"stage": one.stage, "actor": one.actor, "step": one.step, "start_s": one.start_s, "end_s": one.end_s}


def test_a_sparkline_goes_from_the_lowest_to_the_highest_and_marks_what_is_no_number() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([1.0, float("nan"), 2.0]) == "▁!█"
    assert sparkline([3.0, 3.0]) == "▁▁"
    assert sparkline([]) == ""
    assert sparkline([float(k // 10) for k in range(80)], width=8) == "▁▂▃▄▅▆▇█"
    assert len(sparkline([0.0] * 1000)) == 48


def test_a_frame_shows_evaluations_samples_queues_and_warnings_without_letting_text_move_the_cursor(
    tmp_path: Path,
) -> None:
    record = started(tmp_path)
    record.step(0, {"trainer/loss": 0.5, "rollout/queue_depth": 3.0})
    for version in range(8):
        metrics = {"evaluate/kl_nats": 0.1 * (version + 1), "evaluate/kl_nats_se": 0.01}
        record.evaluation(EvalReport(version=version, metrics=metrics, span=span("evaluate", "e", version, 0, 1)))
    record.sync(
        LoadReport(
            actor="rollout-0",
            version=1,
            weights_hash="w",
            codes_hash=None,
            gap_mean_nats=None,
            gap_p99_nats=None,
            size_bytes=1,
            seconds=1.0,
        )
    )
    row = {"row_id": "r", "prompt": "one\ntwo", "reference": "x", "teacher": "T", "student": "\x1b[2J[bold]S[/bold]"}
    record.samples(3, [row])
    record.warning("careful")
    record.warning("careful")
    state = WatchState()
    state.add(RecordFollower(tmp_path).new_lines()[1])
    text = shown(state)
    for said in (
        "queue: rollout",
        "0.100 ± 0.010",
        "0.800 ± 0.010",
        "one⏎two",
        "[bold]S[/bold]",
        "careful (2 times)",
        "[mine]",
    ):
        assert said in text, said
    assert "0.200 ± 0.010" not in text, "the first and the last evaluations, not those between"
    assert "\x1b" not in text


def test_the_command_follows_a_run_to_its_end_and_leaves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = started(tmp_path / "runs" / "mine")
    results: list[int] = []
    arguments = ["mine", "--output", str(tmp_path), "--every", "0.01"]
    worker = threading.Thread(target=lambda: results.append(watch.watch_command(arguments)))
    worker.start()
    record.step(0, {"trainer/loss": 0.5})
    assert worker.is_alive()
    record.end("finished")
    worker.join(20)
    assert results == [0]
    assert "1 of 10 steps" in capsys.readouterr().out


def test_one_frame_for_scripts_names_and_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started(tmp_path / "runs" / "older").step(0, {"trainer/loss": 0.5})
    for arguments in (["older"], [str(tmp_path / "runs" / "older")], []):
        assert watch.watch_command([*arguments, "--output", str(tmp_path), "--once"]) == 0
        assert "older" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"did you mean .*older"):
        watch.watch_command(["oldr", "--output", str(tmp_path)])
    with pytest.raises(UserError, match="there is no run in"):
        watch.watch_command(["--output", str(tmp_path / "nothing")])
    with pytest.raises(UserError, match="--every"):
        watch.watch_command(["older", "--every", "0"])


def test_what_a_long_run_leaves_in_memory_is_bounded(tmp_path: Path) -> None:
    state = WatchState()
    plain = [_plain(span("trainer", "t", 0, 0, 1))]
    for step in range(10_000):
        state.add(
            [
                {"kind": "step", "time_s": 0.0, "step": step, "metrics": {}},
                {"kind": "spans", "time_s": 0.0, "spans": plain},
            ]
        )
    assert len(state.steps) <= 400
    assert len(state.spans) <= 4000
    assert state.steps_done == 10_000
