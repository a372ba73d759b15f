"""The study on real text, in short: GSM8K rows, a briefly trained teacher, on-policy, the table from folders."""

import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.engine]

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data" / "gsm8k"


@pytest.fixture
def study(pools: Any, tmp_path: Path) -> Any:
    if not DATA.is_dir():
        pytest.skip(f"GSM8K is not at {DATA}: put train.jsonl and test.jsonl of openai/grade-school-math there")
    from rich.console import Console

    from raydistill.config.load import load_config
    from raydistill.study.study import Study

    settings = [f"@{ROOT / 'configs' / 'gsm8k.toml'}"]
    settings += ["--world.train_path", str(DATA / "train.jsonl"), "--world.test_path", str(DATA / "test.jsonl")]
    settings += [
        "--world.recipe.num_steps",
        "40",
        "--world.recipe.batch_size",
        "8",
        "--world.recipe.num_layers",
        "2",
        "--run.output",
        str(tmp_path),
    ]
    settings += ["--results.deliver", "false"]
    settings += ["--data.max_rows", "400", "--data.eval_rows", "32", "--data.max_length", "256"]
    settings += ["--trainer.num_steps", "6", "--trainer.sequences_per_step", "8"]
    settings += [
        "--trainer.sequences_per_micro_batch",
        "8",
        "--evaluation.eval_every",
        "6",
        "--trainer.learning_rate",
        "5e-4",
    ]
    settings += [
        "--study.arms",
        "on-policy",
        "--study.ptq_formats",
        "int3",
        "--rollout.max_new_tokens",
        "32",
        "--rollout.engine",
        "hf",
    ]
    settings += ["--study.test_rows", "32", "--study.grid_rows", "32"]
    return Study(load_config(settings).config, Console(stderr=True), tmp_path, pools)


def test_the_gsm8k_study_distils_and_reports_every_folder(study: Any, tmp_path: Path):
    summary = study.run().summary
    rows = {row["name"]: row for row in summary["rows"]}
    assert list(rows) == ["teacher", "rtn-int3", "on-policy"]
    assert rows["teacher"]["kl_nats"] == pytest.approx(0, abs=1e-6)
    distilled, rounded = rows["on-policy"], rows["rtn-int3"]
    assert 0 < distilled["kl_nats"] < rounded["kl_nats"], "six steps already help"
    assert distilled["bytes"] == pytest.approx(rounded["bytes"], rel=0.01), "a merged adapter adds no byte"
    assert summary["runs"]["on-policy"]["largest_gap_nats"] < 1e-5
    assert all(row["perplexity"] > 1 for row in rows.values())
    assert json.loads((tmp_path / "summary.json").read_text())["rows"] == summary["rows"]
    assert all(Path(path).stat().st_size > 10_000 for path in summary["plots"].values())
