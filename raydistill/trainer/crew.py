"""A crew: the ranks of Ray Train and DeepSpeed, as processes that outlive a run.

Starting them (imports, process groups, Ray Train's own helpers) takes far longer than building a model, so a pool of them
goes from run to run. Ray Train's blocking `fit()` runs in a thread of the driver; the ranks take one job after another from
the crew's feed. A crew that lost a rank, or whose job failed, is ended, and the next run gets a new one.
"""

from __future__ import annotations

import asyncio
import shutil
import threading
import uuid
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raydistill.config import Config
from raydistill.preflight.placement import ROLE_SHARE
from raydistill.processes import END_TIMEOUT_S, Member, end_processes
from raydistill.roles import PATIENCE_S
from raydistill.trainer.controller import CONTROLLER, TellsFeed
from raydistill.trainer.feed import Feed
from raydistill.trainer.job import TrainerJob
from raydistill.trainer.worker import serve

RAY_TRAIN_FOLDER = "ray_train"
GIVE_UP_S = PATIENCE_S  # how long a lost crew may take to end by itself
HURRY_S = 1.0  # the same, where somebody waits for the end of the whole run
TELL_TIMEOUT_S = 60.0


class _LeanTrainer(TorchTrainer):
    """Ray Train without two processes that each crew would start: one for Ray Data's data sets, of which there are none here,
    and one that asks Ray's dashboard every second whether the controller still lives, to free what the ranks of a dead one
    had booked (`TrainerCrew.end` does)."""

    def _create_default_callbacks(self) -> list[Any]:
        default = super()._create_default_callbacks()
        return [c for c in default if not isinstance(c, (DatasetsCallback, PlacementGroupCleanerCallback))]


class TrainerCrew:
    """One group of ranks. `start` a job, `wait_done`; when idle, start another; `end` in the end, whatever state it is in."""

    def __init__(self, config: Config) -> None:
        self.kind = kind_of(config)
        self._config = config
        # On the driver's node: whatever other node is lost, the ranks keep their feed.
        here = NodeAffinitySchedulingStrategy(node_id=ray.get_runtime_context().get_node_id(), soft=False)
        self._name = f"crew-{uuid.uuid4().hex[:8]}"
        feed: Any = ray.remote(Feed).options(
            name=f"feed-{self._name}", num_cpus=0, max_concurrency=1000, scheduling_strategy=here
        )
        self.feed = feed.remote(config.trainer.num_workers)
        self._number = -1
        self._feed_process: Member | None = None
        self._members: list[Member] = []  # known here too: a feed that is gone or hangs tells nobody
        self._booking: PlacementGroup | None = None
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._fit, name="ray-train-fit", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the ranks can take another job, as far as this process knows."""
        return self._thread.is_alive() and self.failure is None

    async def start(self, job: TrainerJob) -> None:
        """Hand a job to the ranks; returns when the feed has it, so that what is asked of the feed next is about this job."""
        self._number += 1
        if self._feed_process is None:
            self._feed_process = await _answer(self.feed.process.remote())
        await _answer(self.feed.assign.remote(self._number, job, job.config.sync.max_staleness + 2))

    def keep(self, members: list[Member], booking: PlacementGroup | None) -> None:
        """Who is to end with the crew, and what they have booked."""
        self._members, self._booking = members, booking

    async def wait_done(self) -> bool:
        """Wait until every rank is done with the job; False if the crew ended before."""
        with suppress(RayError):
            done: bool = await asyncio.wrap_future(self.feed.wait_done.remote().future())
            return done
        return False

    def _fit(self) -> None:
        section, feed = self._config.trainer, self.feed
        resources = {"CPU": section.num_cpus}
        if section.num_gpus > 0:
            resources["GPU"] = section.num_gpus
        if self._config.cluster.by_role:
            resources["trainer"] = ROLE_SHARE
        storage = self._config.run.output.absolute() / RAY_TRAIN_FOLDER
        trainer = _LeanTrainer(
            # A closure: Ray Train's controller would open a train_loop_config, and import the whole trainer for it.
            lambda: serve(feed),
            scaling_config=ScalingConfig(
                num_workers=section.num_workers, use_gpu=section.num_gpus > 0, resources_per_worker=resources
            ),
            torch_config=TorchConfig(backend="nccl" if section.num_gpus > 0 else "gloo"),
            run_config=RunConfig(
                # Ray Train resumes a name that it knows; our checkpoints are our own, so every crew has a name.
                name=self._name,
                storage_path=str(storage),
                worker_runtime_env={"env_vars": worker_environment(self._config)},
                # It would start the ranks of a drained node again; what follows a loss is an attempt with a new crew.
                failure_config=FailureConfig(max_failures=0, max_preemption_failures=0),
                callbacks=[TellsFeed(feed)],
            ),
        )
        try:
            trainer.fit()
        except BaseException as error:
            self.failure = error
            with suppress(RayError):  # a dead feed has nobody left to tell
                ray.get(feed.close.remote(f"the trainer group failed: {last_line(error)}"), timeout=TELL_TIMEOUT_S)
        shutil.rmtree(storage / self._name, ignore_errors=True)

    async def end(self, patience_s: float = GIVE_UP_S) -> None:
        """End the ranks, whatever state they are in; afterwards none of them can write a checkpoint.

        patience_s: how long the feed may take to answer, the ranks to end by themselves, other nodes to end them, and Ray
        Train to notice: in all at most six times as long.
        """
        try:
            self.keep(*await asyncio.wait_for(self._dismissed(), patience_s))
        except RayError:
            pass  # it is dead: what the ranks ask of it ends them
        except TimeoutError:
            if self._feed_process is not None:  # or they would wait for it
                await asyncio.to_thread(end_processes, [self._feed_process], patience_s)
        await self._joined(patience_s)
        # A stopped process hears nothing but the kernel. The ranks first: with them gone, the controller ends by itself.
        ranks = [member for member in self._members if member.name != CONTROLLER]
        for some in (ranks, [member for member in self._members if member.name == CONTROLLER]):
            # Ranks may live on for a while after a controller that was killed.
            if some and (self._thread.is_alive() or self.failure is not None):
                await asyncio.to_thread(end_processes, some, min(END_TIMEOUT_S, patience_s))
                await self._joined(patience_s)
        if self._booking is not None and self.failure is not None:  # a killed controller has given nothing back
            await asyncio.to_thread(remove_placement_group, self._booking)
        ray.kill(self.feed)

    async def _dismissed(self) -> tuple[list[Member], PlacementGroup | None]:
        """Close the feed; who is to end, and what they have booked."""
        await _answer(self.feed.close.remote("the crew is dismissed"))
        members, booking = await _answer(self.feed.started.remote())
        return members, booking

    async def _joined(self, timeout_s: float) -> None:
        await asyncio.to_thread(self._thread.join, timeout_s)


class TrainerPool:
    """Crews that are idle now, by what they were started as."""

    def __init__(self) -> None:
        self._idle: list[TrainerCrew] = []

    def lease(self, config: Config) -> TrainerCrew:
        """A crew for one attempt at a run: an idle one, else a new one."""
        for crew in self._idle:
            if crew.is_alive and crew.kind == kind_of(config):
                self._idle.remove(crew)
                return crew
        return TrainerCrew(config)

    def give_back(self, crew: TrainerCrew) -> None:
        """The crew's job is over, and it is well."""
        self._idle.append(crew)

    async def end(self, run: str) -> None:
        """Crews keep nothing of a run."""

    async def close(self, patience_s: float = GIVE_UP_S) -> None:
        """End every idle crew; see `TrainerCrew.end`."""
        await asyncio.gather(*(crew.end(patience_s) for crew in self._idle))
        self._idle.clear()


def kind_of(config: Config) -> tuple[object, ...]:
    """What a crew's processes are started as; everything else comes with a job."""
    section = config.trainer
    return section.num_workers, section.num_gpus, section.num_cpus, config.cluster.by_role


def worker_environment(config: Config) -> dict[str, str]:
    """Environment of a trainer worker, set before torch is imported."""
    if config.trainer.num_gpus > 0:
        return {"TOKENIZERS_PARALLELISM": "false"}
    # Ray hides no GPU from a worker that booked none.
    return {
        "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""
    }  # fmt: skip


async def _answer(reference: Any) -> Any:
    return await asyncio.wrap_future(reference.future())


def last_line(error: BaseException) -> str:
    """The line of a nested remote traceback that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
