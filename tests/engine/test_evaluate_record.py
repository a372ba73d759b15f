"""`raydistill evaluate --record`: the table and its numbers in a real MLflow store, where `raydistill results` reads them."""

import json
from pathlib import Path
from typing import Any

import pytest
from finished_models import write_run

from raydistill.cli import main_with_errors
from raydistill.evaluate.command import evaluate_command
from raydistill.results.query import list_runs
from raydistill.results.record_lines import read_record
from raydistill.results.store import default_uri

pytestmark = pytest.mark.engine


def test_a_recorded_curve_is_a_run_of_the_results_store(tiny_world: Any, tmp_path: Path, capsys: Any) -> None:
    run = write_run(tmp_path / "outputs" / "runs" / "mine", tiny_world.teacher_folder, tiny_world.train_path)
    assert main_with_errors(evaluate_command, [str(run), "--every-checkpoint", "--record", "--json"]) == 0
    out, err = capsys.readouterr()
    table = {row["name"]: row for row in json.loads(out)}
    (folder,) = (tmp_path / "outputs" / "runs").glob("*-evaluate")
    assert f"recorded in {folder}" in err
    lines = list(read_record(folder))
    evaluations = {line["version"]: line["metrics"] for line in lines if line["kind"] == "evaluation"}
    assert {version: metrics["evaluate/kl_nats"] for version, metrics in evaluations.items()} == {
        step: table[f"step {step}"]["kl_nats"] for step in (0, 2, 4)
    }
    assert [line["name"] for line in lines if line["kind"] == "artifact"] == ["checkpoints"]
    (recorded,) = list_runs(default_uri(tmp_path / "outputs"))
    assert (recorded.name, recorded.status) == (folder.name, "finished")
    assert recorded.metrics["evaluate/kl_nats"] == pytest.approx(table["step 4"]["kl_nats"])
    assert recorded.settings["quant.format"] == "int4"


def test_a_store_whose_password_the_record_does_not_keep_is_left_to_the_user(
    tiny_world: Any, tmp_path: Path, capsys: Any
) -> None:
    """It is not asked for a minute with the stars that stand in the password's place."""
    run = write_run(tmp_path / "outputs" / "runs" / "mine", tiny_world.teacher_folder, tiny_world.train_path)
    record = run / "record.jsonl"
    kept = json.dumps("postgresql://***@127.0.0.1:9/none")
    record.write_text(record.read_text().replace('"uri":null', f'"uri":{kept}'))
    assert main_with_errors(evaluate_command, [str(run / "checkpoints" / "step-000002"), "--record"]) == 0
    (folder,) = (tmp_path / "outputs" / "runs").glob("*-evaluate")
    assert f"`python -m raydistill.results.deliver {folder} --uri ADDRESS`" in capsys.readouterr().err
    assert [line["kind"] for line in read_record(folder)][-1] == "end"
    assert not (folder / "delivered.json").exists()
