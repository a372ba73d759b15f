"""Lets Ray Train's controller say which process it is, so that a group that hangs can end its own and no other run's.

Runs inside the controller, which is to stay light: nothing here imports torch.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.train.v2._internal.execution.callback import ControllerCallback

from raydistill.processes import this_process

CONTROLLER = "controller"
JOIN_TIMEOUT_S = 60.0


class ControllerJoins(ControllerCallback):
    """Tells the crew's feed about the controller as soon as it starts."""

    def __init__(self, feed: Any) -> None:
        self._feed = feed

    def after_controller_start(self, train_run_context: Any) -> None:
        ray.get(self._feed.join.remote(this_process(CONTROLLER)), timeout=JOIN_TIMEOUT_S)
