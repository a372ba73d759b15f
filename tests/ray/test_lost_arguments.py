"""An argument that never comes, because the actor that was to make it died, is no death of the actor that waits for it."""

import asyncio
import time
from typing import Any

import pytest

from raydistill.actors.pool import ActorPool
from raydistill.errors import LostError

pytestmark = pytest.mark.ray


def test_a_dead_maker_is_told_apart_from_a_dead_worker(ray_cluster: Any) -> None:
    class Maker:  # defined here: a worker process cannot import a test module
        def make(self) -> int:
            time.sleep(600)
            return 0

    class Echo:
        def echo(self, value: int) -> int:
            return value

    created: list[int] = []

    def create(index: int) -> Any:
        created.append(index)
        return ray_cluster.remote(Echo).options(num_cpus=0).remote()

    async def revive(actor: Any, index: int) -> None:
        return None

    async def whole() -> None:
        maker = ray_cluster.remote(Maker).options(num_cpus=0).remote()
        pool: ActorPool[Any] = ActorPool("echo", 1, create, revive, timeout_s=300)
        assert await pool.call(0, "echo", 5) == 5
        waiting = asyncio.ensure_future(pool.call(0, "echo", maker.make.remote()))
        await asyncio.sleep(2)
        ray_cluster.kill(maker)
        with pytest.raises(LostError, match="the actor that made them"):
            await waiting
        assert await pool.call(0, "echo", 6) == 6
        pool.shutdown()

    asyncio.run(whole())
    assert created == [0], "the living actor was replaced"
