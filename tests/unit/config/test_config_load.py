"""Files and arguments become one validated tree, and every value knows where it came from."""

import re
from pathlib import Path

import pytest

from raydistill.config import Config
from raydistill.config.load import load_config, require_inputs
from raydistill.errors import ConfigError


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write `name.toml` into the (current) test folder."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return f"@{name}"

    return write


def problems(*args: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(args)
    return str(caught.value).splitlines()


def test_no_arguments_give_the_defaults():
    loaded = load_config([])
    assert loaded.config == Config()
    assert set(loaded.sources.values()) == {"default"}


def test_a_later_file_wins_and_the_command_line_wins_over_all(write):
    base = write("base.toml", "[trainer]\nnum_steps = 1\nlearning_rate = 1e-3\nsequences_per_step = 64\n")
    over = write("over.toml", "# a comment\n[trainer]\nnum_steps = 2\nlearning_rate = 2e-3\n")
    loaded = load_config(["--trainer.num_steps", "3", base, over])
    trainer = loaded.config.trainer
    assert (trainer.num_steps, trainer.learning_rate, trainer.sequences_per_step) == (3, 2e-3, 64)
    assert loaded.sources["trainer.num_steps"] == "command line"
    assert loaded.sources["trainer.learning_rate"] == "over.toml:4"
    assert loaded.sources["trainer.sequences_per_step"] == "base.toml:4"
    assert loaded.sources["trainer.num_workers"] == "default"


def test_extends_is_relative_to_the_file_and_comes_before_it(write):
    write("base/a.toml", "[run]\nseed = 1\n[trainer]\nnum_steps = 1\n")
    write("base/b.toml", 'extends = "a.toml"\n[run]\nseed = 2\n')
    top = write("top.toml", 'extends = ["base/b.toml"]\n[trainer]\nnum_steps = 3\n')
    loaded = load_config([top])
    assert (loaded.config.run.seed, loaded.config.trainer.num_steps) == (2, 3)
    assert loaded.sources["run.seed"] == "base/b.toml:3"


def test_files_that_extend_each_other_are_refused(write):
    write("a.toml", 'extends = "b.toml"\n')
    b = write("b.toml", "[run]\n#\n[trainer]\n")
    write("b.toml", '\nextends = "a.toml"\n')
    assert problems(b) == ["a.toml:1: b.toml -> a.toml -> b.toml extend each other; remove one `extends`"]


def test_every_way_to_write_an_override():
    config = load_config(
        [
            *("--trainer.learning_rate", "1e-4"),
            "--trainer.num_steps=7",
            "--run.verbose",
            *("--student.trust_remote_code", "true"),
            *("--trainer.gradient_checkpointing", "false"),
            *("--quant.skip", "lm_head,embed_tokens"),
            *("--adapter.targets", '["q_proj", "v_proj"]'),
            *("--trainer.betas", "0.8, 0.9"),
            *("--quant.group_size", "channel"),
            *("--trainer.zero_stage", "1"),
            *("--run.name", "12"),
            *("--results.tags.owner", "me"),
            *("--results.tags", '{team = "x"}'),
            *("--data.template.budget", "5"),
        ]
    ).config
    assert (config.trainer.learning_rate, config.trainer.num_steps, config.trainer.zero_stage) == (1e-4, 7, 1)
    assert config.run.verbose
    assert config.student.trust_remote_code
    assert not config.trainer.gradient_checkpointing
    assert config.quant.skip == ("lm_head", "embed_tokens")
    assert config.adapter.targets == ("q_proj", "v_proj")
    assert config.trainer.betas == (0.8, 0.9)
    assert config.quant.group_size == "channel"
    assert config.run.name == "12"
    assert config.results.tags == {"owner": "me", "team": "x"}
    assert config.data.template == {"enable_thinking": False, "budget": 5}


def test_a_flag_before_a_file_does_not_swallow_it(write):
    file = write("a.toml", "[run]\nseed = 5\n")
    config = load_config(["--run.verbose", file]).config
    assert config.run.verbose
    assert config.run.seed == 5


def test_none_unsets_an_optional_field_and_removes_an_entry_of_a_table(write):
    base = write("base.toml", '[run]\nname = "x"\n[data]\nmax_rows = 3\n[results.tags]\na = "1"\nb = "2"\n')
    over = write("over.toml", '[data]\nmax_rows = "none"\ntemplate.enable_thinking = "none"\n')
    loaded = load_config([base, over, "--run.name", "none", "--results.tags.a", "none"])
    assert loaded.config.data.max_rows is None
    assert loaded.config.run.name is None
    assert loaded.config.results.tags == {"b": "2"}
    assert loaded.config.data.template == {}
    assert loaded.sources["data.max_rows"] == "over.toml:2"
    assert load_config(["--quant.skip", "none"]).config.quant.skip == ()


def test_lines_are_found_behind_lists_strings_and_inline_tables_of_several_lines(write):
    text = '[quant]\nskip = [\n  "lm_head", # ]\n]\nformat = "int2"\n\n[run]\nname = """\\\n  x"""\nseed = 3\n'
    text += '[results]\ntags = {a = "1"}\ntags-x = 3\n'
    file = write("a.toml", text)
    assert problems(file)[0].startswith("a.toml:13: unknown field `results.tags-x`")
    sources = load_config([write("b.toml", text.replace("tags-x = 3\n", ""))]).sources
    assert sources["quant.skip"] == "b.toml:2"
    assert sources["quant.format"] == "b.toml:5"
    assert sources["run.seed"] == "b.toml:10"
    assert sources["results.tags.a"] == "b.toml:12"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("trainer.lr", "trainer.learning_rate"),
        ("lr", "trainer.learning_rate"),
        ("trainer.learning-rate", "trainer.learning_rate"),
        ("trainer.learnin_rate", "trainer.learning_rate"),
        ("trianer.learning_rate", "trainer.learning_rate"),
        ("lambda", "objective.on_policy_fraction"),
        ("objective.lambda", "objective.on_policy_fraction"),
        ("beta", "objective.beta"),
        ("rank", "adapter.rank"),
        ("bits", "quant.format"),
        ("quant.bits", "quant.format"),
        ("seed", "run.seed"),
        ("trainer.per_device_train_batch_size", "trainer.sequences_per_micro_batch"),
        ("trainer.max_staleness", "sync.max_staleness"),
    ],
)
def test_an_unknown_name_offers_the_nearest_field(given, meant, write):
    assert problems(f"--{given}", "1") == [f"command line: unknown field `{given}`; did you mean `{meant}`?"]
    if given.count(".") == 1:
        section, leaf = given.split(".")
        (line,) = problems(write("a.toml", f"\n[{section}]\n{leaf} = 1\n"))
        assert line.startswith("a.toml:")
        assert "did you mean `" in line


def test_a_leaf_of_two_sections_offers_both_and_the_nearer_section_first():
    assert problems("--temperature", "1")[0].endswith("did you mean `objective.temperature` or `rollout.temperature`?")
    assert "did you mean `rollout.temperature` or" in problems("--rolout.temperature", "1")[0]


def test_a_hopeless_name_says_where_to_look():
    assert problems("--xyzzy", "1") == [
        "command line: unknown field `xyzzy`; `raydistill config --fields` lists them all"
    ]


def test_all_mistakes_are_reported_at_once_with_their_places(write):
    file = write("a.toml", "[trainer]\nlr = 3\nnum_steps = true\n\n[trianer]\nnum_steps = 4\n[run]\nseed.x = 1\n")
    lines = problems(file, "--objective.beta", "1.5", "stray")
    assert [line.partition(": ")[0] for line in lines] == [
        "a.toml:2", "a.toml:5", "a.toml:8", "command line", "command line", "a.toml:3",
    ]  # fmt: skip
    assert "did you mean `[trainer]`?" in lines[1]
    assert "single value, not a table" in lines[2]


def test_a_combination_is_not_blamed_while_a_name_is_unknown():
    lines = problems("--trainer.sequences_per_stp", "40", "--trainer.num_workers", "5")
    assert len(lines) == 1


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--objective.beta", "1.5"], ["objective.beta=1.5", "from 0 to 1", "0 = forward KL", "1 = reverse KL"]),
        (["--trainer.num_steps", "abc"], ['trainer.num_steps="abc"', "a whole number, at least 1", "default 1000"]),
        (
            ["--quant.format", "in4"],
            ['one of "int4", "int3", "int2", "nf4", "codebook" or "none"', "did you mean `int4`?"],
        ),
        (["--trainer.betas", "1,2,3"], ["a list of 2, each a number, at least 0 and below 1"]),
        (["--trainer.learning_rate", "nan"], ["a number, above 0"]),
        (["--data.max_rows", "0"], ["a whole number, at least 1, or none"]),
        (["--sync.max_policy_gap_nats", "0"], ["a number, above 0, or none"]),
        (["--run.name", "a/b"], ["letters, digits"]),
        (["--trainer.num_steps"], ["--trainer.num_steps needs a value: a whole number, at least 1"]),
        (["--results.tags", "3"], ["--results.tags.<key> <value>"]),
        (["--trainer", "3"], ["`trainer` is a section"]),
        (["--trainer.num_steps.x", "3"], ["`trainer.num_steps` takes a whole number"]),
        (["demo.toml"], ["for a config file write @demo.toml"]),
        (["@"], ["@configs/demo.toml"]),
    ],
)
def test_a_bad_value_says_the_value_its_origin_what_is_allowed(args, said):
    (line,) = problems(*args)
    assert line.startswith("command line: ")
    for words in said:
        assert words in line


def test_a_missing_file_offers_the_nearest(write):
    write("configs/demo.toml", "")
    assert problems("@configs/dmo.toml") == [
        "config file configs/dmo.toml does not exist; did you mean configs/demo.toml?"
    ]
    assert "did you mean configs/demo.toml?" in problems("@demo")[0]
    file = write("a.toml", '\n\nextends = "demo.toml"\n')
    assert problems(file)[0].startswith("a.toml:3: config file demo.toml does not exist; did you mean")
    assert "is a folder" in problems("@configs")[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[trainer]\nlr = int4\n", "a.toml:2:6: not valid TOML: invalid value in `lr = int4`; text needs quotes"),
        ("[trainer\n", "a.toml:1:9: not valid TOML"),
        ("x = [1,", "a.toml:1:8: not valid TOML"),
    ],
)
def test_malformed_toml_says_file_line_and_column(text, said, write):
    (line,) = problems(write("a.toml", text))
    assert line.startswith(said)


def test_a_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "a.toml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8 text" in problems(f"@{path}")[0]


COMBINATIONS = [
    ("run.storage=bucket/prefix", ["run.storage='bucket/prefix'", "is no URL", "s3://bucket/prefix"]),
    ("run.storage=s3://", ["run.storage='s3://'", "names no bucket"]),
    ("run.storage=file://outputs", ["run.storage='file://outputs'", "file:///outputs"]),
    ("objective.beta=1e-4", ["objective.beta=0.0001", "float32"]),
    ("objective.distill_weight=0", ["objective.distill_weight=0", "objective.ce_weight=0"]),
    ("objective.distill_weight=0 objective.ce_weight=1", ["distill_weight=0", "objective.on_policy_fraction=0.5"]),
    ("quant.group_size=0", ["quant.group_size=0", "'channel'"]),
    ("adapter.dropout=0.1", ["adapter.dropout=0.1", "adapter.mode='merged'", "'served'"]),
    ("adapter.targets=[]", ["adapter.targets", "adapter.mode='merged'"]),
    ("rollout.min_new_tokens=200", ["rollout.min_new_tokens=200", "rollout.max_new_tokens=128"]),
    ("rollout.engine=hf rollout.tensor_parallel_size=2", ["rollout.tensor_parallel_size=2", "rollout.engine='vllm'"]),
    (
        "rollout.tensor_parallel_size=2 rollout.num_gpus=1",
        ["rollout.tensor_parallel_size=2", "rollout.num_gpus=2", "not 1"],
    ),
    ("rollout.num_gpus=2", ["rollout.num_gpus=2", "rollout.tensor_parallel_size=1", "set both"]),
    ("rollout.num_gpus=2.5", ["rollout.num_gpus=2.5", "rollout.tensor_parallel_size=1"]),
    ("rollout.num_gpus=2 rollout.engine=hf", ["rollout.num_gpus=2", "rollout.engine='vllm'"]),
    ("teacher.num_gpus=2.5", ["teacher.num_gpus=2.5", "use 2 or 3", "at most 1"]),
    ("evaluation.num_gpus=2", ["evaluation.num_gpus=2", "one device"]),
    ("trainer.num_gpus=2", ["trainer.num_gpus=2", "trainer.num_workers", "trainer.zero_stage=3"]),
    ("trainer.num_gpus=0.5 trainer.num_workers=2", ["trainer.num_gpus=0.5", "trainer.num_workers=2", "NCCL"]),
    ("trainer.num_workers=3", ["trainer.sequences_per_step=32", "trainer.num_workers=3", "use 24"]),
    (
        "trainer.sequences_per_step=20",
        ["trainer.sequences_per_step=20", "trainer.num_workers=1", "trainer.sequences_per_micro_batch=8", "use 16"],
    ),
    ("data.max_length=100", ["rollout.max_new_tokens=128", "data.max_length=100"]),
    ("data.min_prompt_room=1024", ["data.min_prompt_room=1024", "data.max_length=1024"]),
    ("data.min_completion=1024", ["data.min_completion=1024", "data.max_length=1024"]),
    (
        "evaluation.exact_match=final_number evaluation.max_new_tokens=1024",
        ["evaluation.max_new_tokens=1024", "data.max_length=1024", "evaluation.exact_match"],
    ),
    ("trainer.zero_stage=3 adapter.mode=none", ["trainer.zero_stage=3", "adapter.mode='none'", "quant.format='int4'"]),
    ("world.name=question_answers", ["world.name='question_answers'", "world.train_path"]),
    ("world.name=question_answers world.train_path=x", ["world.name='question_answers'", "world.test_path"]),
    ("world.name=text world.train_path=x", ["world.name='text'", "world.test_path", "paragraph"]),
    ("world.name=stories world.train_path=x", ["world.train_path", "world.name='stories'"]),
    ("world.recipe.hidden_size=3", ["world.recipe", "world.name='none'"]),
]


@pytest.mark.parametrize(("overrides", "said"), COMBINATIONS, ids=[overrides for overrides, _ in COMBINATIONS])
def test_a_bad_combination_names_each_field_its_value_a_way_out_and_the_origins(overrides, said):
    (line,) = problems(*(f"--{override}" for override in overrides.split()))
    for words in said:
        assert words in line
    assert re.search(r"\buse\b|\bset\b|\bchange\b|\blower\b|\bchoose\b", line)
    first = overrides.split("=")[0].replace(".hidden_size", "")
    assert f"{first}: command line" in line


def test_the_size_that_a_message_offers_is_accepted():
    (line,) = problems("--trainer.num_workers=4", "--trainer.sequences_per_step=10")
    offered = re.search(r"use (\d+) or", line)[1]
    load_config(["--trainer.num_workers=4", f"--trainer.sequences_per_step={offered}"])


def test_an_off_policy_run_is_not_bound_by_the_length_of_samples():
    load_config(["--data.max_length=100", "--objective.on_policy_fraction=0"])


def test_a_run_without_model_or_data_is_refused_before_it_starts():
    with pytest.raises(ConfigError) as caught:
        require_inputs(Config())
    assert [line.split()[0] for line in str(caught.value).splitlines()] == ["student.model", "data.path"]
    require_inputs(load_config(["--world.name", "stories"]).config)
    require_inputs(load_config(["--student.model", "m", "--data.path", "d.jsonl"]).config)


CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=[path.name for path in CONFIGS])
def test_every_config_file_loads_and_says_what_it_is_for(path):
    load_config([f"@{path}"])
    opening = path.read_text().partition("\n\n")[0] + path.read_text().partition("\n[")[0]
    assert opening.startswith("# ")
    assert "#   python -m raydistill" in opening
    assert "# Expect" in opening


def test_the_on_policy_file_differs_from_its_base_in_lambda_beta_and_the_rollout_gpu_only():
    folder = Path(__file__).parents[3] / "configs"
    base = load_config([f"@{folder}/int4_offpolicy.toml"])
    changed = load_config([f"@{folder}/int4_onpolicy.toml"])
    names = {name for name in base.sources if base.sources[name] != changed.sources[name]}
    assert names == {"objective.on_policy_fraction", "objective.beta", "rollout.num_gpus"}


def test_a_database_stays_where_it_was_for_whoever_stands_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    found = [load_config(["--results.uri", uri]).config.results.uri for uri in ("sqlite:///a/b.db", "http://mlflow")]
    assert found == [f"sqlite:///{tmp_path}/a/b.db", "http://mlflow"]
    monkeypatch.chdir("/")
    assert load_config(["--results.uri", str(found[0])]).config.results.uri == found[0]


def test_sinks_without_a_delivery_are_refused() -> None:
    (complaint,) = problems("--results.sinks", "tensorboard", "--results.deliver", "false")
    assert "results.sinks=['tensorboard'] get the record with the results store, and results.deliver=false" in complaint
