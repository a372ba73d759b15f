"""Shared by the tests that run real engines: one tiny world for the whole session, and one Ray cluster."""

import gc
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import chdir
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from raydistill.config import Config

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts its background jobs so, and every process below would be deaf to the Ctrl-C that tests send.
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Files of tests/ray that use the same actors.
SHARES_POOLS = (
    "architectures",
    "gsm8k",
    "resume",
    "run",
    "storage",
    "study",
    "sweep",
    "sweep_tuner",
    "lost_arguments",
    "ray_metrics",
)

# Files of tests/engine that take long: whichever file is the last keeps one of two workers waiting.
LONG_ONES = ("vllm_engine", "deepspeed_equivalence", "harness", "serve")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n 2 --dist loadscope` the files of tests/ray that share one cluster and its actors are one piece of work, every
    other file is one of its own."""
    if config.getvalue("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class PoolsTogether(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = Path(nodeid.partition("::")[0])
            return "pools" if file.stem.removeprefix("test_") in SHARES_POOLS else str(file)

    return PoolsTogether(config, log)


def pytest_configure() -> None:
    """What is imported stays: it is not searched for garbage while it comes, nor again and again by the tests."""
    gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    if "triton" in sys.modules:  # it would report each of its functions as a leak
        gc.unfreeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files of tests/engine come first of these; tests marked `gpu` (`gpu(num=2)`) are skipped where there are not as many
    CUDA devices."""
    items.sort(key=_place)
    for item in items:
        if markers := list(item.iter_markers("gpu")):
            import torch

            needed, there = max(marker.kwargs.get("num", 1) for marker in markers), torch.cuda.device_count()
            if there < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA devices, torch sees {there}"))


def _place(item: pytest.Item) -> int:
    name = item.path.stem.removeprefix("test_")
    if item.path.parent.name != "engine":
        return -1 if item.path.parent.name == "ray" else len(LONG_ONES)
    return LONG_ONES.index(name) if name in LONG_ONES else len(LONG_ONES)


RECIPE: dict[str, Any] = {"num_layers": 2, "mlp_size": 192, "vocab_size": 448, "batch_size": 16}
"""About 0.2 million parameters; head_dim stays 32, which vLLM needs on CPU."""


@pytest.fixture(scope="session")
def teacher_steps() -> int:
    """How long the tiny world's teacher is trained. Half-trained: it has something to lose."""
    return 60


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory, teacher_steps: int) -> Any:
    """A Qwen3 with tokenizer and chat template, 400 training rows and 24 rows each for validation and test."""
    from raydistill.demo.pretrain import TeacherRecipe
    from raydistill.demo.world import prepare_stories

    worker = os.environ.get(
        "PYTEST_XDIST_WORKER"
    )  # one world for all of them: whoever is first makes it, the others wait
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if worker else base) / f"stories-{teacher_steps}"
    return prepare_stories(
        folder, TeacherRecipe(**RECIPE, num_steps=teacher_steps), num_train=400, num_validation=24, num_test=24
    )


@pytest.fixture(scope="session")
def tiny_model(tiny_world: Any) -> Path:
    """The folder of the tiny world's teacher; students start from it."""
    folder: Path = tiny_world.teacher_folder
    return folder


@pytest.fixture
def tiny() -> Any:
    """The class `tiny_students.Tiny`; imported here, so that tests without models need not wait for transformers."""
    from tiny_students import Tiny

    return Tiny


@pytest.fixture(scope="session")
def architectures(tiny_world: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """name -> folder of a tiny random model of each tested architecture, with the tiny world's tokenizer."""
    from tiny_models import ARCHITECTURES, write_model
    from transformers import AutoTokenizer

    folder, tokenizer = tmp_path_factory.mktemp("models"), AutoTokenizer.from_pretrained(tiny_world.teacher_folder)
    return {name: write_model(name, tokenizer, folder / name) for name in ARCHITECTURES}


@pytest.fixture(scope="session")
def s3_port() -> int:
    """Where the tests of run.storage start their server; Ray's processes inherit the way there."""
    from s3 import environment, free_port

    port = free_port()
    os.environ |= environment(port)
    return port


@pytest.fixture(scope="session")
def job_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a user's command is called in: it holds the loss of docs/extending.md, and nothing of ours."""
    folder = tmp_path_factory.mktemp("job")
    blocks = (Path(__file__).parents[1] / "docs" / "extending.md").read_text().split("```python\n")
    (loss,) = [block.partition("```")[0] for block in blocks if block.startswith("# my_losses.py")]
    (folder / "my_losses.py").write_text(loss)
    return folder


@pytest.fixture(scope="session")
def ray_cluster(s3_port: int, job_folder: Path) -> Iterator[Any]:
    """One local Ray for all tests of the session; more CPUs than the machine has, because the actors hardly use theirs."""
    import ray

    from raydistill import processes
    from raydistill.launch import start_cluster

    # Nobody looks at this one's dashboard, whose ten processes take 3 % of the suite's time.
    without_dashboard = patch.object(processes, "start_ray", partial(processes.start_ray, include_dashboard=False))
    with chdir(job_folder), without_dashboard:  # Ray's processes find modules where the driver found them
        start_cluster(Config.model_validate({"cluster": {"num_cpus": 8}}))
    yield ray
    ray.shutdown()
