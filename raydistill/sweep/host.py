"""The sweep's host: one process that drives all trials, so that they share pools, data and what was imported.

An async Ray actor. Ray Tune's trial processes are thin: each asks the host to `run` its trial and passes the reports on to
Tune. A host that dies is started again by Ray, and its trials go on from their checkpoints.
"""

from __future__ import annotations

import asyncio
import os
import resource
import time
import uuid
from collections.abc import Mapping
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console

from raydistill.config import Config
from raydistill.errors import Stopped
from raydistill.messages import EvalReport
from raydistill.sweep.identity import check_run
from raydistill.sweep.spec import Sweep
from raydistill.sweep.state import SHARES

if TYPE_CHECKING:
    from raydistill.launch import Launch, RunSummary

STOP_TIMEOUT_S = 60.0
CONSOLE_WIDTH = 160
Reports = asyncio.Queue[dict[str, float] | None]


class SweepHost:
    """Runs trials; called by their processes (`run`, `next_report`, `stop`) and by the sweep's driver."""

    def __init__(self, sweep: Sweep, record_id: str) -> None:
        for variable, value in (("OMP_NUM_THREADS", "1"), ("TOKENIZERS_PARALLELISM", "false")):
            os.environ.setdefault(variable, value)
        from raydistill.pools import POOL_MAKERS
        from raydistill.sweep.shared import SharedPools

        self._sweep, self._record_id = sweep, record_id
        self._life = uuid.uuid4().hex[:8]
        self._pools = SharedPools(POOL_MAKERS, sweep.file.parallel)
        self._datasets: dict[str, Any] = {}
        self._reports: dict[str, Reports] = {}
        self._room = asyncio.Semaphore(sweep.file.parallel)
        self._running: dict[str, asyncio.Task[RunSummary]] = {}  # also those that wait for room
        self._launches: dict[str, Launch] = {}
        self._failed: dict[str, Exception] = {}

    async def ready(self) -> int:
        """The process id, once the slow imports are done."""
        return os.getpid()

    async def run(self, name: str, point: Mapping[str, Any]) -> dict[str, Any]:
        """Run one trial, the base config with the values of `point`, to its end; an unfinished run of this name goes on.

        Returns its summary as plain JSON types, with what was shared so far (`shares`). One that failed is not run again: Tune
        asks a second time, as it does after the death of a trial's process.
        """
        reports = self._reports[name] = asyncio.Queue()
        try:  # whatever happens, whoever asks for reports is to hear that there are no more
            if name in self._failed:
                raise self._failed[name]
            await self.stop(name)  # of an earlier process of this trial
            task = self._running[name] = asyncio.ensure_future(self._run(name, point, reports))
            summary = await task
        except Stopped:
            raise
        except Exception as error:
            self._failed[name] = error
            raise
        finally:
            reports.put_nowait(None)
        return {**summary.to_json(), SHARES: await self.shares()}

    async def _run(self, name: str, point: Mapping[str, Any], reports: Reports) -> RunSummary:
        from raydistill.launch import RunSummary
        from raydistill.recovery.bring import bring_record
        from raydistill.recovery.resume import run_storage

        try:
            config = self._sweep.config_of(point, name)
            folder = (config.run.output / "runs" / name).absolute()
            storage = run_storage(config, folder)
            if storage is not None:
                await asyncio.to_thread(bring_record, folder, storage)
            check_run(folder, self._record_id)
            finished = RunSummary.of_finished(folder)
            if finished is not None:  # it ended just before whoever asked for it did
                return finished
            logs = self._sweep.folder / "logs"
            logs.mkdir(parents=True, exist_ok=True)
            # Ray Tune starts the next trial as soon as it has told one to stop, which holds its pools and ranks meanwhile.
            async with self._room:
                with (logs / f"{name}.log").open("a") as log:
                    return await self._launch(name, config, log, reports)
        finally:
            self._running.pop(name, None)

    async def _launch(self, name: str, config: Config, log: IO[str], reports: Reports) -> RunSummary:
        from raydistill.launch import Launch, Within

        def tell(report: EvalReport) -> None:
            reports.put_nowait({"version": float(report.version), **report.metrics})

        console = Console(file=log, width=CONSOLE_WIDTH, highlight=False, markup=False)
        within = Within(datasets=self._datasets, parent=self._record_id)
        try:
            pools = self._pools.lease(name, config)
            launch = Launch(config, pools, console, within=within, on_evaluation=tell)
            self._launches[name] = launch
            return await launch.run()
        finally:
            self._launches.pop(name, None)
            self._pools.release(name)

    async def next_report(self, name: str) -> dict[str, float] | None:
        """Wait for a trial's next evaluation; None: there are no more."""
        while name not in self._reports:
            await asyncio.sleep(0.1)  # `run` is on its way
        return await self._reports[name].get()

    async def stop(self, name: str) -> None:
        """Let a trial write a checkpoint and leave; harmless where it does not run."""
        if name not in self._running:
            return
        task, launch = self._running[name], self._launches.get(name)
        try:
            if launch is not None:  # else it waits for room
                await launch.stop()
                await asyncio.wait({task}, timeout=STOP_TIMEOUT_S)
        finally:
            task.cancel()
            await asyncio.wait({task})

    async def stop_all(self) -> None:
        """See `stop`."""
        await asyncio.gather(*(self.stop(name) for name in list(self._running)), return_exceptions=True)

    async def shares(self) -> dict[str, Any]:
        """What the trials shared in this host's life: rows of the teachers, pools started, data sets read, its CPU-seconds."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "life": self._life,
            "teacher_rows": await self._pools.teacher_rows(),
            "pools": self._pools.num_pools(),
            "datasets": len(self._datasets),
            "cpu_s": usage.ru_utime + usage.ru_stime,
            "time_s": time.time(),
        }

    async def shutdown(self) -> None:
        """Stop what runs and end every actor."""
        await self.stop_all()
        await self._pools.close()
