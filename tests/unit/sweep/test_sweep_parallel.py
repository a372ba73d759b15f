"""How many trials at a time fit a cluster, when they share pools and when they cannot."""

from pathlib import Path
from typing import Any

import pytest

from raydistill.errors import ResourceError
from raydistill.sweep.parallel import check_parallel, configs_of
from raydistill.sweep.spec import load_sweep

# Half a CPU for each rollout actor, teacher and trainer worker, a quarter for the evaluation actor.
RATES = '[space]\n"trainer.learning_rate" = [1e-3, 2e-3, 3e-3, 4e-3]'
FORMATS = '[space]\nquant = [{ format = "int4" }, { format = "int3" }, { format = "int2" }]'
WORKERS = '[space]\n"trainer.num_workers" = [1, 2, 4]'


def fits(
    tmp_path: Path, text: str, parallel: int, cpus: float, *arguments: str, nodes: Any = None, **more: Any
) -> None:
    """On one node of so many CPUs, or on `nodes`."""
    path = tmp_path / "s.toml"
    path.write_text(text)
    found = load_sweep(path, arguments, **more)
    check_parallel(configs_of(found), parallel, nodes or [{"CPU": cpus}])


def test_trials_that_share_their_pools_add_a_trainer_each(tmp_path: Path) -> None:
    fits(tmp_path, RATES, 4, 3.25)
    with pytest.raises(ResourceError) as error:
        fits(tmp_path, RATES, 4, 3.0)
    assert str(error.value) == (
        "parallel=4: so many trials may need 3.25 CPUs (trainer 4 x 0.5, rollout 1 x 0.5, teacher 1 x 0.5, evaluation 1 x "
        "0.25) but the cluster has 3; the most that fit are 3: set --parallel 3, or lower <role>.num_cpus or "
        "<role>.num_actors (trainer.num_workers), or add nodes"
    )
    fits(tmp_path, RATES, 9, 3.25)  # there are four trials


def test_trials_that_need_different_engines_at_once_have_a_pool_each(tmp_path: Path) -> None:
    fits(tmp_path, FORMATS, 1, 1.75)  # one after another: the idle pool is given the next
    fits(tmp_path, FORMATS, 2, 2.75)
    with pytest.raises(ResourceError, match=r"2\.75 CPUs \(.*rollout 2 x 0\.5.*the most that fit are 1"):
        fits(tmp_path, FORMATS, 2, 2.5)
    with pytest.raises(ResourceError, match=r"parallel=2: .*may need 2\.75"):
        fits(tmp_path, '[space]\n"teacher.model" = ["a", "b"]', 2, 2.5)


def test_trainers_of_another_size_stay_beside_those_that_come_next(tmp_path: Path) -> None:
    fits(tmp_path, WORKERS, 1, 1.25 + 3.5)
    fits(tmp_path, WORKERS, 3, 1.25 + 3.5)  # one trial of each size
    fits(tmp_path, f"seeds = [0, 1]\n{WORKERS}", 2, 1.25 + 7.0)
    with pytest.raises(ResourceError, match=r"parallel=1: .*may need 4\.75.*not even one at a time fits"):
        fits(tmp_path, WORKERS, 1, 4.5)
    with pytest.raises(ResourceError, match="the most that fit are 1"):
        fits(tmp_path, f"seeds = [0, 1]\n{WORKERS}", 2, 8.0)


def test_a_searcher_may_choose_as_many_engines_as_trials_run(tmp_path: Path) -> None:
    text = '[space]\n"adapter.rank" = { range = [8, 64] }'
    searched: dict[str, Any] = {"sampler": "optuna", "num_samples": 9}
    fits(tmp_path, text, 3, 1.75 + 2 * 1.0, **searched)
    with pytest.raises(ResourceError, match="the most that fit are 2"):
        fits(tmp_path, text, 3, 3.5, **searched)


def test_trials_fit_the_nodes_of_their_roles_and_no_others(tmp_path: Path) -> None:
    """A large node of another role is of no use to trainers."""
    nodes = [{"CPU": 1.0, "trainer": 1.0}, {"CPU": 8.0, "rollout": 1.0, "teacher": 1.0}]
    many = '[space]\n"trainer.learning_rate" = { log_range = [1e-4, 1e-3], num = 8 }'
    fits(tmp_path, many, 8, 0, nodes=nodes)
    fits(tmp_path, many, 2, 0, "--cluster.by_role", "true", nodes=nodes)
    with pytest.raises(ResourceError, match=r"parallel=8: cluster\.by_role=true: trainer 8 x 0\.5 need 4 CPUs .*'trainer', "
                       r"and those have 1; the most that fit are 2: set --parallel 2, or lower trainer\.num_cpus"):  # fmt: skip
        fits(tmp_path, many, 8, 0, "--cluster.by_role", "true", nodes=nodes)


def test_what_is_left_over_on_several_nodes_holds_no_trainer(tmp_path: Path) -> None:
    large = '[settings]\n"trainer.num_cpus" = 2\n[space]\n"trainer.learning_rate" = [1e-3, 2e-3, 3e-3, 4e-3]'
    nodes = [{"CPU": 3.5}] * 3  # 10.5 CPUs, and four trials book 9.25
    fits(tmp_path, large, 3, 0, nodes=nodes)
    with pytest.raises(ResourceError, match=r"4 actors need 2 CPUs or more on one node \(trainer 4\), .*room for 3; the most "
                       r"that fit are 3"):  # fmt: skip
        fits(tmp_path, large, 4, 0, nodes=nodes)
