"""The one process that measures everything, replaced by one that notes what it was asked for."""

import json
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest

from raydistill.config import Config
from raydistill.errors import RunError
from raydistill.evaluate.arguments import parser
from raydistill.evaluate.paired import RowValues, write_row_values
from raydistill.ptq.baselines import Baseline
from raydistill.results.tables import SummaryRow, comparison_json
from raydistill.study import measure as measuring
from raydistill.study.measure import measure


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """Measures a teacher, a baseline and a run under the given settings: (rows, values, the switches that were used)."""

    def ask(returncode=0, **study):
        asked = []

        def run(command, **_):
            asked.append(parser().parse_args(command[3:]))
            names = [text.partition("=")[0] for text in asked[0].targets]
            rows = [SummaryRow(name=name, role="student", kl_nats=0.1, bytes=5) for name in names]
            value = RowValues(row_ids=("0",), values_R=np.ones(1), weights_R=np.ones(1))
            write_row_values(asked[0].per_row, {name: {"arc_easy acc": value} for name in names})
            return SimpleNamespace(returncode=returncode, stdout=json.dumps(comparison_json(rows)))

        (tmp_path / "model").mkdir(exist_ok=True)
        monkeypatch.setattr(measuring, "subprocess", SimpleNamespace(run=run, PIPE=subprocess.PIPE))
        model = {"model": str(tmp_path / "model")}
        evaluation = {"exact_match": "final_number", "max_new_tokens": 9}
        config = Config.model_validate(
            {"student": model, "teacher": model, "quant": {"format": "int4"}, "evaluation": evaluation, "study": study}
        )
        ptq = Baseline(method="rtn", width="int4", folder="b", format="int4-g32", kl_nats={})
        roles, test = {"mine-gold-ce": "control"}, tmp_path / "test.jsonl"
        rows, values = measure(config, [ptq], {"mine-gold-ce": tmp_path}, roles, test, tmp_path / "rows.jsonl")
        return rows, values, asked[0]

    return ask


def test_every_folder_is_measured_with_the_tasks_of_the_study(ask, tmp_path):
    data = tmp_path / "tasks"
    rows, values, asked = ask(tasks=("arc_easy", "gsm8k"), task_data=data, task_limit=7, num_fewshot=0)
    assert (asked.tasks, asked.task_data, asked.limit, asked.num_fewshot) == ("arc_easy,gsm8k", data, 7, 0)
    assert [(row.name, row.role) for row in rows] == [
        *(("teacher", "student"), ("rtn-int4", "student"), ("mine-gold-ce", "control"))
    ]
    assert values["rtn-int4"]["arc_easy acc"].mean == 1
    assert asked.exact_match == "final_number"
    # Answers of exact match end where the run's record says; a switch would cut those of gsm8k there, too.
    assert asked.max_new_tokens is None and asked.targets[0].startswith("mine-gold-ce=")


def test_without_tasks_none_are_asked_for_and_a_failure_names_the_command(ask):
    assert ask()[2].tasks is None
    with pytest.raises(RunError, match=r"failed with exit code 3; its command: .*--per-row"):
        ask(returncode=3)
