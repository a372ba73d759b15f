"""The run's numbers on Ray's metrics endpoint, where Prometheus finds them; deploy/grafana.json draws them.

Exported by the driver: gauges named `raydistill_...` (Ray adds `ray_`), each with the tag `run`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ray.util.metrics import Gauge

from raydistill.messages import EvalReport, LoadReport

STAGES = ("rollout", "teacher", "trainer")
OF_STEP = {"trainer/loss": "raydistill_loss", "trainer/staleness_steps": "raydistill_staleness_steps"}
OF_STAGE = ("tokens_per_s", "wait_s", "busy_s")


class RayMetrics:
    """Gauges of one run; `queue_depths` gives the work handed out and not answered, by stage."""

    def __init__(self, run: str, queue_depths: Callable[[], Mapping[str, int]]) -> None:
        self._run, self.queue_depths = run, queue_depths
        self._gauges: dict[str, Gauge] = {}

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._set("raydistill_step", step, "optimizer steps done are one more than this")
        for name, gauge in OF_STEP.items():
            if name in metrics:
                self._set(gauge, metrics[name], name)
        for stage in STAGES:
            for kind in OF_STAGE:
                if f"{stage}/{kind}" in metrics:
                    self._set(f"raydistill_{kind}", metrics[f"{stage}/{kind}"], f"{kind} of a stage", stage=stage)
        for stage, depth in self.queue_depths().items():
            self._set("raydistill_queue_depth", depth, "calls handed out and not answered", stage=stage)

    def sync(self, report: LoadReport) -> None:
        if report.gap_mean_nats is not None:
            gap = report.gap_mean_nats
            self._set("raydistill_policy_gap_nats", gap, "mean |trainer - engine| log-prob", actor=report.actor)

    def evaluation(self, report: EvalReport) -> None:
        if "evaluate/kl_nats" in report.metrics:
            self._set("raydistill_kl_nats", report.metrics["evaluate/kl_nats"], "held-out KL to the teacher")

    def _set(self, name: str, value: float, description: str, **tags: str) -> None:
        if name not in self._gauges:
            self._gauges[name] = Gauge(name, description=description, tag_keys=("run", *tags))
        self._gauges[name].set(value, tags={"run": self._run, **tags})
