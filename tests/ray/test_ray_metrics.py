"""The run's numbers on Ray's metrics endpoint, scraped as Prometheus does."""

import json
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from raydistill.messages import EvalReport, LoadReport, Span
from raydistill.ray_metrics import RayMetrics

pytestmark = pytest.mark.ray
DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana.json"


def scraped(cluster: Any, run: str) -> dict[str, float]:
    """Every sample of ours with the run's tag: `name{tags}` without the tags that Ray adds -> value."""
    port = cluster.nodes()[0]["MetricsExportPort"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    ours = [line for line in lines if line.startswith("ray_raydistill_") and f'run="{run}"' in line]
    found = {}
    for line in ours:
        name, _, rest = line.partition("{")
        tags = [t for t in rest.split("}")[0].split(",") if t.split("=")[0] in ("stage", "actor")]
        found[name + "".join(sorted(tags))] = float(line.split()[-1])
    return found


def test_every_number_of_the_dashboard_can_be_scraped(ray_cluster: Any) -> None:
    metrics = RayMetrics("scraped-run", lambda: {"rollout": 2, "teacher": 0})
    of_step = {"trainer/loss": 0.5, "trainer/staleness_steps": 1.0, "rollout/tokens_per_s": 700.0}
    metrics.step(7, of_step | {"trainer/busy_s": 0.25, "trainer/wait_s": 0.125})
    load = {"version": 8, "weights_hash": "", "codes_hash": None, "gap_p99_nats": 0.0, "size_bytes": 1, "seconds": 0.1}
    metrics.sync(LoadReport(actor="rollout-0", gap_mean_nats=1e-6, **load))  # type: ignore[arg-type]
    span = Span(stage="evaluate", actor="evaluator-0", step=8, start_s=0.0, end_s=1.0)
    metrics.evaluation(EvalReport(version=8, metrics={"evaluate/kl_nats": 0.02}, span=span))
    wanted = {
        "ray_raydistill_step": 7,
        "ray_raydistill_loss": 0.5,
        "ray_raydistill_staleness_steps": 1,
        "ray_raydistill_kl_nats": 0.02,
        'ray_raydistill_tokens_per_sstage="rollout"': 700,
        'ray_raydistill_busy_sstage="trainer"': 0.25,
        'ray_raydistill_wait_sstage="trainer"': 0.125,
        'ray_raydistill_queue_depthstage="rollout"': 2,
        'ray_raydistill_queue_depthstage="teacher"': 0,
        'ray_raydistill_policy_gap_natsactor="rollout-0"': 1e-6,
    }
    found: dict[str, float] = {}
    deadline = time.monotonic() + 240  # Ray collects every few seconds
    while found.keys() != wanted.keys() and time.monotonic() < deadline:
        time.sleep(1)
        found = scraped(ray_cluster, "scraped-run")
    assert found == pytest.approx(wanted)
    shown = json.dumps(json.loads(DASHBOARD.read_text()))
    assert all(name.split("stage=")[0].split("actor=")[0] in shown for name in wanted)
