"""What the process that drives all trials does for each, with runs that only pretend."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raydistill.errors import ConfigError, RunError, RunStopped, UserError
from raydistill.launch import SUMMARY_TABLE, RunSummary
from raydistill.results.record import RunRecord
from raydistill.sweep.host import SweepHost
from raydistill.sweep.shared import SharedPools
from raydistill.sweep.spec import load_sweep

RECORD_ID = "id-of-the-sweep"
OPTUNA = 'sampler = "optuna"\nnum_samples = 4\n'
QUANT = (
    '[settings]\n"quant.scale" = "absmax"\n[space]\n"quant.format" = ["int4", "nf4"]\n"quant.symmetric" = [true, false]'
)
RATE, POINT = '[space]\n"trainer.learning_rate" = [1e-3]', {"trainer.learning_rate": 1e-3}
DO_NOT_FIT = {"quant.format": "nf4", "quant.symmetric": False}
PATIENCE_S = 20.0


class Pool:
    async def counts(self) -> dict[str, int]:
        return {"computed_rows": 0, "kept_rows": 0}


class Runs:
    """Stands for `launch.Launch`: a run goes on until it is let go, and leaves some time after it was told to stop."""

    def __init__(self) -> None:
        self.at_work: list[str] = []
        self.most = 0
        self.names: list[str] = []
        self.go = asyncio.Event()

    def launch(self, config: Any, *_: Any, **__: Any) -> Any:
        runs, name = self, str(config.run.name)

        class Launch:
            def __init__(self) -> None:
                self.end = asyncio.Event()

            async def run(self) -> RunSummary:
                runs.names.append(name)
                runs.at_work.append(name)
                runs.most = max(runs.most, len(runs.at_work))
                try:
                    await asyncio.wait(
                        [asyncio.ensure_future(runs.go.wait()), asyncio.ensure_future(self.end.wait())],
                        return_when=asyncio.FIRST_COMPLETED,
                    )
                    await asyncio.sleep(0.05)
                finally:
                    runs.at_work.remove(name)
                return summary(name)

            async def stop(self) -> None:
                self.end.set()

        return Launch()


def summary(name: str) -> RunSummary:
    return RunSummary(
        name=name,
        folder=Path(name),
        export=Path(name) / "export",
        best_version=3,
        metrics={"evaluate/kl_nats": 0.1},
        codes_hash=None,
        largest_gap_nats=0.0,
        skipped_steps=0,
        bottleneck="",
        trainer_wait_share=0.0,
        rollout_tokens_per_cpu_s=None,
    )


def host_of(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch, *arguments: str, **changes: Any) -> Any:
    """A host of this sweep, and the runs that it starts."""
    path = tmp_path / "lr.toml"
    path.write_text(text)
    sweep = load_sweep(path, ["--run.output", str(tmp_path / "out"), *arguments], **changes)
    runs, host = Runs(), SweepHost(sweep, RECORD_ID)
    kinds = ("rollouts", "teachers", "evaluator", "trainers")
    host._pools = SharedPools({kind: lambda config: Pool() for kind in kinds}, sweep.file.parallel)
    monkeypatch.setattr("raydistill.launch.Launch", runs.launch)
    return host, runs


def test_a_trial_whose_values_do_not_fit_together_fails_and_whoever_waits_for_its_reports_hears_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, runs = host_of(tmp_path, OPTUNA + QUANT, monkeypatch)

    async def trial() -> None:
        running = asyncio.ensure_future(host.run("lr-000", DO_NOT_FIT))
        assert await asyncio.wait_for(host.next_report("lr-000"), PATIENCE_S) is None
        with pytest.raises(ConfigError, match=r"quant\.symmetric=false with a codebook"):
            await running

    asyncio.run(trial())
    assert runs.names == []


def test_a_trial_that_fails_before_it_begins_holds_no_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host, _ = host_of(tmp_path, RATE, monkeypatch)
    host._sweep.folder.mkdir(parents=True)
    (host._sweep.folder / "logs").write_text("no folder")

    async def trial() -> None:
        running = asyncio.ensure_future(host.run("lr-000", POINT))
        assert await asyncio.wait_for(host.next_report("lr-000"), PATIENCE_S) is None
        with pytest.raises(FileExistsError):
            await running

    asyncio.run(trial())
    assert not any(slot.runs for slots in host._pools._slots.values() for slot in slots)


def test_a_trial_that_failed_is_not_run_again_and_one_that_was_stopped_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tune asks twice for each trial: the first time its process may have died."""
    host, runs = host_of(tmp_path, RATE, monkeypatch)
    errors = iter([RunStopped(3), RunError("the teacher is gone")])

    async def fails(self: Any) -> RunSummary:
        runs.names.append("lr-000")
        raise next(errors)

    launch = runs.launch

    def failing(*arguments: Any, **more: Any) -> Any:
        one = launch(*arguments, **more)
        one.run = fails.__get__(one)
        return one

    monkeypatch.setattr("raydistill.launch.Launch", failing)
    with pytest.raises(RunStopped):
        asyncio.run(host.run("lr-000", POINT))
    for _ in range(2):
        with pytest.raises(RunError, match="the teacher is gone"):
            asyncio.run(host.run("lr-000", POINT))
    assert len(runs.names) == 2


def test_a_trial_that_ends_answers_with_its_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host, runs = host_of(tmp_path, RATE, monkeypatch)

    async def trial() -> dict[str, Any]:
        runs.go.set()
        running = asyncio.ensure_future(host.run("lr-000", POINT))
        assert await asyncio.wait_for(host.next_report("lr-000"), PATIENCE_S) is None
        ended: dict[str, Any] = await running
        return ended

    ended = asyncio.run(trial())
    assert ended["metrics"] == {"evaluate/kl_nats": 0.1}
    assert ended["shares"]["datasets"] == 0


@pytest.mark.parametrize(("parent", "is_adopted"), [(RECORD_ID, True), ("of-another", False), (None, False)])
def test_a_finished_run_is_taken_over_if_it_belongs_to_this_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parent: str | None, is_adopted: bool
) -> None:
    host, runs = host_of(tmp_path, RATE, monkeypatch)
    with RunRecord(tmp_path / "out" / "runs" / "lr-000") as record:
        record.start(name="lr-000", config={}, provenance={}, seed=0, parent=parent)
        record.table(SUMMARY_TABLE, [summary("lr-000").to_json()])
        record.end("finished")
    if is_adopted:
        ended = asyncio.run(host.run("lr-000", POINT))
        assert ended["metrics"] == {"evaluate/kl_nats": 0.1}
    else:
        with pytest.raises(UserError, match=r"lr-000 is a run of the same name that does not belong .*--resume never"):
            asyncio.run(host.run("lr-000", POINT))
    assert runs.names == []


def test_a_trial_begins_when_the_stopped_one_has_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with ASHA: Ray Tune asks for the next trial at once, and nobody waits for `stop`."""
    host, runs = host_of(tmp_path, RATE, monkeypatch)

    async def trials() -> None:
        first = asyncio.ensure_future(host.run("lr-000", POINT))
        await until(lambda: runs.at_work == ["lr-000"])
        stopping = asyncio.ensure_future(host.stop("lr-000"))
        second = asyncio.ensure_future(host.run("lr-001", POINT))
        await until(lambda: runs.at_work == ["lr-001"])
        runs.go.set()
        await asyncio.gather(first, stopping, second)

    asyncio.run(trials())
    assert (runs.names, runs.most) == (["lr-000", "lr-001"], 1)


def test_a_trial_that_is_stopped_while_it_waits_for_room_never_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, runs = host_of(tmp_path, RATE, monkeypatch)

    async def trials() -> None:
        first = asyncio.ensure_future(host.run("lr-000", POINT))
        await until(lambda: runs.at_work == ["lr-000"])
        second = asyncio.ensure_future(host.run("lr-001", POINT))
        await until(lambda: "lr-001" in host._running)
        await asyncio.wait_for(host.stop("lr-001"), PATIENCE_S)
        assert await asyncio.wait_for(host.next_report("lr-001"), PATIENCE_S) is None
        with pytest.raises(asyncio.CancelledError):
            await second
        runs.go.set()
        await first

    asyncio.run(trials())
    assert (runs.names, host._running) == (["lr-000"], {})


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not is_so():
            await asyncio.sleep(0.01)
