"""Records and sweeps as small as pages need them, for the tests of pages; what people and models write tries to break out."""

import json
from pathlib import Path
from typing import Any

from raydistill.config import Config
from raydistill.messages import EvalReport, LoadReport, Span
from raydistill.results.record import RunRecord
from raydistill.results.tables import SummaryRow, comparison_json

HOSTILE = "</pre></script><script>window.broken=1</script><img src=x onerror='window.broken=1'>\"&"


def write_run(folder: Path, num_steps: int = 6, comparison: bool = True) -> Path:
    """A finished run with everything that a page has a section for."""
    config = Config.model_validate(
        {
            "trainer": {"num_steps": num_steps, "learning_rate": 1e-3},
            "quant": {"format": "int2"},
            "student": {"model": "tiny"},
        }
    )
    with RunRecord(folder) as record:
        provenance = {"git": None, "machine": {"num_cpus": 2}}
        record.start(name=folder.name, config=json.loads(config.model_dump_json()), provenance=provenance, seed=0)
        for step in range(num_steps):
            metrics = {
                "trainer/loss": 1 / (step + 1),
                "trainer/learning_rate": 1e-3,
                "rollout/completion_tokens": 20.0 + step,
            }
            record.step(step, metrics)
            at = 1000.0 + step
            record.spans(
                [
                    Span(stage="rollout", actor="rollout-0", step=step, start_s=at, end_s=at + 0.5),
                    Span(stage="wait", actor="trainer-0", step=step, start_s=at, end_s=at + 0.5),
                    Span(stage="trainer", actor="trainer-0", step=step, start_s=at + 0.5, end_s=at + 1),
                ]
            )
            record.sync(_sync(step + 1))
        for version in (0, num_steps):
            _evaluate(record, version, 0.5 / (version + 1))
        record.table("doctor", [{"check": "data", "status": "ok", "text": HOSTILE}])
        if comparison:
            record.table("comparison", comparison_json(summary_rows()))
        record.warning(HOSTILE)
        record.artifact("export", folder / "export")
        record.end("finished")
    return folder


def _sync(version: int) -> LoadReport:
    return LoadReport(
        actor="rollout-0",
        version=version,
        weights_hash="w",
        codes_hash=None,
        gap_mean_nats=1e-6 * version,
        gap_p99_nats=5e-6,
        size_bytes=10,
        seconds=0.1,
    )


def _evaluate(record: RunRecord, version: int, kl: float) -> None:
    metrics = {"evaluate/kl_nats": kl, "evaluate/exact_match": 0.5, "evaluate/exact_match_se": 0.1}
    span = Span(stage="evaluate", actor="evaluator-0", step=version, start_s=1000.0, end_s=1000.1)
    record.evaluation(EvalReport(version=version, metrics=metrics, span=span))
    row = {"row_id": "row-7", "prompt": f"2 + 2? {HOSTILE}", "reference": "4", "teacher": "It is 4."}
    record.samples(version, [row | {"student": f"I say {version}."}])


def summary_rows() -> list[SummaryRow]:
    return [
        SummaryRow(name="teacher", role="teacher", kl_nats=0.0, bytes=1_000_000, exact_match=0.97, exact_match_se=0.01),
        SummaryRow(name="ptq-int4", role="ptq", kl_nats=0.0004, bytes=416_000, exact_match=0.96, exact_match_se=0.01),
        SummaryRow(name="ptq-int2", role="ptq", kl_nats=0.1, bytes=90_000, exact_match=0.5, exact_match_se=0.02),
        SummaryRow(name="student", role="student", kl_nats=0.005, bytes=90_000, exact_match=0.95, exact_match_se=0.01),
    ]


def trial(
    number: int, value: float | None, status: str = "finished", error: str | None = None, **values: Any
) -> dict[str, Any]:
    dotted = {name.replace("__", "."): one for name, one in values.items()}
    metrics = {} if value is None else {"evaluate/kl_nats": value}
    seconds = {"start": 10.0, "train": 60.0}
    run = f"rates-{number:02}"
    return {"run": run, "status": status, "values": dotted, "metrics": metrics, "seconds": seconds, "error": error}


def write_sweep(folder: Path, trials: list[dict[str, Any]] | None = None, **more: Any) -> Path:
    """A sweep over learning rate and format with two seeds each; one point failed."""
    if trials is None:
        trials, number = [], 0
        for rate in (1e-4, 1e-3, 1e-2):
            for name in ("int2", "int4"):
                for seed in (0, 1):
                    number += 1
                    values = {"trainer__learning_rate": rate, "quant__format": name, "run__seed": seed}
                    if (rate, name) == (1e-2, "int2"):
                        trials.append(trial(number, None, "failed", f"loss is NaN {HOSTILE}", **values))
                    else:
                        trials.append(trial(number, rate + 0.1 * (name == "int2") + 1e-5 * seed, **values))
    sweep = {
        "name": folder.name,
        "metric": "evaluate/kl_nats",
        "mode": "min",
        "fields": ["trainer.learning_rate", "quant.format", "run.seed"],
        "log_fields": ["trainer.learning_rate"],
        "trials": trials,
    } | more
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps(sweep))
    if not (folder / "record.jsonl").exists():
        base = Config.model_validate(
            {"trainer": {"num_steps": 40, "learning_rate": 1e-5}, "student": {"model": HOSTILE}}
        )
        with RunRecord(folder) as record:
            record.start(name=folder.name, config=json.loads(base.model_dump_json()), provenance={}, seed=0)
    return folder
