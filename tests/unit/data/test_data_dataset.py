import numpy as np
import pytest

from raydistill.config import DataSection
from raydistill.data.dataset import load_dataset
from raydistill.errors import DataError

ROWS = [{"question": f"What is {n} plus two?", "answer": f"It is {n + 2}."} for n in range(60)]
SHORT = {"min_completion": 2, "max_length": 200}


def prompts(examples):
    return {e.prompt_ids.tobytes() for e in examples}


def test_rows_are_split_and_encoded(tokenizer, write_jsonl):
    section = DataSection(path=write_jsonl(ROWS), eval_rows=10, **SHORT)
    data = load_dataset(section, tokenizer, 512, needs_reference=True)
    assert len(data.train) == 50 and len(data.held_out) == 10
    assert not prompts(data.train) & prompts(data.held_out)
    assert all(e.reference_ids[-1] == tokenizer.eos_token_id for e in (*data.train, *data.held_out))
    assert "50 training rows, 10 held out" in data.summary() and data.fingerprint in data.summary()


def test_max_rows_limits_training_and_leaves_the_held_out_rows_alone(tokenizer, write_jsonl):
    path = write_jsonl(ROWS)
    whole = load_dataset(DataSection(path=path, eval_rows=10, **SHORT), tokenizer, 512, True)
    few = load_dataset(DataSection(path=path, eval_rows=10, max_rows=5, **SHORT), tokenizer, 512, True)
    assert len(few.train) == 5 and prompts(few.held_out) == prompts(whole.held_out)
    assert few.num_set_aside == 0


def test_repeats_of_a_held_out_prompt_are_set_aside(tokenizer, write_jsonl):
    rows = ROWS + [row | {"answer": "Another answer."} for row in ROWS]
    data = load_dataset(DataSection(path=write_jsonl(rows), eval_rows=10, **SHORT), tokenizer, 512, True)
    assert (len(data.train), len(data.held_out), data.num_set_aside) == (100, 10, 10)
    assert "10 more rows left out of training" in data.summary()


def test_fingerprint_follows_data_and_template(tokenizer, write_jsonl):
    path = write_jsonl(ROWS)

    def fingerprint(**changes):
        section = DataSection(path=path, eval_rows=10, **SHORT, **changes)
        return load_dataset(section, tokenizer, 512, True).fingerprint

    assert fingerprint() == fingerprint()
    assert len({fingerprint(), fingerprint(max_rows=49), fingerprint(template={"enable_thinking": True})}) == 2
    block = {"enable_thinking": False, "think_block": "<think></think>"}
    assert fingerprint(template=block) != fingerprint()


def test_a_held_out_file_must_not_share_prompts(tokenizer, write_jsonl):
    train, other = write_jsonl(ROWS[:40], "train.jsonl"), write_jsonl(ROWS[40:], "test.jsonl")
    data = load_dataset(DataSection(path=train, eval_path=other, eval_rows=5, **SHORT), tokenizer, 512, True)
    assert len(data.train) == 40 and len(data.held_out) == 5
    overlap = write_jsonl(ROWS[39:], "overlap.jsonl")
    with pytest.raises(DataError, match="1 of 21 evaluation rows"):
        load_dataset(DataSection(path=train, eval_path=overlap, **SHORT), tokenizer, 512, True)


def test_no_eval_rows_means_no_held_out_rows(tokenizer, write_jsonl, tmp_path):
    section = DataSection(path=write_jsonl(ROWS), eval_path=tmp_path / "not-read.jsonl", eval_rows=0, **SHORT)
    data = load_dataset(section, tokenizer, 512, True)
    assert len(data.train) == 60 and data.held_out == () and data.held_out_counts is None


def test_prompts_alone_serve_on_policy_only(tokenizer, write_jsonl):
    section = DataSection(path=write_jsonl([{"prompt": row["question"]} for row in ROWS]), eval_rows=10)
    assert len(load_dataset(section, tokenizer, 512, needs_reference=False).train) == 50
    with pytest.raises(DataError, match=r"objective.on_policy_fraction < 1 needs reference completions, 50 of 50"):
        load_dataset(section, tokenizer, 512, needs_reference=True)


def test_short_answers_point_at_the_field(tokenizer, write_jsonl):
    with pytest.raises(DataError, match=r"50 completion too short. Lower data.min_completion=32"):
        load_dataset(DataSection(path=write_jsonl(ROWS), eval_rows=10), tokenizer, 512, True)


def test_rows_longer_than_the_model_are_refused(tokenizer, write_jsonl):
    section = DataSection(path=write_jsonl(ROWS), eval_rows=10, **SHORT)
    with pytest.raises(DataError, match=r"data.max_length=200 .* only 16 positions"):
        load_dataset(section, tokenizer, 16, True)


def test_a_path_is_needed(tokenizer):
    with pytest.raises(DataError, match=r"data.path is not set"):
        load_dataset(DataSection(), tokenizer, 512, True)


def test_gsm8k_loads(tokenizer, gsm8k):
    section = DataSection(
        path=gsm8k / "train.jsonl", eval_path=gsm8k / "test.jsonl", eval_rows=64, max_rows=500, max_length=600
    )
    data = load_dataset(section, tokenizer, 600, needs_reference=True)
    assert data.counts.total == 500 and data.counts.kept > 300 and len(data.held_out) > 32
    assert all(isinstance(e.prompt_ids, np.ndarray) and e.num_tokens <= 600 for e in data.train)
    assert all("####" in tokenizer.decode(e.reference_ids) for e in data.train if e.num_tokens < 600)
