"""Whole runs on the real Ray, vLLM, Ray Train and DeepSpeed: what they record, and what they survive.

A run costs half a minute of start-up, so several tests look at one run, and runs with vLLM share one set of pools.
"""

import asyncio
import json
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_helpers import (
    HF,
    NUM_STEPS,
    QUIET,
    check_bitwise_equal,
    kill_after_step,
    last_weights,
    lines,
    merge,
    serial_config,
)

from raydistill.cli import main_with_errors
from raydistill.config import Config
from raydistill.errors import ResourceError, RunError
from raydistill.launch import Pools, RunSummary, run
from raydistill.messages import EvalReport, Exported, LoadReport, StageReport, StepOutcome
from raydistill.pools import POOL_MAKERS
from raydistill.processes import Member
from raydistill.recovery.checkpoint import checkpoint_folder, read_description
from raydistill.reproduce import reproduce_command
from raydistill.results.query import list_runs
from raydistill.results.record import read_record, read_spans
from raydistill.results.record_lines import encode_line
from raydistill.serving.export import export_run

pytestmark = pytest.mark.ray

INLINE_BYTES = 100_000  # Ray sends smaller return values along with the answer; larger ones only when asked for


@pytest.fixture(scope="module")
def vllm_pools(pools: Pools, make_config: Any) -> Iterator[Pools]:
    """The session's pools with a vLLM actor for these tests: its import is paid once."""
    rollouts = POOL_MAKERS["rollouts"](make_config())
    yield replace(pools, rollouts=rollouts)
    asyncio.run(rollouts.close())


class DriverMailbox:
    """Sees every object that Ray unpacks in this process, whichever way it was asked for."""

    def __init__(self) -> None:
        self.received: list[tuple[int, Any]] = []

    def __enter__(self) -> "DriverMailbox":
        from ray._private.worker import global_worker

        self._worker, usual = global_worker, global_worker.deserialize_objects

        def watch(serialized: Any, refs: Any, *others: Any, **named: Any) -> Any:
            values = usual(serialized, refs, *others, **named)
            for (data, *_), value in zip(serialized, values, strict=True):
                self.received.append((0 if data is None else len(data), value))
            return values

        global_worker.deserialize_objects = watch
        return self

    def __exit__(self, *_: object) -> None:
        del self._worker.deserialize_objects


@pytest.fixture(scope="module")
def overlapped(vllm_pools: Pools, make_config: Any) -> tuple[Config, RunSummary, DriverMailbox]:
    """The default run, S = 1, watched. Micro-batches of one sequence keep the trainer busy for longer than a load."""
    config = make_config(
        run={"name": "overlapped"}, trainer={"sequences_per_micro_batch": 1}, results={"deliver": True}
    )
    with DriverMailbox() as mailbox:
        summary = run(config, vllm_pools, QUIET)
    return config, summary, mailbox


@pytest.fixture(scope="module")
def serial(vllm_pools: Pools, make_config: Any) -> RunSummary:
    """A run with S = 0."""
    return run(serial_config(make_config, "serial"), vllm_pools, QUIET)


def spans_of(summary: RunSummary, stage: str) -> dict[int, tuple[float, float]]:
    """step -> (first start, last end) of one stage."""
    found: dict[int, tuple[float, float]] = {}
    for span in read_spans(summary.folder):
        if span.stage == stage and span.step >= 0:
            start, end = found.get(span.step, (span.start_s, span.end_s))
            found[span.step] = (min(start, span.start_s), max(end, span.end_s))
    return found


def test_the_record_holds_each_step_once_and_ends_well(overlapped: Any) -> None:
    _, summary, _ = overlapped
    assert [line["step"] for line in lines(summary, "step")] == list(range(NUM_STEPS))
    assert [line["version"] for line in lines(summary, "sync")] == list(range(NUM_STEPS + 1))
    assert sorted(line["version"] for line in lines(summary, "evaluation")) == [0, 4, 8]
    assert [line["status"] for line in lines(summary, "end")] == ["finished"]
    assert summary.skipped_steps == 0
    for line in lines(summary, "step"):
        assert np.isfinite(line["metrics"]["trainer/loss"])
        assert line["metrics"]["trainer/staleness_steps"] <= 1


def test_the_results_store_has_the_run(overlapped: Any) -> None:
    config, summary, _ = overlapped
    (row,) = [row for row in list_runs(config.results.uri) if row.name == "overlapped"]
    assert (row.status, row.folder) == ("finished", summary.folder)
    last = lines(summary, "step")[-1]["metrics"]["trainer/loss"]
    assert row.metrics["trainer/loss"] == pytest.approx(last)


def test_the_record_names_the_classes_that_really_ran(overlapped: Any) -> None:
    (table,) = [line for line in lines(overlapped[1], "table") if line["name"] == "engines"]
    classes = {row["role"]: row["class"] for row in table["rows"]}
    assert classes == {"rollout-0": "vllm.LLM", "teacher-0": "Qwen3ForCausalLM"}


def test_trainer_and_engine_agree_at_every_version(overlapped: Any) -> None:
    _, summary, _ = overlapped
    syncs = lines(summary, "sync")
    assert 0 < summary.largest_gap_nats < 1e-5
    assert all(line["gap_mean_nats"] < 1e-5 for line in syncs)
    assert len({line["weights_hash"] for line in syncs}) == NUM_STEPS + 1, "every step made other weights"
    assert len({line["codes_hash"] for line in syncs}) > NUM_STEPS // 2, "and most of them other codes"


def test_trainer_engine_and_export_have_the_same_codes(overlapped: Any) -> None:
    _, summary, _ = overlapped
    checkpoints = summary.folder / "checkpoints"
    trained = read_description(checkpoint_folder(checkpoints, summary.best_version))["codes_hash"]
    engine = {line["version"]: line["codes_hash"] for line in lines(summary, "sync")}[summary.best_version]
    manifest = json.loads((summary.export / "raydistill.json").read_text())
    assert trained == engine == manifest["codes_hash"] == summary.codes_hash
    assert trained is not None


def test_distillation_lowers_the_kl_and_an_exported_folder_alone_gives_it(overlapped: Any, tmp_path: Path) -> None:
    """In a fresh process, somewhere else: the folder knows its teacher and the rows that the run held out."""
    _, summary, _ = overlapped
    kl = {line["version"]: line["metrics"]["evaluate/kl_nats"] for line in lines(summary, "evaluation")}
    assert kl[summary.best_version] == min(kl.values()) < kl[0]
    export_run(summary.folder, tmp_path / "student")
    command = [sys.executable, "-m", "raydistill", "evaluate", "student", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    start = next(read_record(summary.folder))
    assert f"those of the run (fingerprint {start['held_out_fingerprint']})" in done.stderr
    _, student = json.loads(done.stdout)
    assert student["kl_nats"] == pytest.approx(summary.metrics["evaluate/kl_nats"], abs=1e-3)
    assert student["perplexity"] == pytest.approx(summary.metrics["evaluate/perplexity"], rel=1e-3)


def test_the_driver_receives_small_messages_only(overlapped: Any) -> None:
    config, summary, mailbox = overlapped
    vocab_size = json.loads((Path(config.teacher.model) / "config.json").read_text())["vocab_size"]
    tokens = [line["metrics"]["trainer/tokens"] for line in lines(summary, "step")]
    assert min(tokens) * vocab_size * 4 > 2 * INLINE_BYTES, "the teacher's answers are too small to prove anything"
    sizes = [size for size, _ in mailbox.received]
    assert len(sizes) > 5 * NUM_STEPS
    assert max(sizes) < 10_000
    messages = {type(value) for _, value in mailbox.received if type(value).__module__.startswith("raydistill.")}
    # Members of the trainer's group come once, where no earlier test has started it.
    assert messages - {Member} == {StageReport, LoadReport, StepOutcome, EvalReport, Exported}
    assert not any(isinstance(value, (np.ndarray, torch.Tensor)) for _, value in mailbox.received)


def test_rollouts_of_the_next_step_overlap_the_trainer_at_staleness_1(overlapped: Any) -> None:
    """How long they overlap is a matter of speed: a step of this tiny student may end while its engine still loads."""
    _, summary, _ = overlapped
    rollout, trainer = spans_of(summary, "rollout"), spans_of(summary, "trainer")
    pairs = [(rollout[step + 1], trainer[step]) for step in trainer if step + 1 in rollout]
    assert len(pairs) == NUM_STEPS - 1
    overlapping = [pair for pair in pairs if pair[0][0] < pair[1][1] and pair[1][0] < pair[0][1]]
    assert len(overlapping) > len(pairs) // 2


def test_stages_follow_one_another_at_staleness_0(serial: RunSummary) -> None:
    rollout, teacher, trainer = (spans_of(serial, stage) for stage in ("rollout", "teacher", "trainer"))
    for step in range(1, 3):
        assert rollout[step][0] >= trainer[step - 1][1]
    for step in range(3):
        assert rollout[step][1] <= trainer[step][0]
        assert teacher[step][1] <= trainer[step][0]
    assert all(line["metrics"]["trainer/staleness_steps"] == 0 for line in lines(serial, "step"))


def test_a_serial_run_with_vllm_is_reproduced_bit_for_bit_by_other_actors(serial: RunSummary, capsys: Any) -> None:
    assert main_with_errors(reproduce_command, [str(serial.folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [], "no version, loss or held-out metric differs"
    again = replace(serial, folder=serial.folder.with_name("serial-reproduced"))
    check_bitwise_equal(serial, again, num_steps=3)


def test_reproduce_names_changed_data_before_it_starts(serial: RunSummary, tmp_path: Path, capsys) -> None:
    start = next(read_record(serial.folder))
    rows = Path(start["config"]["data"]["path"]).read_text().splitlines(keepends=True)
    data = start["config"]["data"]["path"] = str(tmp_path / "train.jsonl")
    folder = tmp_path / "out" / "runs" / "first"
    folder.mkdir(parents=True)
    (folder / "record.jsonl").write_bytes(encode_line(start))
    found = {}
    for name, kept in {"same": rows, "changed": rows[:-1]}.items():
        Path(data).write_text("".join(kept))
        code = main_with_errors(reproduce_command, [str(folder), "--check", "--json"])
        found[name] = code, [row["what"] for row in json.loads(capsys.readouterr().out)]
    assert found == {"same": (0, []), "changed": (1, ["data fingerprint"])}
    assert not (folder.parent / "first-reproduced").exists()


def test_a_serial_run_with_two_trainer_workers_and_a_loss_of_ones_own_repeats_bit_for_bit_in_a_notebook(
    pools: Pools, make_config: Any, job_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(job_folder)
    trainer = {"num_workers": 2, "sequences_per_micro_batch": 2}
    configs = [serial_config(make_config, f"two-workers-{i}", trainer=trainer, **HF) for i in range(2)]
    own = {"divergence": "my_losses:skew_kl", "beta": 0.1}
    script, notebook = (
        config.model_copy(update={"objective": config.objective.model_copy(update=own)}) for config in configs
    )

    async def cell() -> RunSummary:
        return run(notebook, pools, QUIET)

    summaries = [run(script, pools, QUIET), asyncio.run(cell())]
    check_bitwise_equal(*summaries, num_steps=3)
    assert all(summary.largest_gap_nats < 1e-5 for summary in summaries)


def test_a_served_adapter_trains_and_keeps_its_codes(vllm_pools: Pools, make_config: Any) -> None:
    config = make_config(
        run={"name": "served"}, adapter={"mode": "served"}, trainer={"num_steps": 3}, evaluation={"eval_every": 3}
    )
    summary = run(config, vllm_pools, QUIET)
    syncs = lines(summary, "sync")
    assert summary.largest_gap_nats < 1e-5
    assert len({line["weights_hash"] for line in syncs}) == 4
    assert {line["codes_hash"] for line in syncs} == {summary.codes_hash}, "Q(W) is frozen"
    assert summary.codes_hash is not None
    assert json.loads((summary.export / "raydistill.json").read_text())["codes_hash"] == summary.codes_hash
    assert (summary.export / "adapter").is_dir()


def test_cross_entropy_on_the_data_set_needs_neither_teacher_nor_rollouts(pools: Pools, make_config: Any) -> None:
    config = make_config(
        run={"name": "gold"},
        objective={"on_policy_fraction": 0.0, "distill_weight": 0.0, "ce_weight": 1.0},
        trainer={"num_steps": 4, "gradient_checkpointing": True},
    )
    assert not config.needs_rollout_pool and not config.needs_teacher
    summary = run(config, replace(pools, rollouts=None, teachers=None), QUIET)
    assert [line["step"] for line in lines(summary, "step")] == [0, 1, 2, 3]
    perplexity = {line["version"]: line["metrics"]["evaluate/perplexity"] for line in lines(summary, "evaluation")}
    assert perplexity[4] < perplexity[0]
    assert "evaluate/kl_nats" not in summary.metrics
    assert {span.stage for span in read_spans(summary.folder)} == {"trainer", "wait", "evaluate"}


@pytest.fixture(scope="module")
def nan_teacher(tiny_world: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A teacher that knows one word as NaN, and 16 rows of which exactly one holds it: one bad step in an epoch."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from raydistill.demo.tokenizer import encode_chats

    folder = tmp_path_factory.mktemp("nan")
    tokenizer = AutoTokenizer.from_pretrained(tiny_world.teacher_folder)
    rows = [json.loads(line) for line in tiny_world.train_path.read_text().splitlines()]
    pairs = encode_chats(tokenizer, [row["messages"] for row in rows])
    tokens = [{*prompt, *completion} for prompt, completion in pairs]
    (poison, _), *_ = reversed(Counter(token for row in tokens for token in row).most_common())
    good = [row for row, ids in zip(rows, tokens, strict=True) if poison not in ids]
    bad = [row for row, ids in zip(rows, tokens, strict=True) if poison in ids]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*good[:15], bad[0]]))
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in good[15:23]))
    model = AutoModelForCausalLM.from_pretrained(tiny_world.teacher_folder)
    head = model.get_output_embeddings().weight.detach().clone()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(head)
    with torch.no_grad():
        model.get_input_embeddings().weight[poison] = float("nan")
    model.save_pretrained(folder / "teacher")
    for file in tiny_world.teacher_folder.iterdir():
        if not (folder / "teacher" / file.name).exists():
            shutil.copyfile(file, folder / "teacher" / file.name)
    data = {"path": str(folder / "train.jsonl"), "eval_path": str(folder / "held_out.jsonl"), "eval_rows": 8}
    return folder / "teacher", data


def nan_config(make_config: Any, nan_teacher: Any, name: str, allowed: float) -> Config:
    teacher, data = nan_teacher
    config: Config = make_config(
        run={"name": name},
        teacher={"model": str(teacher)},
        data=data,
        objective={"on_policy_fraction": 0.0, "target": "top_k", "top_k": 16},
        trainer={
            "num_steps": 4,
            "sequences_per_step": 4,
            "sequences_per_micro_batch": 2,
            "max_skipped_fraction": allowed,
        },
    )
    return config


def test_a_step_whose_teacher_answers_nan_is_skipped_and_counted(
    vllm_pools: Pools, make_config: Any, nan_teacher: Any
) -> None:
    summary = run(
        nan_config(make_config, nan_teacher, "nan", 0.25),
        replace(vllm_pools, rollouts=None),
        QUIET,
    )
    assert summary.skipped_steps == 1
    steps = lines(summary, "step")
    assert [line["step"] for line in steps] == [0, 1, 2, 3]
    bad = [line["step"] for line in steps if not np.isfinite(line["metrics"]["trainer/loss"])]
    assert len(bad) == 1
    warnings = [line["text"] for line in lines(summary, "warning")]
    assert warnings == [f"step {bad[0]} was skipped: teacher answers are NaN or infinite"]
    assert all(np.isfinite(tensor).all() for tensor in last_weights(summary, 4).values())
    assert np.isfinite(summary.metrics["evaluate/kl_nats"])


def test_more_skipped_steps_than_allowed_stop_the_run(vllm_pools: Pools, make_config: Any, nan_teacher: Any) -> None:
    config = nan_config(make_config, nan_teacher, "too-many-nan", 0.0)
    with pytest.raises(RunError, match=r"1 steps were skipped.*teacher answers are NaN.*max_skipped_fraction=0.0"):
        run(config, replace(vllm_pools, rollouts=None), QUIET)
    *_, end = read_record(config.run.output / "runs" / "too-many-nan")
    assert (end["kind"], end["status"]) == ("end", "failed")


def test_a_rollout_actor_killed_mid_run_is_replaced_and_no_step_is_lost(
    pools: Pools, ray_cluster: Any, make_config: Any
) -> None:
    config = make_config(
        run={"name": "killed"},
        **merge(HF, {"rollout": {"num_actors": 2}}),
        objective={"on_policy_fraction": 1.0},
        trainer={"num_steps": 6},
    )
    rollouts = POOL_MAKERS["rollouts"](config)
    pid = ray_cluster.get(rollouts.prepare()[0])
    killer = threading.Thread(target=kill_after_step, args=(config.run.output / "runs" / "killed", 1, pid), daemon=True)
    killer.start()
    try:
        summary = run(config, replace(pools, rollouts=rollouts), QUIET)
        assert ray_cluster.get(rollouts.prepare()[0]) != pid
    finally:
        asyncio.run(rollouts.close())
    killer.join(60)
    assert not killer.is_alive()
    assert [line["step"] for line in lines(summary, "step")] == list(range(6))
    assert Counter(line["metrics"]["trainer/tokens"] > 0 for line in lines(summary, "step")) == {True: 6}
    # Every step trained on its 8 sequences, whoever sampled them.
    sampled = Counter(span.step for span in read_spans(summary.folder) if span.stage == "rollout")
    assert sampled == dict.fromkeys(range(6), 2)
    assert summary.largest_gap_nats < 1e-5


def test_a_placement_that_does_not_fit_says_what_the_cluster_has(ray_cluster: Any, make_config: Any) -> None:
    config = make_config(run={"name": "too-large"}, teacher={"num_gpus": 2}, trainer={"num_gpus": 1})
    with pytest.raises(ResourceError, match=r"needs 3 GPUs \(trainer 1 x 1, teacher 1 x 2\).*the cluster has 0;"):
        run(config, None, QUIET)
    assert not (config.run.output / "runs" / "too-large").exists()
