"""What is wrong with models and settings is said before anything starts, with the field and a way out."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, T5Config

from raydistill.config import Config
from raydistill.config.fields import config_fields
from raydistill.errors import ConfigError, ModelError, QuantError, UserError
from raydistill.preflight.checks import check_models
from raydistill.preflight.doctor import examine
from raydistill.preflight.findings import Finding, template_warnings
from raydistill.preflight.memory import GpuMemory, gpu_remarks, host_remark
from raydistill.preflight.placement import check_placement
from raydistill.preflight.storage import check_room, check_writable

WORDS = ["<pad>", "<end>", "<stop>", "a", "b", "c", "d"]
MakeFolder = Callable[..., Path]


def save_tokenizer(folder: Path, words: list[str], end: str | None) -> None:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token=end).save_pretrained(folder)


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """A model folder as the checks see it: config and tokenizer are real, the weights are never opened."""

    def make(
        name: str = "student",
        words: list[str] = WORDS,
        end: str | None = "<end>",
        vocab_size: int = 16,
        positions: int = 128,
        weights: str = "model.safetensors",
        **shape: int,
    ) -> Path:
        folder = tmp_path / name
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1} | shape
        Qwen3Config(
            vocab_size=vocab_size,
            max_position_embeddings=positions,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            **sizes,
        ).save_pretrained(folder)
        save_tokenizer(folder, words, end)
        (folder / weights).touch()
        return folder

    return make


def config(student: Path | str | None, teacher: Path | str | None = None, **changes: Any) -> Config:
    base: dict[str, Any] = {
        "student": {"model": None if student is None else str(student)},
        "teacher": {"model": None if teacher is None else str(teacher)},
        "data": {"max_length": 64},
        "rollout": {"max_new_tokens": 16},
        "quant": {"group_size": 16},
    }
    return Config.model_validate(base | changes)


def test_models_that_fit_together_pass_and_their_facts_come_back(make_folder: MakeFolder) -> None:
    facts = check_models(config(make_folder(positions=96), make_folder("teacher", positions=128)))
    assert (facts.vocab_size, facts.eos_ids, facts.max_length) == (len(WORDS), (1,), 96)


def test_padded_vocabularies_are_cut_to_the_ids_that_mean_something(make_folder: MakeFolder) -> None:
    facts = check_models(config(make_folder(), make_folder("teacher", vocab_size=24)))
    assert (facts.vocab_size, facts.student_vocab_size) == (len(WORDS), 16)
    assert check_models(config(make_folder(), make_folder("short", vocab_size=5))).vocab_size == 5
    # A word that only one tokenizer knows is padding for the other.
    wider = make_folder("wider", words=[*WORDS, "<extra>"])
    assert check_models(config(make_folder(), wider)).vocab_size == len(WORDS)


def test_candidates_that_leave_only_padding_in_the_tail_give_no_reverse_kl(make_folder: MakeFolder) -> None:
    def with_top_k(top_k: int, beta: float = 1.0) -> Config:
        return config(make_folder(), objective={"target": "top_k", "top_k": top_k, "beta": beta})

    for top_k in (7, 10, 64):
        with pytest.raises(
            ModelError, match=rf"top_k={top_k} covers all 7 ids .* the student has 16.*infinite; use .*'dense'"
        ):
            check_models(with_top_k(top_k))
    check_models(with_top_k(6))
    check_models(with_top_k(64, beta=0.5))
    check_models(config(make_folder(), objective={"target": "dense", "beta": 1.0}))


def test_vocabularies_that_differ_are_refused_with_the_first_id(make_folder: MakeFolder) -> None:
    other = ["<pad>", "<end>", "<stop>", "a", "x", "c", "y"]
    with pytest.raises(ModelError, match=r"student.model=.* disagree on 2 of 7 token ids, first at id 4: 'x' vs 'b'"):
        check_models(config(make_folder(), make_folder("teacher", words=other)))


def test_models_that_end_a_text_differently_are_refused(make_folder: MakeFolder) -> None:
    with pytest.raises(ModelError) as error:
        check_models(config(make_folder(), make_folder("teacher", end="<stop>")))
    assert "student.model ends a text with ['<end>'], teacher.model with ['<stop>']" in str(error.value)
    assert "generation_config.json" in str(error.value)


def test_one_end_in_common_is_enough_and_the_generation_config_counts(make_folder: MakeFolder) -> None:
    student = make_folder()
    GenerationConfig(eos_token_id=[1, 2]).save_pretrained(student)
    assert check_models(config(student, make_folder("teacher", end="<stop>"))).eos_ids == (1, 2)


def test_a_model_without_an_end_is_refused_by_the_name_of_its_field(make_folder: MakeFolder) -> None:
    without = make_folder("without", end=None)
    with pytest.raises(ModelError, match=r"student.model=.* names no end-of-sequence token"):
        check_models(config(without))
    with pytest.raises(ModelError, match=r"teacher.model=.*without.* names no end-of-sequence token"):
        check_models(config(make_folder(), without))


def test_no_student_is_refused_with_two_ways_out() -> None:
    with pytest.raises(ConfigError, match=r"student.model is not set.*--student.model FOLDER.*--world.name"):
        check_models(config(None))


def test_a_folder_that_is_no_model_is_told_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"student.model=.* is a folder without config.json.*it is empty"):
        check_models(config(tmp_path / "empty"))
    (tmp_path / "empty" / "notes.txt").touch()
    with pytest.raises(ModelError, match=r"it holds notes.txt"):
        check_models(config(tmp_path / "empty"))


def test_weights_that_are_not_safetensors_are_refused(make_folder: MakeFolder) -> None:
    with pytest.raises(ModelError, match=r"student.model=.* has no \*.safetensors file.*save_pretrained"):
        check_models(config(make_folder(weights="pytorch_model.bin")))


def test_a_file_in_place_of_a_folder_is_refused(make_folder: MakeFolder) -> None:
    with pytest.raises(ModelError, match=r"is a file; give the folder"):
        check_models(config(make_folder() / "model.safetensors"))


def test_a_missing_folder_is_told_the_nearest_name(make_folder: MakeFolder, tmp_path: Path) -> None:
    make_folder("qwen3-tiny")
    with pytest.raises(ModelError, match=r"does not exist; did you mean .*/qwen3-tiny\?"):
        check_models(config(tmp_path / "qwen3-tyni"))
    with pytest.raises(ModelError, match=r"teacher.model=.* does not exist"):
        check_models(config(make_folder(), tmp_path / "nowhere" / "at" / "all"))


def test_a_length_above_the_models_positions_is_refused(make_folder: MakeFolder) -> None:
    with pytest.raises(ModelError, match=r"data.max_length=64 is longer than the model's 48 positions; lower it to 48"):
        check_models(config(make_folder(positions=128), make_folder("teacher", positions=48)))


def test_a_group_size_that_does_not_divide_names_the_layer(make_folder: MakeFolder) -> None:
    with pytest.raises(
        QuantError, match=r"quant\.group_size=32 does not divide the 48 inputs of layer .*mlp.down_proj"
    ):
        check_models(config(make_folder(), quant={"group_size": 32}))
    check_models(config(make_folder(), quant={"group_size": 32, "skip": ("lm_head", "down_proj")}, adapter=ATTENTION))
    check_models(config(make_folder(), quant={"group_size": "channel"}))


ATTENTION = {"targets": ("q_proj", "v_proj")}


def test_an_adapter_target_that_no_layer_has_is_told_the_nearest(make_folder: MakeFolder) -> None:
    with pytest.raises(QuantError, match=r"adapter\.targets: 'q_porj' is no linear layer .* did you mean 'q_proj'\?"):
        check_models(config(make_folder(), adapter={"targets": ("q_porj",)}))


Case = tuple[dict[str, Any] | None, dict[str, Any] | None, dict[str, Any]]
COMPLAINTS: dict[str, Case] = {  # the student's folder, the teacher's, settings
    "no student": (None, None, {}),
    "no weights": ({"weights": "pytorch_model.bin"}, None, {}),
    "vocabulary": ({}, {"words": [*WORDS[:4], "x", "c", "y"]}, {}),
    "ends": ({}, {"end": "<stop>"}, {}),
    "no end": ({"end": None}, None, {}),
    "length": ({"positions": 48}, None, {}),
    "tail": ({}, None, {"objective": {"target": "top_k", "top_k": 64, "beta": 1.0}}),
    "group size": ({}, None, {"quant": {"group_size": 32}}),
    "target": ({}, None, {"adapter": {"targets": ("q_porj",)}}),
    "target that is not quantized": ({}, None, {"adapter": {"targets": ("lm_head",)}}),
    "heads": ({}, None, {"rollout": {"tensor_parallel_size": 3, "max_new_tokens": 16}}),
}


@pytest.mark.parametrize("case", COMPLAINTS)
def test_every_complaint_about_models_names_a_field(make_folder: MakeFolder, case: str) -> None:
    student, teacher, settings = COMPLAINTS[case]
    folders = [
        None if given is None else make_folder(name, **given)
        for name, given in (("student", student), ("teacher", teacher))
    ]
    with pytest.raises(UserError) as error:
        check_models(config(*folders, **settings))
    assert names_a_field(str(error.value)), error.value


FIELDS = tuple(config_fields())


def names_a_field(text: str) -> bool:
    return any(re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", text) for name in FIELDS)


def test_every_complaint_about_room_names_a_field(tmp_path: Path) -> None:
    large = Config.model_validate(
        {
            "run": {"output": tmp_path}, "cluster": {"by_role": True},
            "trainer": {"num_gpus": 1}, "teacher": {"num_gpus": 3}, "evaluation": {"num_gpus": 1},
        }
    )  # fmt: skip
    by_role = [{"CPU": 9.0, "GPU": 5.0, "trainer": 1.0}, {"GPU": 3.0, "CPU": 9.0, "rollout": 1.0, "teacher": 1.0}]
    together = large.model_copy(update={"cluster": Config().cluster})
    (tmp_path / "file").touch()
    nowhere = Config.model_validate({"run": {"output": tmp_path / "file" / "x"}})
    for complain in (
        lambda: check_room(large, 10**15),
        lambda: check_writable(nowhere),
        lambda: check_placement(together, [{"CPU": 1.0}]),
        lambda: check_placement(together, [{"CPU": 9.0, "GPU": 2.0}, {"GPU": 2.0}, {"GPU": 2.0}]),
        lambda: check_placement(large, [{"CPU": 9.0, "GPU": 9.0}]),
        lambda: check_placement(large, by_role),
    ):
        with pytest.raises(UserError) as error:
            complain()
        assert names_a_field(str(error.value)), error.value
    roles = ("trainer", "rollout", "teacher", "evaluation")
    parts = [
        {"role": role, "count": 1, "name": "weights", "place": place, "bytes": 2 ** (60 + number)}
        for number, role in enumerate(roles)
        for place in ("GPU", "host")
    ]
    gpus = [
        {"roles": list(some), "share": 1.0} for some in (*((role,) for role in roles), roles, ("trainer", "evaluation"))
    ]
    gpu = GpuMemory(name="one", bytes=2**30)
    said = [host_remark({"memory": parts}), *gpu_remarks(large, {"memory": parts, "gpus": gpus}, gpu)]
    warned = [*said, *template_warnings("strftime_now", {"effort": 1}), *parity_of_nothing()]
    assert {remark.status for remark in warned} == {"warning"}
    assert [remark.text for remark in warned if not names_a_field(remark.text)] == []


def parity_of_nothing() -> list[Finding]:
    (found,) = [found for found in examine(Config.model_validate(OFF_POLICY), parity=True) if found.check == "parity"]
    return [found]


OFF_POLICY = {"objective": {"on_policy_fraction": 0}}


def test_a_model_of_another_kind_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "t5"
    T5Config(vocab_size=16, d_model=32, num_layers=1, num_heads=2, d_ff=48, d_kv=16).save_pretrained(folder)
    save_tokenizer(folder, WORDS, "<end>")
    (folder / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"student.model=.* is no causal language model"):
        check_models(config(folder))


def test_a_broken_config_is_a_users_error(make_folder: MakeFolder) -> None:
    folder = make_folder()
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"student.model=.* cannot be read as a model"):
        check_models(config(folder))
