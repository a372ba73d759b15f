"""The warning that a teacher's kept answers have too little room."""

import json
from pathlib import Path
from typing import Any

from raydistill.config import Config
from raydistill.preflight.kept import kept_answers_note


def config(**changes: Any) -> Config:
    sections: dict[str, Any] = {
        "data": {"max_length": 1000, "eval_rows": 100},
        "objective": {"on_policy_fraction": 0.0},
        "trainer": {"num_steps": 100, "sequences_per_step": 32},
        "teacher": {"cache_gib": 1},
    }
    return Config.model_validate(
        {name: sections.get(name, {}) | changes.get(name, {}) for name in {**sections, **changes}}
    )


def test_rows_times_length_times_bytes_of_a_token_against_the_room() -> None:
    note = kept_answers_note([config()])  # 3,300 rows of 1,000 tokens, 516 bytes each
    assert note is not None
    assert (
        "may take 1.6 GiB (3,300 rows, 516 bytes a token), and 1 teacher actor with teacher.cache_gib=1 keep 1 GiB"
        in note
    )
    assert kept_answers_note([config(teacher={"cache_gib": 2})]) is None
    assert kept_answers_note([config(teacher={"num_actors": 2})]) is None
    assert kept_answers_note([config(teacher={"cache_gib": 0})]) is None
    assert kept_answers_note([config(objective={"on_policy_fraction": 1.0})]) is None
    assert kept_answers_note([config(objective={"top_k": 32})]) is None
    assert kept_answers_note([config(data={"max_rows": 1000})]) is None
    assert kept_answers_note([config()], completion_tokens=300.0) is None


def test_a_small_file_has_few_tokens(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("x" * 3_000_000)
    assert kept_answers_note([config(data={"path": str(rows)})]) is None


def test_the_largest_need_of_a_sweep_is_told_and_a_whole_vocabulary_is_read_off_the_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 1000}))
    dense = config(objective={"target": "dense"}, student={"model": str(tmp_path)})
    assert "4000 bytes a token" in str(kept_answers_note([config(), dense]))
    assert kept_answers_note([config(objective={"target": "dense"}, student={"model": "a/hub-id"})]) is None
