"""Lets Ray Train's controller say which process it is and what its ranks have booked, so that a crew that hangs can end its own
processes and no other run's, and give the booking back.

Runs inside the controller, which is to stay light: nothing here imports torch.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

from raydistill.errors import LostError
from raydistill.processes import this_process

CONTROLLER = "controller"
TELL_TIMEOUT_S = 60.0


class TellsFeed(ControllerCallback, WorkerGroupCallback):
    """Tells the crew's feed about the controller as soon as it starts, and about its ranks' placement group."""

    def __init__(self, feed: Any) -> None:
        self._feed = feed

    def after_controller_start(self, train_run_context: Any) -> None:
        self._tell(self._feed.join.remote(this_process(CONTROLLER)))

    def after_worker_group_start(self, worker_group: Any) -> None:
        booking = worker_group.get_worker_group_state().placement_group_handle.placement_group
        self._tell(self._feed.book.remote(booking))

    def _tell(self, told: Any) -> None:
        try:
            ray.get(told, timeout=TELL_TIMEOUT_S)
        except RayActorError as error:  # Ray Train would take it for a rank's, and start ranks again and again
            raise LostError("the trainer's feed died") from error
