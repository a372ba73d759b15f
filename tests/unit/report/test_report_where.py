"""`--where`, `--sort` and `--columns`: names, typed comparisons, quotes, and what is said of a mistake."""

from pathlib import Path
from typing import Any

import pytest

from raydistill.errors import UserError
from raydistill.report.where import matching, parse
from raydistill.results.names import Names
from raydistill.results.runs import RunRow, typed_setting


def run(name: str, settings: dict[str, Any], metrics: dict[str, float], **tags: str) -> RunRow:
    return RunRow(
        name=name,
        id=name * 8,
        record_id=name,
        status="finished",
        started_s=1.8e9,
        seconds=10.0,
        parent=None,
        settings=settings,
        metrics=metrics,
        tags=tags,
        folder=Path("/x"),
    )


RUNS = [
    run(
        "a",
        {"quant.format": "int2", "trainer.learning_rate": 1e-3, "quant.group_size": 32, "quant.symmetric": False},
        {"evaluate/kl_nats": 0.2, "trainer/kl_nats": 0.3, "trainer/loss": 1.0},
        owner="me and you",
    ),
    run(
        "b",
        {"quant.format": "int4", "trainer.learning_rate": 1e-5, "quant.group_size": "channel", "quant.symmetric": True},
        {"evaluate/kl_nats": 0.1, "rollout/wait_s": 2.0, "teacher/wait_s": 1.0},
    ),
    run("c", {"quant.format": "int2", "quant.skip": ["lm_head", "embed"], "data.max_rows": None}, {}),
]


@pytest.mark.parametrize(
    ("where", "found"),
    [
        ('quant.format = "int2"', "ac"),
        ("quant.format = int2 and trainer.learning_rate > 1e-4", "a"),
        ("quant.format='int2'AND trainer.learning_rate>=0.001", "a"),
        ("quant.format != int2", "b"),
        ("learning_rate < 1e-4", "b"),
        ("kl <= 0.1", "b"),
        ("evaluate/kl_nats > 0.15", "a"),
        ("loss = 1", "a"),
        ("tags.owner = 'me and you'", "a"),
        ('owner != "me and you"', "bc"),
        ("quant.group_size = 32", "a"),
        ("quant.group_size = '32'", "a"),
        ("quant.group_size = channel", "b"),
        ("quant.symmetric = true", "b"),
        ("quant.symmetric = false", "a"),
        ("data.max_rows = none", "abc"),
        ("quant.skip = embed", "c"),
        ("status = finished and name = b", "b"),
        ("started > 2020-01-01", "abc"),
        ("seconds > 10", ""),
        ("trainer.learning_rate != none", "ab"),
    ],
)
def test_a_filter_finds_the_runs_that_satisfy_it(where: str, found: str) -> None:
    assert "".join(one.name for one in matching(RUNS, where)) == found


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("quant.format", "comes =, !="),
        ("quant.format =", "needs a value"),
        ("= int2", "NAME OPERATOR VALUE"),
        ("", "NAME OPERATOR VALUE"),
        ("quant.format = 'int2", "has no end"),
        ("quant.format ~ int2", "comes =, !="),
        ("quant.format ! int2", "means nothing"),
        ("kl < 1 or kl > 2", "only `and` joins"),
        ("tags.owner = me too", "quote text with spaces"),
        ("kl < 1 and", "NAME OPERATOR VALUE"),
        ("kl < low", "is a number and 'low' is none"),
        ("quant.symmetric > 0", "has no order"),
        ("quant.fromat = int2", "did you mean quant.format?"),
        ("lr > 1", "did you mean trainer.learning_rate?"),
        ("evaluate/kl_nat < 1", "did you mean evaluate/kl_nats"),
        ("wait > 1", "rollout/wait_s or teacher/wait_s"),
        ("model = x", "student.model or teacher.model"),
        ("zzz = 1", "the metrics are evaluate/kl_nats"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_and_names_the_nearest(where: str, said: str) -> None:
    with pytest.raises(UserError) as raised:
        matching(RUNS, where)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_quotes_keep_what_looks_like_syntax_and_a_backslash_keeps_the_quote() -> None:
    (one, two) = parse(r"""tags.note = "a = \"b\" and c" and tags.other='it\'s'""")
    assert (one.text, two.text) == ('a = "b" and c', "it's")


def test_names_are_whole_names_first_then_last_parts_and_a_held_out_metric_wins() -> None:
    names = Names(RUNS)
    assert names.find("kl").key == "evaluate/kl_nats"
    assert names.find("trainer/kl_nats").key == "trainer/kl_nats"
    assert names.find("learning_rate").kind == "setting"
    assert names.find("owner").label == "tags.owner"
    assert names.find("run").kind == "fact"


def test_a_short_name_is_a_runs_own_metric_beside_a_table_of_several_models() -> None:
    table = run("table", {}, {f"evaluate/{model}/{name}": 0.5 for model in "AB" for name in ("kl_nats", "exact_match")})
    match = run("match", {}, {"evaluate/exact_match": 0.9})
    names = Names([table, *RUNS, match])
    assert [names.find(name).key for name in ("kl", "kl_nats", "exact_match")] == [
        "evaluate/kl_nats",
        "evaluate/kl_nats",
        "evaluate/exact_match",
    ]
    assert names.find("evaluate/A/kl_nats").key == "evaluate/A/kl_nats"
    assert [one.name for one in matching([table, *RUNS, match], "exact_match > 0.5")] == ["match"]
    with pytest.raises(UserError, match="did you mean evaluate/exact_match"):
        names.find("exact_mach")
    with pytest.raises(UserError, match="could be evaluate/A/kl_nats or evaluate/B/kl_nats; write one"):
        Names([table]).find("kl")


def test_settings_that_the_store_keeps_as_text_come_back_with_their_types() -> None:
    assert typed_setting("trainer.learning_rate", "1e-05") == 1e-5
    assert typed_setting("quant.group_size", "channel") == "channel"
    assert typed_setting("quant.group_size", "32") == 32
    assert typed_setting("quant.skip", '["lm_head"]') == ["lm_head"]
    assert typed_setting("run.name", "123") == "123", "a name stays text"
    assert typed_setting("data.max_rows", "") is None
    assert typed_setting("of.a.later.version", "true") is True
