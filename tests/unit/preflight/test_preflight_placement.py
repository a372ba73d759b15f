"""The plan books every role's actors, and a cluster that is too small is told what it has."""

from typing import Any

import pytest

from raydistill.config import Config
from raydistill.errors import ResourceError
from raydistill.preflight.placement import check_placement, largest_node_gpus, placement_plan


def config(**changes: Any) -> Config:
    base: dict[str, Any] = {
        "trainer": {"num_workers": 2, "num_gpus": 1, "num_cpus": 2, "sequences_per_step": 32},
        "rollout": {"num_actors": 3, "num_gpus": 1, "num_cpus": 1},
        "teacher": {"num_actors": 1, "num_gpus": 0.5, "num_cpus": 1},
        "evaluation": {"num_gpus": 0.5, "num_cpus": 1},
    }
    return Config.model_validate(base | changes)


def roles(**changes: Any) -> list[str]:
    return [demand.role for demand in placement_plan(config(**changes))]


def test_only_roles_with_work_are_booked() -> None:
    assert roles() == ["trainer", "rollout", "teacher", "evaluation"]
    assert roles(objective={"on_policy_fraction": 0}) == ["trainer", "teacher", "evaluation"]
    labels = {"on_policy_fraction": 0, "distill_weight": 0, "ce_weight": 1}
    assert roles(objective=labels, data={"eval_rows": 0}) == ["trainer"]
    exact = {"num_gpus": 0, "exact_match": "final_number"}
    assert roles(objective=labels, evaluation=exact) == ["trainer", "rollout", "evaluation"]


def test_a_plan_that_fits_passes() -> None:
    check_placement(config(), {"GPU": 6.0, "CPU": 9.0})


def test_a_cluster_that_is_too_small_is_told_what_the_run_needs_and_what_it_has() -> None:
    with pytest.raises(ResourceError) as error:
        check_placement(config(), {"GPU": 4.0, "CPU": 64.0})
    message = str(error.value)
    assert "needs 6 GPUs" in message
    assert "the cluster has 4" in message
    assert "trainer 2 x 1, rollout 3 x 1, teacher 1 x 0.5, evaluation 1 x 0.5" in message
    assert "lower <role>.num_gpus" in message


def test_a_cluster_without_gpus_or_with_few_cores_is_refused() -> None:
    with pytest.raises(ResourceError, match=r"needs 6 GPUs .* but the cluster has 0"):
        check_placement(config(), {"CPU": 64.0})
    with pytest.raises(ResourceError, match=r"needs 9 CPUs .* but the cluster has 8"):
        check_placement(config(), {"GPU": 6.0, "CPU": 8.0})


def test_an_actor_of_several_gpus_needs_them_on_one_node() -> None:
    nodes = [
        {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 4.0}},
        {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 4.0}},
        {"Alive": False, "Resources": {"CPU": 8.0, "GPU": 8.0}},
        {"Alive": True, "Resources": {"CPU": 8.0}},
    ]
    large = config(rollout={"num_actors": 1, "num_gpus": 4, "tensor_parallel_size": 4}, trainer={})
    there = {"GPU": 8.0, "CPU": 24.0}
    check_placement(large, there, largest_node_gpus(nodes))
    larger = config(teacher={"num_gpus": 5}, rollout={}, trainer={})
    with pytest.raises(
        ResourceError, match=r"one teacher actor needs 5 GPUs on one node, .* largest node has 4; lower"
    ):
        check_placement(larger, there, largest_node_gpus(nodes))
    check_placement(larger, there)
    assert largest_node_gpus([]) == 0
