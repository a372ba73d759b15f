"""The configuration in words: resolved TOML, JSON schema, field listing."""

import json
import tomllib
from pathlib import Path

import jsonschema
import pytest

from raydistill.config import Config
from raydistill.config.fields import ALIASES, config_fields, config_sections
from raydistill.config.help import field_help, format_resolved, json_schema
from raydistill.config.load import load_config
from raydistill.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.toml"))
AWKWARD = [
    "--results.tags.a b=c",
    "--results.tags",
    json.dumps({"a.b": 'quote " and \\ and é', "tab\t": "line\nbreak \x7f \U0001f600", "": "x"}),
    "--data.template.enable_thinking=none",
    "--data.template.level=0.5",
    "--trainer.learning_rate=1e-7",
    "--quant.group_size=channel",
    "--adapter.mode=none",
    "--adapter.targets=",
    "--run.seed=123456789012",
]


@pytest.mark.parametrize("args", [[], AWKWARD, *([f"@{path}"] for path in CONFIGS)], ids=str)
def test_the_resolved_text_loads_again_as_the_same_config(args, tmp_path):
    loaded = load_config(args)
    path = tmp_path / "resolved.toml"
    path.write_text(format_resolved(loaded), encoding="utf-8")
    assert load_config([f"@{path}"]).config == loaded.config


def test_the_resolved_text_shows_the_source_of_each_value_in_one_column(tmp_path):
    (tmp_path / "a.toml").write_text("[trainer]\nnum_steps = 3\n")
    text = format_resolved(load_config([f"@{tmp_path}/a.toml", "--run.seed", "4"]))
    lines = text.splitlines()
    assert any(line.startswith("num_steps = 3 ") and line.endswith("a.toml:2") for line in lines)
    assert any(line.startswith("seed = 4 ") and line.endswith("# command line") for line in lines)
    assert any(line.startswith("template.enable_thinking = false ") and line.endswith("# default") for line in lines)
    columns = {line.rindex("  # ") for line in lines if "  # " in line and not line.startswith("targets")}
    assert len(columns) == 1


def test_the_json_schema_is_valid_and_accepts_the_config_files_and_no_unknown_key():
    schema = json_schema()
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    for path in CONFIGS:
        validator.validate(tomllib.loads(path.read_text()))
    validator.validate(tomllib.loads(format_resolved(load_config([]))))
    assert not validator.is_valid({"trainer": {"lr": 3}})
    assert not validator.is_valid({"objective": {"beta": 1.5}})
    assert not validator.is_valid({"optimizer": {}})


def test_the_json_schema_gives_each_field_its_dotted_name_description_and_default():
    schema = json_schema()
    for section in config_sections():
        reference = schema["properties"][section]["$ref"].rpartition("/")[2]
        for leaf, spec in schema["$defs"][reference]["properties"].items():
            assert spec["title"] == f"{section}.{leaf}"
            assert spec["description"]
            assert spec["default"] is not None


def test_the_listing_names_every_field_with_its_default_and_what_it_accepts():
    text = field_help()
    for name, field in config_fields().items():
        assert f"  {name} = " in text
        assert field.description
    assert "  trainer.num_steps = 1000\n      optimizer steps. Takes a whole number, at least 1." in text
    assert "  data.path = none\n" in text
    assert "[quant]" not in field_help("trainer")
    assert all(Config.model_fields[section].annotation.__doc__ for section in config_sections())


def test_the_listing_of_an_unknown_section_offers_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown section `trianer`; did you mean `trainer`\?"):
        field_help("trianer")


def test_every_alias_points_to_a_field_and_hides_none():
    leaves = {name.rpartition(".")[2] for name in config_fields()}
    for alias, names in ALIASES.items():
        assert set(names) <= set(config_fields()), alias
        assert alias not in leaves
