"""`raydistill init` writes a config that loads, fits and says why."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raydistill.cli import main_with_errors
from raydistill.config.load import load_config
from raydistill.errors import ConfigError
from raydistill.models import empty_model
from raydistill.preflight import init as init_module
from raydistill.preflight import layouts as layouts_module
from raydistill.preflight import placement
from raydistill.preflight.estimates import Answer, ModelSize, StudentSize
from raydistill.preflight.init import init_command
from raydistill.preflight.layouts import Devices, Layout, fit, gpus_for, laid_out, layouts, validated
from raydistill.preflight.memory import GpuMemory, gpu_remarks
from raydistill.preflight.plan import Sizes, actors_memory, make_plan, planned_sizes
from raydistill.preflight.sizes import model_size

LAYOUT = Layout(devices=layouts(1)[0], micro_batch=1, checkpointing=False, utilization=0.5)


def init(world: Any, output: Path, *more: str) -> int:
    arguments = ["--model", str(world.teacher_folder), "--data", str(world.train_path), "-o", str(output), *more]
    return main_with_errors(init_command, arguments)


def used_by(d: Devices) -> float:
    return d.rollout * d.rollout_actors + d.teacher * d.teacher_actors + d.trainer * d.trainer_workers + d.evaluation


@pytest.mark.parametrize("gpus", [0, 1, 2, 3, 8])
def test_the_devices_add_up(gpus: int) -> None:
    for d in layouts(gpus):
        assert gpus * 0.9 <= used_by(d) <= gpus + 1e-9
        assert min(d.rollout_actors, d.teacher_actors, d.trainer_workers) >= 1


@pytest.mark.parametrize(
    ("teacher", "rollout", "gpus"), [(2, 1, 4), (2, 1, 8), (1, 2, 4), (4, 2, 8), (2, 2, 5), (4, 4, 16)]
)
def test_the_devices_add_up_where_an_actor_needs_several(teacher: int, rollout: int, gpus: int) -> None:
    for d in layouts(gpus, teacher, rollout):
        assert gpus * 0.8 <= used_by(d) <= gpus + 1e-9
        assert (round(d.teacher), round(d.rollout)) == (teacher, rollout)
        assert min(d.rollout_actors, d.teacher_actors, d.trainer_workers) >= 1
        assert 0.5 < d.trainer <= 1  # NCCL: no two workers on one device


def test_every_layout_of_two_gpus_is_another_company_of_the_actors(tiny_world: Any) -> None:
    together = set()
    for devices in layouts(2):
        config = validated(laid_out(tree_of(tiny_world), replace(LAYOUT, devices=devices)))
        together.add(frozenset(frozenset(gpu.roles) for gpu in placement.gpu_plan(config)))
    assert len(together) == len(layouts(2))
    assert {len(gpus) for gpus in together} == {2}


def test_too_few_devices_are_told_what_the_roles_need() -> None:
    with pytest.raises(ConfigError, match=r"--gpus 3: one teacher needs 2, one rollout engine 1 .* together 4"):
        layouts(3, teacher_gpus=2)


def tree_of(world: Any, **changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "student": {"model": str(world.teacher_folder), "dtype": "bfloat16"},
        "teacher": {},
        "data": {"path": str(world.train_path), "max_length": 64},
        "objective": {"top_k": 4},
        "rollout": {"max_new_tokens": 32},
    }
    return base | changes


def test_a_model_too_large_for_one_gpu_is_split_over_as_few_as_hold_it(tiny_world: Any) -> None:
    tree = tree_of(tiny_world, teacher={"batch_tokens": 64})
    sizes = planned_sizes(validated(tree))
    gib = 2**-30
    weights = 2 * model_size(empty_model(tiny_world.teacher_folder)).parameters
    assert gpus_for(tree, sizes, "rollout", 4, 10 * weights * gib) == 1
    assert gpus_for(tree, sizes, "rollout", 4, weights / 2 / 0.59 * gib) == 2
    assert gpus_for(tree, sizes, "rollout", 4, weights / 4 / 0.59 * gib) == 4
    with pytest.raises(ConfigError, match="one rollout actor needs about 0 GiB on each of 2 GPUs"):
        gpus_for(tree, sizes, "rollout", 2, weights / 4 / 0.59 * gib)
    found = [gpus_for(tree, sizes, "teacher", 4, size * weights * gib) for size in (20, 4, 3.5)]
    assert found[0] == 1
    assert found == sorted(found)


def test_the_config_of_a_model_too_large_for_one_gpu_loads(
    tiny_world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layouts_module, "gpus_for", lambda tree, sizes, role, *_: 2)
    assert init(tiny_world, tmp_path / "a.toml", "--gpus", "8") == 0
    config = load_config([f"@{tmp_path / 'a.toml'}"]).config
    assert (config.teacher.num_gpus, config.teacher.num_actors) == (2, 1)
    assert (config.rollout.num_gpus, config.rollout.tensor_parallel_size, config.rollout.num_actors) == (2, 2, 1)
    assert (config.trainer.num_gpus, config.trainer.num_workers, config.evaluation.num_gpus) == (0.9, 4, 0.1)


def test_the_config_loads_and_holds_what_the_data_says(tiny_world: Any, tmp_path: Path) -> None:
    assert init(tiny_world, tmp_path / "a.toml", "--gpus", "8", "--format", "int2") == 0
    config = load_config([f"@{tmp_path / 'a.toml'}"]).config
    assert config.quant.format == "int2"
    assert (config.trainer.num_workers, config.rollout.num_actors, config.teacher.num_actors) == (4, 2, 2)
    assert config.data.max_length == 256
    assert 1 < config.data.min_completion < 32
    assert config.rollout.max_new_tokens in (32, 64)
    assert config.objective.on_policy_fraction == 0.5
    assert config.trainer.sequences_per_micro_batch == 16
    assert not config.trainer.gradient_checkpointing


def test_rows_without_answers_are_answered_by_the_student(tiny_world: Any, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"count to {n}"}) + "\n" for n in range(20)))
    assert init(tiny_world, tmp_path / "a.toml", "--data", str(prompts)) == 0
    config = load_config([f"@{tmp_path / 'a.toml'}"]).config
    assert config.objective.on_policy_fraction == 1.0
    assert config.student.dtype == "float32"


def test_a_smaller_device_gets_smaller_batches_and_then_checkpointing(tiny_world: Any) -> None:
    tree = tree_of(tiny_world, data={"path": str(tiny_world.train_path), "max_length": 512})
    tree["rollout"]["max_new_tokens"] = 64
    sizes = planned_sizes(validated(tree))
    found = []
    for percent in range(200, 100, -6):  # DeepSpeed's buffers alone take more than half of 2 GiB
        try:
            layout = fit(tree, sizes, layouts(4)[:1], percent / 100)
        except ConfigError as error:
            assert "one sequence of data.max_length=512 at a time does not fit: trainer on one GPU need" in str(error)  # noqa: PT017
            break
        found.append((layout.micro_batch, layout.checkpointing))
    order = [(checkpointing, -micro) for micro, checkpointing in found]
    assert order == sorted(order)
    assert found[0] == (16, False)
    assert len(set(found)) >= 3
    assert len(found) < len(range(200, 100, -6)), "the smallest device takes nothing"


def large_sizes(student: int, teacher: int) -> Sizes:
    """Of models with about so many billions of weights."""

    def model(billions: int) -> ModelSize:
        hidden = {1: 2048, 4: 2560, 8: 4096, 20: 6144}[billions]
        return ModelSize(
            parameters=billions * 10**9, matmul=billions * 9 * 10**8, vocab_size=150_000, hidden=hidden, layers=36,
            query=hidden, key=1024, mlp=3 * hidden,
        )  # fmt: skip

    size = model(student)
    return Sizes(
        student=StudentSize(
            model=size, mode="merged", quantizable=size.matmul, targets=size.matmul, trainable=size.matmul // 100,
            largest_layer=3 * size.hidden**2, is_quantized=True, is_searched=True, weight_bytes=2,
        ),
        teacher=model(teacher),
        answer=Answer(vocab_size=150_000, candidates=64),
        note=None,
    )  # fmt: skip


FITS = {  # student, teacher in billions of weights: on how many GPUs of 80 GiB
    (1, 1): (1, 2, 4, 8), (4, 4): (1, 2, 4, 8), (4, 20): (2, 4, 8), (8, 8): (2, 4, 8), (8, 20): (4, 8), (20, 20): (),
}  # fmt: skip


@pytest.mark.parametrize(("student", "teacher"), FITS)
def test_the_doctor_has_nothing_against_the_memory_of_what_is_written(
    tiny_world: Any, student: int, teacher: int
) -> None:
    tree, sizes = tree_of(tiny_world), large_sizes(student, teacher)
    tree["data"]["max_length"] = 1024
    for gpus in (1, 2, 4, 8):
        needed = [gpus_for(tree, sizes, role, gpus, 80) for role in init_module.SPLIT_ROLES]
        if gpus not in FITS[student, teacher]:
            with pytest.raises(
                ConfigError, match=r"on one GPU need about [0-9.]+ GiB of 68\.0; give more GPUs \(--gpus"
            ):
                fit(tree, sizes, layouts(gpus, *needed), 80)
            continue
        config = validated(laid_out(tree, fit(tree, sizes, layouts(gpus, *needed), 80)))
        said = gpu_remarks(config, actors_memory(config, sizes), GpuMemory(name="A100", bytes=80 * 2**30))
        assert {remark.status for remark in said} == {"ok"}, [remark.text for remark in said]


@pytest.mark.parametrize(("gpus", "gib"), [(1, 12), (4, 6)])
def test_the_file_says_what_was_found_to_fit(tiny_world: Any, tmp_path: Path, gpus: int, gib: int) -> None:
    assert init(tiny_world, tmp_path / "a.toml", "--gpus", str(gpus), "--gpu-memory-gib", str(gib)) == 0
    config = load_config([f"@{tmp_path / 'a.toml'}"]).config
    said = gpu_remarks(config, make_plan(config), GpuMemory(name="one", bytes=gib * 2**30))
    assert {remark.status for remark in said} == {"ok"}, [remark.text for remark in said]
    assert (config.rollout.gpu_memory_utilization < 0.85) == (gpus < 4)


def test_without_a_name_the_file_is_named_after_the_model_and_a_dash_prints_it(
    tiny_world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(init_module, "make_config", lambda *_: "[student]\n")
    arguments = ["--model", str(tiny_world.teacher_folder), "--data", str(tiny_world.train_path), "--gpus", "0"]
    assert main_with_errors(init_command, arguments) == 0
    assert (tmp_path / "teacher.toml").read_text() == "[student]\n"
    shown = capsys.readouterr()
    assert (shown.out, "wrote teacher.toml" in shown.err) == ("", True)
    assert main_with_errors(init_command, [*arguments[2:], "--model", "Qwen/Qwen3-4B"]) == 0
    assert (tmp_path / "Qwen3-4B.toml").exists()
    capsys.readouterr()
    assert main_with_errors(init_command, [*arguments, "-o", "-"]) == 0
    assert capsys.readouterr() == ("[student]\n", "")


def test_a_file_that_cannot_be_written_is_told_before_the_work(
    tiny_world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(init_module, "make_config", lambda *_: pytest.fail("too late"))
    assert init(tiny_world, tmp_path / "missing" / "a.toml") == 2
    assert f"there is no folder {tmp_path / 'missing'}; create it" in capsys.readouterr().err
    monkeypatch.setattr("os.access", lambda *_: False)
    assert init(tiny_world, tmp_path / "a.toml") == 2
    assert "cannot be written; choose another folder" in capsys.readouterr().err


def test_the_memory_of_the_gpu_that_is_here_counts_unless_another_is_named(
    tiny_world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[float] = []
    monkeypatch.setattr(init_module, "make_config", lambda *given: found.append(given[4]) or "")
    monkeypatch.setattr("raydistill.preflight.memory.gpu_memory_here", lambda: GpuMemory(name="L4", bytes=22 * 2**30))
    for number, more in enumerate((["--gpus", "2"], ["--gpus", "2", "--gpu-memory-gib", "40"], ["--gpus", "0"])):
        assert init(tiny_world, tmp_path / f"{number}.toml", *more) == 0
    assert found == [22, 40, init_module.ASSUMED_GIB]
    assert init(tiny_world, tmp_path / "a.toml", "--gpu-memory-gib", "0") == 2


def test_a_file_that_exists_is_not_overwritten(
    tiny_world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.toml").write_text("mine")
    assert init(tiny_world, tmp_path / "a.toml") == 2
    assert "exists" in capsys.readouterr().err
    assert (tmp_path / "a.toml").read_text() == "mine"


def test_a_folder_that_is_no_model_leaves_no_file(
    tiny_world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert init(tiny_world, tmp_path / "a.toml", "--model", str(tmp_path)) == 2
    assert "so not a model" in capsys.readouterr().err
    assert not (tmp_path / "a.toml").exists()
