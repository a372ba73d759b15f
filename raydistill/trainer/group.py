"""Driver side of the trainer: Ray Train's blocking `fit()` in a thread, the feed in between.

One group is one attempt. When a rank, the feed or Ray Train's controller dies or hangs, `LostError` says that a
new attempt from the last checkpoint may succeed; any other error would come again.
"""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from raydistill.config import Config
from raydistill.errors import LostError, RunError, RunStopped
from raydistill.messages import StepOutcome, TokenRows
from raydistill.preflight.placement import ROLE_SHARE
from raydistill.processes import Member, actors_of_this_job, end_process
from raydistill.trainer.worker import TrainerJob, train

CONTROLLER = "TrainController"  # Ray Train's actor that starts and watches the ranks
START_TIMEOUT_S = 1800.0  # imports and a large model from a cold disk
GIVE_UP_S = 30.0  # how long a lost group may take to end by itself


class TrainerGroup:
    """Start with `start`; then `offer` steps, wait for `outcome`s, pass on `weights` references, `finish`."""

    def __init__(
        self, config: Config, feed: Any, probes: TokenRows, run_folder: Path, resume_from: Path | None, attempt: int = 0
    ) -> None:
        self._config, self._feed, self._attempt = config, feed, attempt
        self._job = TrainerJob(config=config, probes=probes, feed=feed, run_folder=run_folder, resume_from=resume_from)
        self._failure: BaseException | None = None
        self._members: list[Member] = []
        self._offered: dict[int, float] = {}  # when the ranks got a step's parts
        self._thread = threading.Thread(target=self._fit, name="ray-train-fit", daemon=True)

    def start(self) -> None:
        """Start the workers; returns at once."""
        self._thread.start()

    def _fit(self) -> None:
        section = self._config.trainer
        resources = {"CPU": section.num_cpus}
        if section.num_gpus > 0:
            resources["GPU"] = section.num_gpus
        if self._config.cluster.by_role:
            resources["trainer"] = ROLE_SHARE
        job = self._job
        trainer = TorchTrainer(
            # A closure: Ray Train's controller would open a train_loop_config, and import the whole trainer for it.
            lambda: train(job),
            scaling_config=ScalingConfig(
                num_workers=section.num_workers, use_gpu=section.num_gpus > 0, resources_per_worker=resources
            ),
            torch_config=TorchConfig(backend="nccl" if section.num_gpus > 0 else "gloo"),
            run_config=RunConfig(
                # Ray Train resumes a name that it knows; our checkpoints are our own, so every attempt has a name.
                name=f"{self._job.run_folder.name}-{self._attempt}",
                storage_path=str(self._job.run_folder / "ray_train"),
                worker_runtime_env={"env_vars": worker_environment(self._config)},
            ),
        )
        try:
            trainer.fit()
        except BaseException as error:
            self._failure = error
            with suppress(RayError):  # a dead feed has nobody left to tell
                ray.get(self._feed.close.remote(f"the trainer group failed: {_last_line(error)}"))

    async def offer(self, step: int, parts: list[list[Any]]) -> None:
        """Hand a step's references to the ranks."""
        await self._within(self._feed.offer.remote(step, parts))
        self._offered[step] = time.monotonic()

    async def outcome(self, step: int) -> StepOutcome:
        """Wait until a step is trained (-1: until the first version is published). RunStopped after `stop`."""
        try:
            outcome: StepOutcome | None
            if step < 0:
                outcome = await self._within(self._feed.outcome.remote(step), START_TIMEOUT_S)
                self._members = await self._within(self._feed.members.remote())
            else:
                outcome = await self._trained(step, self._feed.outcome.remote(step))
        except RunError as error:
            raise await self._cause(error, f"step {step}: " if step >= 0 else "") from error
        if outcome is None:
            raise RunStopped(step)
        return outcome

    def weights(self, version: int) -> Any:
        """A reference to a published version; the driver never fetches it."""
        return self._feed.weights.remote(version)

    async def stop(self) -> None:
        """Ask the ranks to checkpoint and leave before the next step that none has begun."""
        await self._within(self._feed.stop.remote())

    async def finish(self) -> None:
        """Wait for the workers to end."""
        await asyncio.to_thread(self._thread.join, self._config.trainer.timeout_s)
        if self._thread.is_alive():
            limit = self._config.trainer.timeout_s
            raise LostError(f"the trainer group did not end within trainer.timeout_s={limit:g}")
        if self._failure is not None:
            raise await self._cause(self._failure, "the trainer group failed: ") from self._failure

    async def _trained(self, step: int, ref: Any) -> Any:
        """The answer; its time runs while the ranks have the step's parts: actors that make them have limits of their own."""
        limit, start = self._config.trainer.timeout_s, time.monotonic()
        answer = asyncio.ensure_future(self._answer(ref))
        try:
            while True:
                since = self._offered.get(step)
                left = limit if since is None else max(since, start) + limit - time.monotonic()
                done, _ = await asyncio.wait({answer}, timeout=max(left, 0.0))
                if done:
                    return answer.result()
                if since is not None:
                    raise _silent(limit)
        finally:
            answer.cancel()
            self._offered.pop(step, None)

    async def _within(self, ref: Any, timeout_s: float | None = None) -> Any:
        limit = timeout_s or self._config.trainer.timeout_s
        try:
            return await asyncio.wait_for(self._answer(ref), limit)
        except TimeoutError as error:
            raise _silent(limit) from error

    async def _answer(self, ref: Any) -> Any:
        try:
            return await asyncio.wrap_future(ref.future())
        except RayActorError as error:
            raise LostError(f"the trainer's feed died: {_last_line(error)}") from error
        except RayError as error:
            raise RunError(_last_line(error)) from error

    async def _cause(self, error: BaseException, where: str) -> RunError:
        """Why the group failed: an error that a rank met would come again, a death is worth another attempt."""
        fatal: str | None = None
        with suppress(RayError, TimeoutError):
            fatal = await asyncio.wait_for(asyncio.wrap_future(self._feed.fatal.remote().future()), GIVE_UP_S)
        if fatal is not None:
            return RunError(f"{where}{fatal}")
        return LostError(f"{where}{_last_line(self._failure or error)}")

    async def abort(self, reason: str, patience_s: float = GIVE_UP_S) -> None:
        """End the ranks, whatever state they are in; afterwards none of them can write a checkpoint.

        patience_s: how long they may take to end by themselves.
        """
        with suppress(RayError, TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(self._feed.close.remote(reason).future()), patience_s)
        await self._joined(patience_s)
        if self._thread.is_alive():  # a stopped process hears nothing but the kernel
            for member in self._members:
                await asyncio.to_thread(end_process, member)
            await self._joined(patience_s)
        if self._thread.is_alive():
            for member in await asyncio.to_thread(actors_of_this_job, CONTROLLER):
                await asyncio.to_thread(end_process, member)
            await self._joined(patience_s)

    async def _joined(self, timeout_s: float) -> None:
        await asyncio.to_thread(self._thread.join, timeout_s)


def worker_environment(config: Config) -> dict[str, str]:
    """Environment of a trainer worker, set before torch is imported."""
    if config.trainer.num_gpus > 0:
        return {"TOKENIZERS_PARALLELISM": "false"}
    # Ray hides no GPU from a worker that booked none.
    return {
        "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""
    }  # fmt: skip


def _silent(limit_s: float) -> LostError:
    return LostError(f"the trainer did not answer within {limit_s:g} s (trainer.timeout_s)")


def _last_line(error: BaseException) -> str:
    """The line of a nested remote traceback that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
