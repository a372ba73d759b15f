"""How an attempt at a run ends: how much patience its ranks meet, and who is ended after whom."""

import asyncio
import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from raydistill import attempt as attempt_module
from raydistill.actors import rollout, vllm_engine
from raydistill.actors.vllm_settings import lora_options
from raydistill.attempt import Attempt
from raydistill.config import Config
from raydistill.errors import LostError, RunError, RunStopped, UserError
from raydistill.launch import CLOSE_S, Launch, run
from raydistill.messages import Exported, TokenRows
from raydistill.models import StudentSpec
from raydistill.recovery.resume import ResumePoint
from raydistill.report import plots
from raydistill.roles import PATIENCE_S, Pools
from raydistill.sweep.host import SweepHost
from raydistill.sweep.spec import load_sweep
from raydistill.trainer.crew import GIVE_UP_S, HURRY_S

PREPARATION_S = 20.0
START = ResumePoint(folder=None, version=0, skipped=0, steps={})


async def forever(*_: Any) -> None:
    await asyncio.Event().wait()


class Crew:
    """Notes how it is ended."""

    def __init__(self) -> None:
        self.patience_s: list[float] = []

    async def end(self, patience_s: float) -> None:
        self.patience_s.append(patience_s)


class Trainer:
    """A group whose ranks never finish; its feed may not answer either."""

    is_done = False

    def __init__(self, *_: Any) -> None:
        self.finishing = asyncio.Event()

    async def finish(self) -> None:
        self.finishing.set()
        await forever()

    async def stop(self) -> None:
        await forever()


def make_attempt(monkeypatch: pytest.MonkeyPatch, train: Callable[..., Any]) -> tuple[Any, Crew]:
    crew = Crew()
    monkeypatch.setattr(attempt_module, "TrainerGroup", Trainer)
    monkeypatch.setattr(Attempt, "_train", train)
    inputs: Any = SimpleNamespace(config=Config(), probes=lambda: None)
    record: Any = SimpleNamespace(path=Path("runs/one/record.jsonl"))
    keeper: Any = None
    pools = Pools(trainers=SimpleNamespace(lease=lambda config: crew))
    return Attempt(inputs, pools, record, keeper, START), crew


async def stopped(*_: Any) -> None:
    raise RunStopped(3)


async def lost(*_: Any) -> None:
    raise LostError("a rank died")


def test_a_checkpoint_that_takes_too_long_is_not_waited_for_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline comes while the ranks write: they are ended in a hurry, as in the midst of a step."""

    async def whole() -> list[float]:
        attempt, crew = make_attempt(monkeypatch, stopped)
        running = asyncio.ensure_future(attempt.run(None, {}))
        await attempt._trainer.finishing.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        return crew.patience_s

    assert asyncio.run(whole()) == [HURRY_S]


def test_a_group_that_is_lost_while_it_stops_is_ended_in_a_hurry_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async def whole(asks: bool) -> list[float]:
        attempt, crew = make_attempt(monkeypatch, lost)
        if asks:
            asking = asyncio.ensure_future(attempt.stop())
            await asyncio.sleep(0)
            asking.cancel()
        with pytest.raises(LostError):
            await attempt.run(None, {})
        return crew.patience_s

    assert asyncio.run(whole(asks=True)) == [HURRY_S]
    assert asyncio.run(whole(asks=False)) == [GIVE_UP_S]


@pytest.mark.parametrize("run", [stopped, lost])
@pytest.mark.parametrize("is_stopped", [True, False])
def test_pools_of_a_run_that_was_stopped_are_closed_in_a_hurry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_stopped: bool, run: Any
) -> None:
    """And nothing is asked of actors that are about to be ended: one that samples would answer seconds later. A trainer that is
    lost on the way is not started again."""
    events: list[Any] = []

    class Pool:
        async def end(self, run: str) -> None:
            events.append("asked")

        async def close(self, patience_s: float | None = None) -> None:
            events.append(patience_s)

    class Attempts:
        def __init__(self, *_: Any) -> None:
            pass

    Attempts.run = run  # type: ignore[attr-defined]
    monkeypatch.setattr(attempt_module, "Attempt", Attempts)
    launch: Any = Launch(Config(), None, Console(quiet=True))
    launch._folder, launch._pools = tmp_path, Pools(rollouts=Pool(), trainers=Pool())
    launch._inputs = SimpleNamespace(data=SimpleNamespace(held_out=()))
    if is_stopped:
        launch._clock.start()
    gives_up = run is lost and not is_stopped  # after a few attempts
    with pytest.raises(RunError if gives_up else RunStopped):
        asyncio.run(launch._train(SimpleNamespace(last_step=None, warning=lambda text: None), START))
    assert events == [None, CLOSE_S if is_stopped else PATIENCE_S]


def test_a_signal_during_the_preparation_ends_the_command_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A world's teacher may train for minutes, and a storage may hang; nothing waits for either."""
    give_up, threads = threading.Event(), list[threading.Thread]()

    def load(*_: Any) -> None:
        threads.append(threading.current_thread())
        os.kill(os.getpid(), signal.SIGINT)
        give_up.wait(PREPARATION_S)

    monkeypatch.setattr("raydistill.inputs.load_inputs", load)
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            run(Config.model_validate({"run": {"output": tmp_path}}), console=Console(quiet=True))
    finally:
        took_s = time.monotonic() - start
        give_up.set()
        threads[0].join()
    assert took_s < PREPARATION_S / 2


def test_a_run_is_not_trained_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted at 7, and now asked for 4: said before the record, and before anything is trained."""
    at_7 = ResumePoint(folder=tmp_path, version=7, skipped=0, steps={})
    config = Config.model_validate({"run": {"output": tmp_path, "name": "a"}, "trainer": {"num_steps": 4}})
    inputs = SimpleNamespace(config=config, data=SimpleNamespace(fingerprint="data-1"))
    monkeypatch.setattr("raydistill.inputs.load_inputs", lambda *_: inputs)
    monkeypatch.setattr("raydistill.recovery.resume.find_checkpoint", lambda *_: at_7)
    monkeypatch.setattr("raydistill.preflight.placement.check_placement", lambda *_: None)
    monkeypatch.setattr("raydistill.preflight.placement.node_resources", lambda *_: [])
    monkeypatch.setattr("ray.nodes", list)
    monkeypatch.setattr("raydistill.launch.start_cluster", lambda _: None)
    monkeypatch.setattr("raydistill.preflight.plan.make_plan", lambda *_: {})
    monkeypatch.setattr("raydistill.preflight.findings.findings_of", lambda *_: [])
    monkeypatch.setattr("raydistill.preflight.findings.gpu_findings", lambda *_: [])
    with pytest.raises(UserError, match=r"^trainer\.num_steps=4, but .*runs/a has trained 7 steps already"):
        run(config, console=Console(quiet=True))
    assert not (tmp_path / "runs" / "a" / "record.jsonl").exists()


def test_plots_that_do_not_fit_the_disk_end_the_run_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def export(*_: Any) -> Exported:
        return Exported(codes_hash="c")

    monkeypatch.setattr(plots, "plot_training", full)
    launch: Any = Launch(Config(), None, Console(quiet=True))
    launch._folder = tmp_path
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / "checkpoint.json").write_text("{}")
    attempt: Any = SimpleNamespace(evaluator=SimpleNamespace(export_checkpoint=export))
    keeper: Any = SimpleNamespace(best_version=2, folder=lambda version: tmp_path / "step")
    record: Any = SimpleNamespace(artifact=lambda name, path: None)
    with pytest.raises(RunError, match=r"^cannot write the run's plots to .*plots: No space left on device"):
        asyncio.run(launch._export(record, attempt, keeper, None))


def test_an_engine_of_a_sweep_holds_a_served_adapter_for_each_trial_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def inputs_spec() -> Any:
        student = StudentSpec.of(config)
        probes = TokenRows.from_rows([[1, 2]])
        return rollout.EngineSpec(
            student=student, rollout=config.rollout, max_model_len=64, eos_ids=(1,), probes=probes
        )

    kinds = ("rollouts", "teachers", "evaluator", "trainers")
    monkeypatch.setattr("raydistill.pools.POOL_MAKERS", dict.fromkeys(kinds, lambda config: object()))
    file = tmp_path / "lr.toml"
    file.write_text(
        'parallel = 3\n[settings]\n"adapter.mode" = "served"\n[space]\n"trainer.learning_rate" = [1e-3, 2e-3]'
    )
    sweep = load_sweep(file, ["--run.output", str(tmp_path)])
    assert sweep.points is not None
    config = sweep.config_of(sweep.points[0], "lr-000")
    attempt = Attempt.__new__(Attempt)
    attempt._pools = SweepHost(sweep, "id")._pools.lease("lr-000", config)
    attempt._inputs = SimpleNamespace(engine_spec=inputs_spec)  # type: ignore[assignment]
    built: list[Any] = []
    monkeypatch.setattr(vllm_engine, "VllmEngine", lambda *arguments: built.append(arguments))
    rollout._build(attempt._engine_spec())
    assert built[0][-1] == 3
    assert lora_options(config.adapter.rank, config.adapter.targets, 3)["max_loras"] == 3
