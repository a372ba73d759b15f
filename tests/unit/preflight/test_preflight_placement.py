"""The plan books every role's actors, and a cluster that is too small is told what it has."""

from typing import Any

import pytest

from raydistill.config import Config
from raydistill.errors import ResourceError
from raydistill.preflight.placement import GpuActors, check_placement, gpu_plan, node_resources, placement_plan


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
    assert roles(objective=labels, data={"eval_rows": 0}) == ["trainer", "evaluation"]  # it writes the export
    exact = {"num_gpus": 0, "exact_match": "final_number"}
    assert roles(objective=labels, evaluation=exact) == ["trainer", "rollout", "evaluation"]


def test_a_plan_that_fits_passes() -> None:
    check_placement(config(), [{"GPU": 6.0, "CPU": 9.0}])


def test_a_share_goes_to_the_fullest_gpu_that_has_room_for_it() -> None:
    def gpus(**changes: Any) -> dict[tuple[str, ...], tuple[int, float]]:
        return {gpu.roles: (gpu.count, gpu.share) for gpu in gpu_plan(config(**changes))}

    assert gpus() == {("rollout",): (3, 1), ("teacher", "evaluation"): (1, 1), ("trainer",): (2, 1)}
    small = {"teacher": {"num_gpus": 0.2}, "trainer": {"num_gpus": 0.4}, "evaluation": {"num_gpus": 0.1}}
    one = gpus(**small, rollout={"num_gpus": 0.3})
    assert one == {("rollout", "teacher", "evaluation", "trainer"): (1, 1)}
    two = gpus(**small, rollout={"num_gpus": 0.45, "num_actors": 2})
    assert two == {("rollout", "rollout", "evaluation"): (1, 1), ("teacher", "trainer"): (1, 0.6)}
    by_role = gpus(**small, rollout={"num_gpus": 0.3}, cluster={"by_role": True})
    assert by_role == {("rollout",): (1, 0.3), ("teacher", "evaluation"): (1, 0.3), ("trainer",): (1, 0.4)}
    large = {"teacher": {"num_gpus": 2}, "rollout": {"num_gpus": 2, "tensor_parallel_size": 2}}
    workers = {"num_gpus": 0.9, "num_workers": 2, "sequences_per_step": 32}
    spread = gpus(**large, trainer=workers, evaluation={"num_gpus": 0.1})
    assert spread == {
        ("rollout",): (2, 1),
        ("teacher",): (2, 1),
        ("evaluation", "trainer"): (1, 1),
        ("trainer",): (1, 0.9),
    }
    assert gpus(rollout={}, teacher={}, trainer={}, evaluation={}) == {}
    assert gpu_plan(config())[0] == GpuActors(count=3, roles=("rollout",), share=1)


def test_a_cluster_that_is_too_small_is_told_what_the_run_needs_and_what_it_has() -> None:
    with pytest.raises(ResourceError) as error:
        check_placement(config(), [{"GPU": 4.0, "CPU": 64.0}])
    message = str(error.value)
    assert "needs 6 GPUs" in message
    assert "the cluster has 4" in message
    assert "trainer 2 x 1, rollout 3 x 1, teacher 1 x 0.5, evaluation 1 x 0.5" in message
    assert "lower <role>.num_gpus" in message


def test_a_cluster_without_gpus_or_with_few_cores_is_refused() -> None:
    with pytest.raises(ResourceError, match=r"needs 6 GPUs .* but the cluster has 0"):
        check_placement(config(), [{"CPU": 64.0}])
    with pytest.raises(ResourceError, match=r"needs 9 CPUs .* but the cluster has 8"):
        check_placement(config(), [{"GPU": 6.0, "CPU": 8.0}])


def test_an_actor_of_several_gpus_needs_them_on_one_node() -> None:
    nodes = node_resources(
        [
            {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 4.0}},
            {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 4.0}},
            {"Alive": False, "Resources": {"CPU": 8.0, "GPU": 8.0}},
            {"Alive": True, "Resources": {"CPU": 8.0}},
        ]
    )
    large = config(rollout={"num_actors": 1, "num_gpus": 4, "tensor_parallel_size": 4}, trainer={})
    check_placement(large, nodes)
    larger = config(teacher={"num_gpus": 5}, rollout={}, trainer={})
    with pytest.raises(
        ResourceError, match=r"one teacher actor needs 5 GPUs on one node, .* largest node has 4; lower"
    ):
        check_placement(larger, nodes)
    check_placement(larger, [{"GPU": 8.0, "CPU": 24.0}])
    wide = config(teacher={"num_cpus": 12}, rollout={}, trainer={}, evaluation={})
    with pytest.raises(ResourceError, match=r"one teacher actor needs 12 CPUs .* has 8; lower teacher\.num_cpus"):
        check_placement(wide, nodes)


BY_ROLE = {"cluster": {"by_role": True}}
ROLE_NODES = (
    {"CPU": 8.0, "GPU": 4.0, "trainer": 1.0},
    {"CPU": 8.0, "GPU": 4.0, "rollout": 1.0},
    {"CPU": 4.0, "GPU": 1.0, "teacher": 1.0},
)


def test_actors_that_go_by_role_need_room_on_the_nodes_of_their_role() -> None:
    check_placement(config(**BY_ROLE), ROLE_NODES)
    many = config(**BY_ROLE, trainer={"num_workers": 6, "num_gpus": 1, "sequences_per_step": 48})
    spare = {"CPU": 8.0, "GPU": 8.0}  # of no role: the cluster as a whole would do
    with pytest.raises(ResourceError) as error:
        check_placement(many, [*ROLE_NODES, spare])
    assert str(error.value) == (
        "cluster.by_role=true: trainer 6 x 1 need 6 GPUs on nodes with the resource 'trainer', and those have 4; lower "
        "trainer.num_gpus or trainer.num_workers, or add such a node"
    )
    with pytest.raises(ResourceError, match=r"largest node with the resource 'teacher' has 4; lower teacher\.num_cpus"):
        check_placement(config(**BY_ROLE, teacher={"num_cpus": 5}, evaluation={}), ROLE_NODES)


def test_the_evaluation_actor_goes_where_the_teachers_are() -> None:
    full = config(**BY_ROLE, teacher={"num_cpus": 4}, evaluation={"num_cpus": 1})
    with pytest.raises(ResourceError, match=r"teacher 1 x 4, evaluation 1 x 1 need 5 CPUs .* lower teacher\.num_cpus"):
        check_placement(full, ROLE_NODES)
    labels = {"on_policy_fraction": 0, "distill_weight": 0, "ce_weight": 1}
    with pytest.raises(ResourceError, match=r"nodes with the resource 'teacher', and the cluster has none"):
        check_placement(config(**BY_ROLE, objective=labels), ROLE_NODES[:1])


def test_roles_that_share_a_node_must_fit_it_together() -> None:
    shared = {"CPU": 4.0, "GPU": 4.0, "rollout": 1.0, "teacher": 1.0}
    with pytest.raises(ResourceError, match=r"need 5 CPUs on nodes with the resource 'rollout' or 'teacher'"):
        check_placement(config(**BY_ROLE), [ROLE_NODES[0], shared])
    check_placement(config(**BY_ROLE), [ROLE_NODES[0], shared | {"CPU": 5.0}])
