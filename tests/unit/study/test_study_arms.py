import pytest

from raydistill.config import Config
from raydistill.study.arms import ARMS, arm_config, devices_of, run_config, run_names, shared_config

CONFIG = Config.model_validate(
    {
        "student": {"model": "student"},
        "data": {"path": "rows.jsonl", "min_prompt_room": 4, "max_length": 200},
        "objective": {"on_policy_fraction": 0.25, "beta": 0.75},
        "rollout": {"max_new_tokens": 40},
        "evaluation": {"exact_match": "final_number", "max_new_tokens": 40},
    }
)


def test_an_arm_changes_the_objective_and_nothing_that_is_compared():
    for arm in ARMS:
        changed = arm_config(CONFIG, arm)
        for section in ("student", "teacher", "data", "quant", "adapter", "rollout", "trainer", "sync", "checkpoint"):
            assert getattr(changed, section) == getattr(CONFIG, section), (arm, section)
    objective = {arm: arm_config(CONFIG, arm).objective for arm in ARMS}
    assert objective["student"] == CONFIG.objective
    assert [
        (objective[arm].on_policy_fraction, objective[arm].beta) for arm in ("off-policy", "mixed", "on-policy")
    ] == [
        (0, 0),
        (0.5, 0.5),
        (1, 1),
    ]
    assert (objective["gold-ce"].distill_weight, objective["gold-ce"].ce_weight) == (0, 1)


def test_every_arm_that_a_config_may_name_is_there():
    named = Config.model_json_schema()["$defs"]["StudySection"]["properties"]["arms"]["items"]["enum"]
    assert list(ARMS) == named


def test_the_pools_are_good_for_every_arm_whatever_the_config_itself_needs():
    off = CONFIG.model_copy(update={"objective": CONFIG.objective.model_copy(update={"on_policy_fraction": 0.0})})
    off = off.model_copy(update={"evaluation": off.evaluation.model_copy(update={"exact_match": "off"})})
    assert not off.needs_rollout_pool
    shared = shared_config(off, ["gold-ce", "on-policy"])
    assert shared.needs_rollout_pool
    assert shared.needs_teacher
    assert not shared_config(off, ["gold-ce"]).needs_teacher
    assert not shared_config(off, ["gold-ce", "off-policy"]).needs_rollout_pool


def test_all_arms_train_on_the_same_rows_if_one_of_them_samples():
    assert shared_config(CONFIG, ["off-policy", "on-policy"]).data.min_prompt_room == 40
    assert shared_config(CONFIG, ["off-policy", "gold-ce"]).data.min_prompt_room == 4


@pytest.mark.parametrize(
    ("rollout", "devices"),
    [
        ({}, 1.0),
        ({"num_gpus": 0.5}, 0.5),
        ({"num_gpus": 1}, 1.0),
        ({"num_gpus": 2, "tensor_parallel_size": 2}, 2.0),
        ({"tensor_parallel_size": 2}, 2.0),
    ],
)
def test_a_rollout_actor_costs_the_gpus_that_it_holds_or_its_processes(rollout, devices):
    section = CONFIG.rollout.model_copy(update=rollout)
    assert devices_of(CONFIG.model_copy(update={"rollout": section}))["rollout"] == devices


def test_a_run_has_its_studys_name_and_its_own_seed(tmp_path):
    names = run_names("20260101-000000", "mixed", 3)
    assert names == [f"20260101-000000-mixed-seed{seed}" for seed in range(3)]
    assert run_names("s", "mixed", 1) == ["s-mixed"]
    configs = [run_config(CONFIG, "mixed", name, tmp_path, seed) for seed, name in enumerate(names)]
    assert [config.run.seed for config in configs] == [0, 1, 2]
    assert {config.run.output for config in configs} == {tmp_path}
    assert all(config.world.name == "none" for config in configs)


@pytest.mark.parametrize(
    ("changes", "devices"),
    [
        ({}, {"rollout": 1, "teacher": 1, "trainer": 1, "evaluate": 1}),
        (
            {"rollout": {"num_gpus": 2, "tensor_parallel_size": 2}, "trainer": {"num_gpus": 1, "num_workers": 4}},
            {"rollout": 2, "teacher": 1, "trainer": 4, "evaluate": 1},
        ),
        (
            {"teacher": {"num_gpus": 0.5}, "rollout": {"tensor_parallel_size": 2}, "trainer": {"num_workers": 2}},
            {"rollout": 2, "teacher": 0.5, "trainer": 2, "evaluate": 1},
        ),
    ],
)
def test_devices_are_gpus_or_processes_where_there_are_none(changes, devices):
    assert devices_of(Config.model_validate(changes)) == devices
