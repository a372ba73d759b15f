"""What a user can get wrong ends in one clear line and exit code 2, before anything is started or written."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from raydistill.__main__ import dispatch
from raydistill.cli import main_with_errors


def save_model(folder: Path, words: list[str], eos: str = "<eos>", max_length: int = 64) -> Path:
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<eos>", "<end>", *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, pad_token="<pad>").save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=max_length,
        eos_token_id=vocabulary[eos],
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bad-input")
    words = [f"w{number}" for number in range(40)]
    save_model(place / "model", words)
    save_model(place / "other-words", words[::-1])
    save_model(place / "other-eos", words, eos="<end>")
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": f"w{i + 2} w3"} for i in range(30)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    (place / "empty.jsonl").write_text("")
    (place / "torn.jsonl").write_text('{"prompt": "w1", "completion": "w2"}\n{"prompt": "w1", \n')
    (place / "no-text.jsonl").write_text('{"prompt": "w1", "completion": "w2"}\n{"id": "x"}\n')
    long = " ".join(["w1"] * 200)
    (place / "long.jsonl").write_text(json.dumps({"prompt": long, "completion": "w2"}) + "\n")
    (place / "not-a-model").mkdir()
    return place


GOOD = {
    "student.model": "{place}/model",
    "data.path": "{place}/rows.jsonl",
    "data.eval_rows": "4",
    "data.max_length": "48",
    "data.min_prompt_room": "8",
    "data.min_completion": "1",
    "rollout.max_new_tokens": "8",
    "run.output": "{place}/out",
}

CASES = {
    "unknown key": ({"trainer.learning_rat": "1"}, ["trainer.learning_rate"]),
    "beta above 1": ({"objective.beta": "1.5"}, ["objective.beta", "1.5"]),
    "beta too near an end": ({"objective.beta": "0.0001"}, ["objective.beta", "0.001"]),
    "sequences do not split": (
        {"trainer.num_workers": "3", "trainer.sequences_per_step": "32"},
        ["trainer.sequences_per_step=32", "trainer.num_workers=3", "use"],
    ),
    "missing file": ({"data.path": "{place}/row.jsonl"}, ["row.jsonl", "rows.jsonl"]),
    "empty file": ({"data.path": "{place}/empty.jsonl"}, ["empty.jsonl"]),
    "malformed row": ({"data.path": "{place}/torn.jsonl"}, ["torn.jsonl", "2", "data.on_bad_row"]),
    "row without text": ({"data.path": "{place}/no-text.jsonl"}, ["no-text.jsonl", "2"]),
    "prompts longer than the room": ({"data.path": "{place}/long.jsonl", "data.eval_rows": "0"}, ["data.max_length"]),
    "length above the model's": ({"data.max_length": "4096"}, ["data.max_length=4096", "64 positions"]),
    "no references at lambda < 1": ({"data.path": "{place}/prompts.jsonl"}, ["objective.on_policy_fraction"]),
    "group size": ({"quant.group_size": "24"}, ["24", "layers.0.self_attn", "16"]),
    "adapter target": ({"adapter.targets": "q_prog"}, ["q_prog", "q_proj"]),
    "vocabularies differ": ({"teacher.model": "{place}/other-words"}, ["token ids", "other-words"]),
    "different EOS": ({"teacher.model": "{place}/other-eos"}, ["<end>", "<eos>"]),
    "a folder that is no model": ({"student.model": "{place}/not-a-model"}, ["not-a-model", "config.json"]),
    "no student": ({"student.model": "none"}, ["student.model"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_one_clear_line_exit_code_2_and_nothing_is_written(case: str, place: Path, capsys):
    change, said = CASES[case]
    settings = {name: value.format(place=place) for name, value in (GOOD | change).items()}
    arguments = [part for name, value in settings.items() for part in (f"--{name}", value)]
    assert main_with_errors(dispatch, ["train", *arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, errors
    for text in said:
        assert text in errors[0]
    assert not (place / "out").exists()


def test_an_unknown_verb_names_the_nearest(capsys):
    assert main_with_errors(dispatch, ["trian"]) == 2
    assert "'train'" in capsys.readouterr().err
