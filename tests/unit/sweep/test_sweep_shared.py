"""Which trials share which pools."""

import asyncio
from pathlib import Path
from typing import Any

from transformers import Qwen3Config

from raydistill.config import Config
from raydistill.sweep.shared import SharedPools


class Pool:
    def __init__(self, kind: str) -> None:
        self.kind, self.is_closed = kind, False

    async def counts(self) -> dict[str, int]:
        return {"computed_rows": 3, "kept_rows": 4}

    async def close(self) -> None:
        self.is_closed = True


def shared_pools() -> tuple[SharedPools, list[Pool]]:
    made: list[Pool] = []

    def maker(kind: str) -> Any:
        def make(config: Config) -> Pool:
            made.append(Pool(kind))
            return made[-1]

        return make

    kinds = ("rollouts", "teachers", "evaluator", "trainers")
    return SharedPools({kind: maker(kind) for kind in kinds}, num_adapters=2), made


def config(**changes: Any) -> Config:
    return Config.model_validate({"student": {"model": "m"}, "teacher": {"model": "m"}, **changes})


def test_trials_of_one_base_and_format_share_everything_at_the_same_time() -> None:
    pools, made = shared_pools()
    one = pools.lease("a", config(trainer={"learning_rate": 1e-4}, objective={"beta": 0.0}))
    changes: list[dict[str, Any]] = [
        {"trainer": {"learning_rate": 1e-3}, "objective": {"beta": 1.0}, "rollout": {"temperature": 0.7}},
        {"data": {"max_rows": 7, "max_length": 512, "template": {"style": "a"}}},
        {"rollout": {"max_new_tokens": 64}, "evaluation": {"max_new_tokens": 256}},
    ]
    for number, change in enumerate(changes):
        assert pools.lease(f"b-{number}", config(**change)) == one
    assert one.num_adapters == 2
    assert [pool.kind for pool in made] == ["rollouts", "teachers", "evaluator", "trainers"]


def test_a_trial_of_another_format_gets_an_engine_of_its_own_or_an_idle_one() -> None:
    pools, _ = shared_pools()
    int4 = pools.lease("a", config(quant={"format": "int4"}))
    int2 = pools.lease("b", config(quant={"format": "int2"}))
    assert int2.rollouts is not int4.rollouts
    assert int2.teachers is int4.teachers
    pools.release("a")
    int3 = pools.lease("c", config(quant={"format": "int3"}))
    assert int3.rollouts is int4.rollouts  # its actors are there and have nothing to do
    assert pools.num_pools() == {"rollouts": 2, "teachers": 1, "evaluator": 1, "trainers": 1}
    assert pools.lease("d", config(quant={"format": "int2"})).rollouts is int2.rollouts


def test_another_adapter_is_another_engine_and_its_dropout_is_none() -> None:
    pools, _ = shared_pools()
    first = pools.lease("a", config(adapter={"mode": "served"})).rollouts
    assert pools.lease("b", config(adapter={"mode": "served", "dropout": 0.1})).rollouts is first
    others = [{"mode": "merged"}, {"mode": "served", "rank": 8}, {"mode": "served", "alpha": 8}]
    found = [pools.lease(f"c-{number}", config(adapter=other)).rollouts for number, other in enumerate(others)]
    assert len({id(one) for one in [first, *found]}) == 4


def test_what_a_trial_does_not_need_is_not_started() -> None:
    pools, made = shared_pools()
    leased = pools.lease("a", config(objective={"on_policy_fraction": 0.0, "distill_weight": 0.0, "ce_weight": 1.0}))
    assert (leased.rollouts, leased.teachers) == (None, None)
    assert [pool.kind for pool in made] == ["evaluator", "trainers"]


def test_another_teacher_is_another_pool_as_long_as_the_first_is_in_use() -> None:
    pools, _ = shared_pools()
    first = pools.lease("a", config())
    second = pools.lease("b", config(teacher={"model": "larger"}))
    assert first.teachers is not second.teachers
    assert asyncio.run(pools.teacher_rows()) == {"computed_rows": 6, "kept_rows": 8}


def test_trials_over_teachers_share_an_engine_where_these_have_as_many_ids(tmp_path: Path) -> None:
    pools, _ = shared_pools()
    for name, num_ids in (("small", 300), ("large", 300), ("other", 301)):
        Qwen3Config(vocab_size=num_ids).save_pretrained(tmp_path / name)
    names = [str(tmp_path / name) for name in ("small", "large", "other")]
    small, large, other = (pools.lease(name, config(teacher={"model": name})).rollouts for name in names)
    assert small is large
    assert small is not other, "an engine samples the ids of one vocabulary"


def test_closing_ends_every_pool() -> None:
    pools, made = shared_pools()
    pools.lease("a", config())
    asyncio.run(pools.close())
    assert all(pool.is_closed for pool in made)
