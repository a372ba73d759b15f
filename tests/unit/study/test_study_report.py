"""A report of a study whose runs and scores are made up: two PTQ widths, one method that cannot do one of them."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from raydistill.config import Config
from raydistill.evaluate.paired import RowValues
from raydistill.launch import SUMMARY_TABLE, RunSummary
from raydistill.messages import Span
from raydistill.ptq.baselines import Baseline
from raydistill.results.record import RunRecord
from raydistill.results.tables import SummaryRow
from raydistill.study.decision import merge_seeds
from raydistill.study.report import ReportInputs, lines_of, reference_of, summary_text
from raydistill.study.study import _chosen

NOT_INT2 = "ValueError: 2 bits are not supported"
BASELINES = (
    Baseline(method="rtn", width="int4", folder="a", format="int4-g32-sym-absmax", kl_nats={"int4-g32-sym-absmax": 0.01}),
    Baseline(method="rtn", width="int2", folder="b", format="int2-g32-sym-absmax", seconds=3.0,
             kl_nats={"int2-g32-sym-absmax": 0.3, "int2-g32-asym-absmax": 0.5}),
    Baseline(method="awq", width="int4", folder="c", format="int4-g32-sym-absmax", kl_nats={"int4-g32-sym-absmax": 0.02}),
    Baseline(method="awq", width="int2", folder=None, format=None, reasons={"int2-g32-sym-absmax": NOT_INT2}),
)  # fmt: skip
CONFIG = Config.model_validate(
    {
        "student": {"model": "/models/tiny"},
        "teacher": {"model": "/models/tiny"},
        "quant": {"format": "int2"},
        "study": {"arms": ["gold-ce", "on-policy"], "ptq_methods": ["rtn", "awq"], "ptq_formats": ["int4", "int2"]},
        "trainer": {"num_workers": 2, "sequences_per_step": 32},
    }
)
KLS = {"teacher": 0.0, "rtn-int4": 0.01, "rtn-int2": 0.4, "awq-int4": 0.02, "s-gold-ce": 0.2, "s-on-policy": 0.1}
ROLES = {"teacher": "teacher", "s-gold-ce": "control", "s-on-policy": "student"}


def values_of(kl):
    noise = np.random.default_rng(0).uniform(0.9, 1.1, size=30)
    ones = np.ones(30)
    ids = tuple(str(n) for n in range(30))
    return {"kl_nats": RowValues(row_ids=ids, values_R=10 * kl * noise, weights_R=10 * ones)}


def finish(folder, spans):
    summary = RunSummary(
        name=folder.name, folder=folder, export=folder / "export", best_version=3, metrics={}, codes_hash="x",
        largest_gap_nats=1e-6, skipped_steps=0, bottleneck="", trainer_wait_share=0.1, rollout_tokens_per_cpu_s=None,
    )  # fmt: skip
    with RunRecord(folder) as record:
        record.start(name=folder.name, config={}, provenance={}, seed=0)
        record.spans([Span(stage=stage, actor=f"{stage}-0", step=0, start_s=0, end_s=end) for stage, end in spans])
        record.table(SUMMARY_TABLE, [summary.to_json()])
        record.end("finished")
    return summary


@pytest.fixture
def inputs(tmp_path):
    runs = {
        "s-gold-ce": finish(tmp_path / "runs" / "s-gold-ce", [("trainer", 10.0)]),
        "s-on-policy": finish(tmp_path / "runs" / "s-on-policy", [("trainer", 10.0), ("rollout", 4.0)]),
    }
    data = SimpleNamespace(train=range(100), held_out=range(20), fingerprint="f1", held_out_fingerprint="f2")
    return ReportInputs(
        name="s",
        folder=tmp_path,
        output=tmp_path,
        config=CONFIG,
        data=data,
        test_path=tmp_path / "test.jsonl",
        baselines=BASELINES,
        runs=runs,
        runs_of_arm={"gold-ce": ["s-gold-ce"], "on-policy": ["s-on-policy"]},
        rows=[
            SummaryRow(name=name, role=ROLES.get(name, "ptq"), kl_nats=kl, kl_se=0.01, bytes=1000, perplexity=1.5)
            for name, kl in KLS.items()
        ],
        values={name: values_of(kl) for name, kl in KLS.items()},
        seconds={},
    )


def lines(inputs):
    rows, values, spread = merge_seeds(inputs.rows, inputs.values, inputs.runs_of_arm)
    return lines_of(inputs, rows, values, spread, reference_of(inputs.baselines, "int2"))


def test_the_reference_is_chosen_on_held_out_rows_at_the_students_width():
    assert reference_of(BASELINES, "int4") == "rtn-int4"
    assert reference_of(BASELINES, "int2") == "rtn-int2"
    assert reference_of(BASELINES[3:], "int2") is None


@pytest.mark.parametrize("order", [1, -1])
def test_a_grid_without_finite_numbers_does_not_choose_the_reference(order):
    nan_first = {"int2-g32-sym-absmax": math.nan, "int2-g32-asym-absmax": 0.5}
    worse = Baseline(method="gptq", width="int2", folder="d", format="int2-g32-asym-absmax", kl_nats=nan_first)
    assert reference_of([BASELINES[1], worse][::order], "int2") == "rtn-int2"


def test_every_model_has_a_line_in_order_and_what_is_not_there_has_its_reason(inputs):
    found = lines(inputs)
    assert [line.name for line in found] == [
        *("teacher", "rtn-int4", "rtn-int2", "awq-int4", "awq-int2", "gold-ce", "on-policy")
    ]
    assert found[4].row is None
    assert found[4].reason == NOT_INT2
    assert [line.role for line in found[-2:]] == ["control", "student"]


def test_a_run_costs_what_its_actors_were_busy_times_the_devices_they_hold(inputs):
    cost = {line.name: line.cost for line in lines(inputs)}
    assert cost["gold-ce"] == 10.0 * 2, "two ranks"
    assert cost["on-policy"] == 10.0 * 2 + 4.0
    assert cost["rtn-int2"] == 3.0
    assert cost["teacher"] is None


def test_the_summary_stands_alone(inputs):
    found = lines(inputs)
    text = summary_text(inputs, found, "rtn-int2", {"verdict": "Ship it.", "next_steps": "Rest."})
    assert text.startswith(
        "# Plain quantization against distillation: tiny in int2\n\nShip it. Rest.\n\n| model | size |"
    )
    assert f"Not there:\n\n- awq-int2: {NOT_INT2}" in text
    assert "| int2-g32-sym-absmax | 0.30 | ValueError: 2 bits are not supported |" in text
    assert "| int2-g32-asym-absmax | 0.50 | - |" in text
    assert "rtn-int2 is the best plain quantization of the students' width, chosen on the held-out rows" in text
    assert "training: 100 rows, fingerprint f1" in text
    assert str(inputs.folder) not in text, "no paths of this machine"


def test_a_finished_run_is_found_again_by_its_record_and_an_unfinished_one_is_not(inputs, tmp_path):
    folder = tmp_path / "runs" / "s-gold-ce"
    assert RunSummary.of_finished(folder) == inputs.runs["s-gold-ce"]
    with RunRecord(folder) as record:
        record.cut_back(1)
    assert RunSummary.of_finished(folder) is None
    assert RunSummary.of_finished(tmp_path / "nowhere") is None


def test_a_baselines_grids_are_listed_best_first_and_one_without_numbers_last():
    one = Baseline(method="gptq", width="int3", folder="x", format="c", kl_nats={"b": 0.2, "a": math.nan, "c": 0.1})
    assert _chosen(one).endswith("on held-out rows: c 0.10, b 0.20, a nan")
