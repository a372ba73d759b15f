"""Sweep files: what they mean, and the mistakes that are found before anything starts."""

from pathlib import Path
from typing import Any

import pytest

from raydistill.config import Config
from raydistill.errors import ConfigError
from raydistill.sweep.spec import Sweep, load_sweep

ROOT = Path(__file__).parents[3]
NO_TEACHER = """
[settings]
"objective.distill_weight" = 0.0
"objective.ce_weight" = 1.0
"objective.on_policy_fraction" = 0.0
"""
SOME_WITHOUT_TEACHER = """
[settings]
"objective.ce_weight" = 1.0
"objective.on_policy_fraction" = 0.0
[space]
"objective.distill_weight" = [1.0, 0.0]
"""


def sweep(tmp_path: Path, text: str, *arguments: str, **changes: Any) -> Sweep:
    path = tmp_path / "lr.toml"
    path.write_text(text)
    return load_sweep(path, arguments, **changes)


def test_every_trial_has_the_settings_and_its_own_values(tmp_path: Path) -> None:
    found = sweep(
        tmp_path,
        """
        seeds = [1, 2]
        [settings]
        "objective.on_policy_fraction" = 0.0
        [space]
        "trainer.learning_rate" = { log_range = [1e-4, 1e-2], num = 3 }
        "data.template.style" = ["a", "b"]
        """,
        "--trainer.num_steps",
        "7",
    )
    assert (found.name, found.num_trials, found.mode) == ("lr", 12, "min")
    assert found.fields == ["trainer.learning_rate", "data.template.style", "run.seed"]
    assert found.points is not None
    config = found.config_of(found.points[-1], "lr-011")
    assert (config.trainer.learning_rate, config.run.seed, config.run.name) == (1e-2, 2, "lr-011")
    assert (config.objective.on_policy_fraction, config.trainer.num_steps) == (0.0, 7)
    assert config.data.template == {"enable_thinking": False, "style": "b"}
    assert config.teacher.cache_gib == 2.0  # trials share the answers


def test_sections_may_be_written_as_tables(tmp_path: Path) -> None:
    one = sweep(
        tmp_path, '[space]\n"trainer.learning_rate" = [1e-4, 1e-3]\n"trainer.num_steps" = { range = [1, 3], num = 3 }'
    )
    other = sweep(tmp_path, "[space.trainer]\nlearning_rate = [1e-4, 1e-3]\nnum_steps = { range = [1, 3], num = 3 }")
    assert one.points == other.points


def test_fields_of_a_section_may_vary_together(tmp_path: Path) -> None:
    text = '[space]\nquant = [{ format = "int2" }, { format = "nf4", symmetric = true, scale = "absmax" }]'
    found = sweep(tmp_path, text)
    assert found.fields == ["quant.format", "quant.symmetric", "quant.scale"]
    assert found.points == (
        {"quant.format": "int2", "quant.symmetric": False, "quant.scale": "searched"},
        {"quant.format": "nf4", "quant.symmetric": True, "quant.scale": "absmax"},
    )
    with pytest.raises(ConfigError, match="quant is a section: list what its fields are together"):
        sweep(tmp_path, "[space]\nquant = [1, 2]")
    with pytest.raises(ConfigError, match=r"did you mean `quant\.format`"):
        sweep(tmp_path, '[space]\nquant = [{ forma = "int2" }]')


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    text = 'parallel = 2\n[settings]\n"trainer.num_steps" = 5\n[space]\n"objective.beta" = { range = [0.0, 1.0] }'
    found = sweep(
        tmp_path, text, "--trainer.num_steps", "6", sampler="random", num_samples=4, parallel=None, name="beta"
    )
    assert (found.base.trainer.num_steps, found.num_trials, found.file.parallel, found.name) == (6, 4, 2, "beta")


def test_a_config_on_the_command_line_takes_the_place_of_the_base_and_the_settings_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "mine.toml").write_text(
        '[student]\nmodel = "me/student"\n[data]\npath = "rows.jsonl"\n[objective]\nbeta = 0.3\ntop_k = 7\n'
    )
    file, mine = ROOT / "tune" / "lr_offpolicy.toml", f"@{tmp_path / 'mine.toml'}"
    shipped, own = load_sweep(file).base, load_sweep(file, [mine, "--objective.top_k", "9"]).base
    assert (shipped.world.name, shipped.data.max_rows) == ("stories", 3500)
    assert (own.world.name, own.student.model, own.teacher.model) == ("none", "me/student", None)
    assert (own.data.path, own.data.max_rows, own.data.eval_path) == (Path("rows.jsonl"), None, None)
    assert (own.run.output, own.evaluation.exact_match) == (Path("outputs"), Config().evaluation.exact_match)
    assert (own.objective.on_policy_fraction, own.objective.beta, own.objective.top_k) == (0.0, 0.0, 9)


def test_what_is_best_follows_from_the_metric(tmp_path: Path) -> None:
    text = 'metric = "evaluate/exact_match"\n[space]\n"objective.beta" = [0.0, 1.0]'
    assert sweep(tmp_path, text, "--evaluation.exact_match", "final_number").mode == "max"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('[space]\n"trainer.lerning_rate" = [1e-3]', "did you mean `trainer.learning_rate`"),
        ('[settings]\n"trainer.steps" = 3\n[space]\n"objective.beta" = [0.0]', "did you mean `trainer.num_steps`"),
        ('[space]\n"run.output" = ["a", "b"]', "run.output is the sweep's own"),
        ('[space]\n"cluster.num_cpus" = [1, 2]', "all trials run on one cluster"),
        ('[space]\n"study.seeds" = [1, 2]', "no trial reads it; sweep what an arm sets"),
        ('[space]\n"world.recipe.num_steps" = [9, 8]', "for all trials: run a sweep of its own, with --name, for each"),
        ('[space]\nworld = [{ name = "stories" }, { name = "none" }]', "world.name cannot differ between trials"),
        ('[space]\n"results.tags.who" = ["a", "b"]', "all trials are recorded in one place"),
        ('[settings]\n"objective.beta" = 0.0\n[space]\n"objective.beta" = [0.0]', "stands in both settings and space"),
        ('seeds = [1]\n[space]\n"run.seed" = [1, 2]', "keep one of them"),
        ('base = ["@configs/demo.toml"]', "nothing varies"),
        ('[space]\n"trainer.learning_rate" = [-1.0, 1e-3]', "with trainer.learning_rate=-1.0"),
        ('[space]\n"trainer.sequences_per_step" = [32, 33]', "with trainer.sequences_per_step=33"),
        ('sampler = "random"\n[space]\n"objective.beta" = [0.0]', "needs num_samples"),
        ('num_samples = 3\n[space]\n"objective.beta" = [0.0]', "num_samples is for sampler random or optuna"),
        ('sampler = "optuna"\nnum_samples = 3\nseeds = [1, 2]\n[space]\n"objective.beta" = [0.0]', "seeds are for grid"),
        ('sampler = "bayes"\n[space]\n"objective.beta" = [0.0]', "sampler"),
        ('samplr = "grid"\n[space]\n"objective.beta" = [0.0]', "a sweep file has name, description"),
        ('scheduler = "asha"\n[settings]\n"trainer.num_steps" = 50\n[space]\n"objective.beta" = [0.0]', "asha.grace_steps"),
        ('[settings]\n"data.eval_rows" = 0\n[space]\n"objective.beta" = [0.0]', "data.eval_rows=0 leaves no"),
        ('metric = "evaluate/kl"\n[space]\n"objective.beta" = [0.0]', "did you mean `evaluate/kl_nats`"),
        ('metric = "loss"\n[space]\n"objective.beta" = [0.0]', "evaluations report evaluate/perplexity, evaluate/kl_nats"),
        ('metric = "evaluate/exact_match"\n[space]\n"objective.beta" = [0.0]', "with evaluation.exact_match='off'"),
        (f"{NO_TEACHER}[space]\n\"trainer.learning_rate\" = [1e-3]", "objective.distill_weight=0 asks no teacher"),
        (SOME_WITHOUT_TEACHER, "objective.distill_weight=0 asks no teacher; evaluations report evaluate/perplexity"),
        ("[space", "is no TOML"),
    ],
)  # fmt: skip
def test_a_mistake_is_found_before_anything_starts(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sweep(tmp_path, text)
    assert complaint in str(caught.value)
    assert str(tmp_path / "lr.toml") in str(caught.value)


def test_a_space_that_has_fewer_points_than_asked_for_is_told(tmp_path: Path) -> None:
    text = 'sampler = "random"\nseeds = [0, 1]\n[space]\n"objective.beta" = [0.0, 0.5, 1.0]'
    fewer = sweep(tmp_path, text, num_samples=5)
    assert fewer.num_trials == 6
    assert fewer.note == "num_samples=5, and the space has only 3 different points: each is tried once"
    assert sweep(tmp_path, text, num_samples=3).note is None
    assert sweep(tmp_path, '[space]\n"objective.beta" = [0.0, 1.0]').note is None


def test_a_metric_that_trials_have_is_taken(tmp_path: Path) -> None:
    space = '[space]\n"trainer.learning_rate" = [1e-3]'
    assert sweep(tmp_path, f'metric = "evaluate/perplexity"\n{NO_TEACHER}{space}').num_trials == 1
    match = f'metric = "evaluate/exact_match_se"\n[settings]\n"evaluation.exact_match" = "final_number"\n{space}'
    assert sweep(tmp_path, match).num_trials == 1


def test_a_sweep_that_goes_on_may_change_how_it_runs_but_not_what(tmp_path: Path) -> None:
    text = '[space]\n"objective.beta" = [0.0, 1.0]'
    before = sweep(tmp_path, text).identity()
    assert sweep(tmp_path, text, "--run.verbose", "true", parallel=2).identity() == before
    assert sweep(tmp_path, text, "--run.output", "/elsewhere", "--results.uri", "http://mlflow").identity() == before
    assert sweep(tmp_path, text, "--trainer.num_steps", "3").identity() != before
    assert sweep(tmp_path, '[space]\n"objective.beta" = [0.0, 0.5]').identity() != before


@pytest.mark.parametrize("path", sorted((ROOT / "tune").glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_sweep_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = load_sweep(path)
    assert found.num_trials > 1
    assert found.file.description
