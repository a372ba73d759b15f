"""Driver side of the trainer: Ray Train's blocking `fit()` in a thread, the feed in between."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from raydistill.config import Config
from raydistill.errors import RunError
from raydistill.messages import StepOutcome, TokenRows
from raydistill.trainer.worker import TrainerJob, train


class TrainerGroup:
    """Start with `start`; then `offer` steps, wait for `outcome`s, pass on `weights` references, `finish`."""

    def __init__(self, config: Config, feed: Any, probes: TokenRows, run_folder: Path) -> None:
        self._config, self._feed = config, feed
        self._job = TrainerJob(config=config, probes=probes, feed=feed, run_folder=run_folder)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._fit, name="ray-train-fit", daemon=True)

    def start(self) -> None:
        """Start the workers; returns at once."""
        self._thread.start()

    def _fit(self) -> None:
        section = self._config.trainer
        resources = {"CPU": section.num_cpus}
        if section.num_gpus > 0:
            resources["GPU"] = section.num_gpus
        job = self._job
        trainer = TorchTrainer(
            # A closure: Ray Train's controller would open a train_loop_config, and import the whole trainer for it.
            lambda: train(job),
            scaling_config=ScalingConfig(
                num_workers=section.num_workers, use_gpu=section.num_gpus > 0, resources_per_worker=resources
            ),
            torch_config=TorchConfig(backend="nccl" if section.num_gpus > 0 else "gloo"),
            run_config=RunConfig(
                name=self._job.run_folder.name,
                storage_path=str(self._job.run_folder / "ray_train"),
                worker_runtime_env={"env_vars": worker_environment(self._config)},
            ),
        )
        try:
            trainer.fit()
        except BaseException as error:
            self._failure = error
            ray.get(self._feed.close.remote(f"the trainer group failed: {_last_line(error)}"))

    async def offer(self, step: int, parts: list[list[Any]]) -> None:
        """Hand a step's references to the ranks."""
        await self._within(self._feed.offer.remote(step, parts))

    async def outcome(self, step: int) -> StepOutcome:
        """Wait until a step is trained (-1: until the first version is published)."""
        try:
            outcome: StepOutcome = await self._within(self._feed.outcome.remote(step))
        except RunError as error:
            raise RunError(f"step {step}: {_last_line(self._failure or error)}") from self._failure
        return outcome

    def weights(self, version: int) -> Any:
        """A reference to a published version; the driver never fetches it."""
        return self._feed.weights.remote(version)

    async def finish(self) -> None:
        """Wait for the workers to end."""
        await asyncio.to_thread(self._thread.join, self._config.trainer.timeout_s)
        if self._failure is not None:
            raise RunError(f"the trainer group failed: {_last_line(self._failure)}") from self._failure

    async def _within(self, ref: Any) -> Any:
        try:
            return await asyncio.wait_for(asyncio.wrap_future(ref.future()), self._config.trainer.timeout_s)
        except ray.exceptions.RayError as error:
            raise RunError(_last_line(error)) from error
        except TimeoutError as error:
            limit = self._config.trainer.timeout_s
            raise RunError(f"the trainer did not answer within trainer.timeout_s={limit:g}") from error

    async def abort(self, reason: str) -> None:
        """Wake the ranks so that they end; the run has failed elsewhere."""
        # A dead feed has nobody left to wake, and must not hide why the run failed.
        with suppress(ray.exceptions.RayError):
            await asyncio.wrap_future(self._feed.close.remote(reason).future())
        await asyncio.to_thread(self._thread.join, 30)


def worker_environment(config: Config) -> dict[str, str]:
    """Environment of a trainer worker, set before torch is imported."""
    if config.trainer.num_gpus > 0:
        return {"TOKENIZERS_PARALLELISM": "false"}
    return {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}


def _last_line(error: BaseException) -> str:
    """The line of a nested remote traceback that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
