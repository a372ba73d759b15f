"""What can be measured: adapters, checkpoints, compressed folders; and what is refused before anything is loaded."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from finished_models import write_lora, write_run
from peft import PeftModel
from transformers import AutoModelForCausalLM

from raydistill.errors import ModelError, UserError
from raydistill.evaluate import loading
from raydistill.evaluate.folders import evaluate_folders
from raydistill.evaluate.hub import is_hub_id
from raydistill.evaluate.loading import Loader, teacher_bounds
from raydistill.evaluate.ptq import export_ptq
from raydistill.evaluate.targets import Target, find_targets
from raydistill.models import build_student
from raydistill.quant.export import export_live, packed_bytes
from raydistill.quant.formats import WeightFormat
from raydistill.quant.layouts import write_layout
from raydistill.quant.student import LoraSettings, load_adapter_state, prepare_student
from raydistill.recovery.checkpoint import load_checkpoint
from raydistill.results.record import RunRecord
from raydistill.results.tables import COMPARISON

from .conftest import make_model

INT4 = WeightFormat(bits=4, group_size=32, symmetric=True, scale="absmax", scale_dtype="bfloat16")
IDS = torch.arange(3, 43).reshape(2, 20)
GB = 10**9


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def adapters(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return [write_lora(world.teacher, folder / name, seed) for seed, name in enumerate(("v1-2", "v1.2"))]


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("outputs") / "runs" / "mine", world.teacher, world.rows)


def test_adapters_over_one_base_compute_what_peft_computes_and_their_base_is_loaded_once(world, adapters, monkeypatch):
    loads = []
    monkeypatch.setattr(loading, "load_exported", lambda folder: loads.append(folder) or make_model(world.tokenizer, 1))
    targets, runs = find_targets([str(folder) for folder in adapters])
    assert ([target.name for target in targets], runs) == (["v1-2", "v1.2"], [])
    assert [target.folder for target in targets] == [world.teacher] * 2
    loader = Loader()
    for target in (*targets, targets[0]):
        expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world.teacher), target.adapter)
        torch.testing.assert_close(logits(loader.load(target)), logits(expected), rtol=1e-5, atol=1e-5)
        assert loader.size(target) == packed_bytes(world.teacher) + packed_bytes(target.adapter)
    assert loads == [world.teacher]


def test_an_adapter_lies_over_what_it_names_or_what_is_named_for_it(world, adapters, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(adapters[0], moved)
    settings = json.loads((moved / "adapter_config.json").read_text())
    for base in (None, str(tmp_path / "gone")):
        (moved / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": base}))
        with pytest.raises(ModelError, match="--base MODEL"):
            find_targets([str(moved)])
        (target,), _ = find_targets([f"mine={moved}"], base=str(world.other))
        assert (target.name, target.folder, target.adapter) == ("mine", world.other, moved)
    (moved / "adapter_config.json").write_text(json.dumps({**settings, "peft_type": "PROMPT_TUNING"}))
    (target,), _ = find_targets([str(moved)], base=str(world.other))
    with pytest.raises(ModelError, match="is of type PROMPT_TUNING; LoRA adapters can be evaluated"):
        Loader().load(target)


def test_an_adapter_is_one_unless_a_models_weights_lie_beside_it(world, adapters, tmp_path):
    both = tmp_path / "both"
    shutil.copytree(adapters[0], both)
    shutil.copy(world.teacher / "config.json", both)
    (target,), _ = find_targets([str(both)], base=str(world.other))
    assert (target.folder, target.adapter) == (world.other, both), "a config.json is no model"
    shutil.copy(world.teacher / "model.safetensors", both)
    (target,), _ = find_targets([str(both)], base=str(world.other))
    assert (target.folder, target.adapter) == (both, None)


def test_the_adapter_of_a_served_export_is_the_export(world, tmp_path):
    student = prepare_student(
        make_model(world.tokenizer, 1), INT4, "served", LoraSettings(rank=2, alpha=4, targets=("q_proj",))
    )
    export_live(tmp_path / "served", student, world.teacher, {})
    (target,), _ = find_targets([str(tmp_path / "served" / "adapter")])
    assert (target.name, target.folder, target.adapter) == ("served", tmp_path / "served", None)


def test_checkpoints_compute_what_the_run_trained_and_their_student_is_built_once(run, monkeypatch):
    built = []
    monkeypatch.setattr(loading, "build_student", lambda *spec: built.append(spec) or build_student(*spec))
    targets, (defaults,) = find_targets([str(run)], every_checkpoint=True)
    assert [target.name for target in targets] == ["step 0", "step 2", "step 4"]
    assert defaults.run == "mine"
    loader, found = Loader(), []
    for target in targets:
        alone = build_student(loading.spec_of(target)).eval()
        tensors = load_checkpoint(target.checkpoint).tensors
        load_adapter_state(alone, {key: torch.from_numpy(value.copy()) for key, value in tensors.items()})
        found.append(logits(loader.load(target)))
        assert torch.equal(found[-1], logits(alone))
    assert len(built) == 1
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])


def test_one_checkpoint_is_a_target_like_any_other(run, world):
    (target,), (defaults,) = find_targets([str(run / "checkpoints" / "step-000002")])
    assert (target.name, defaults.run) == ("mine step-000002", "mine")
    rows = evaluate_folders([target], world.teacher, world.examples[:4], world.tokenizer)
    assert [row.name for row in rows] == ["teacher", "mine step-000002"]
    assert rows[1].role == "student" and rows[1].kl_nats > 0
    assert rows[1].extras == {"format": "int4-g32-asym-searched"}
    assert 0 < rows[1].bytes < rows[0].bytes, "as it would be exported"


def test_a_checkpoint_has_the_numbers_of_its_export(run, world, tmp_path):
    targets, _ = find_targets([str(run)], every_checkpoint=True)
    model = Loader().load(targets[1])
    export_live(tmp_path / "export", model, world.teacher, {})
    _, live, exported = evaluate_folders(
        [targets[1], Target("export", tmp_path / "export")], world.teacher, world.examples[:6], world.tokenizer
    )
    assert live.kl_nats == pytest.approx(exported.kl_nats, rel=1e-4)
    assert live.bytes == exported.bytes


def test_a_checkpoint_over_another_model_than_its_runs_is_refused(run, world):
    (target,), _ = find_targets([str(run / "checkpoints" / "step-000002")])
    with pytest.raises(ModelError, match=r"was trained with codes .* that is not the model that the run started from"):
        Loader().load(replace(target, folder=world.other))


def test_a_compressed_folder_of_another_tool_is_measured_like_any_model(world, tmp_path):
    """compressed-tensors as llm-compressor leaves it: nothing in the folder is raydistill's."""
    export_ptq(world.teacher, INT4, tmp_path / "packed")
    write_layout(tmp_path / "packed", tmp_path / "foreign", "compressed-tensors")
    ours = Target("ours", tmp_path / "packed")
    (tmp_path / "foreign" / "raydistill.json").unlink()
    _, ours, foreign = evaluate_folders(
        [ours, Target("foreign", tmp_path / "foreign")], world.teacher, world.examples[:6], world.tokenizer
    )
    assert foreign.kl_nats == pytest.approx(ours.kl_nats, rel=1e-4)
    assert foreign.role == "control"


def test_what_is_no_model_is_one_line_that_says_what_to_give(run, world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    empty = write_run(tmp_path / "runs" / "empty", world.teacher, world.rows, versions=())
    compared = tmp_path / "runs" / "20260101-000000-evaluate"
    with RunRecord(compared) as record:
        record.start(name="compared", config={}, provenance={}, seed=0)
        record.table(COMPARISON, [])
    cases = {
        "org/no-such-model does not exist here, and is no model of the hub": ["org/no-such-model"],
        "runs/emtpy does not exist; did you mean": ["runs/emtpy"],
        "--every-checkpoint follows one run": [str(run), str(empty)],
        "has kept no checkpoint": [str(empty)],
        "has no export/ folder, so it did not finish; finish it first, or measure": [str(empty)],
        "is the record of a comparison and holds no model; `raydistill results show": [str(compared)],
    }
    for message, texts in cases.items():
        with pytest.raises((ModelError, UserError)) as error:
            find_targets(texts, every_checkpoint=message.startswith(("--every-checkpoint", "has kept")))
        assert message in str(error.value) and "\n" not in str(error.value)
    gone = write_run(tmp_path / "runs" / "gone", world.teacher, world.rows, versions=(1,))
    record = (gone / "record.jsonl").read_text()
    (gone / "record.jsonl").write_text(record.replace(str(world.teacher), "/nowhere/base"))
    with pytest.raises(ModelError, match="started from /nowhere/base, which is not there"):
        find_targets([str(gone)], every_checkpoint=True)


def test_hub_ids_are_told_from_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exports").mkdir()
    assert is_hub_id("Qwen/Qwen3-0.6B") and is_hub_id("gpt2")
    for path in ("exports", "exports/typo", "./x", "/tmp/x/y", "~/m", "a/b/c", "models/"):
        assert not is_hub_id(path), path


def test_a_model_of_the_hub_is_found_in_the_cache_without_a_network(world, adapters, tmp_path, monkeypatch):
    from huggingface_hub import constants

    def cached(name, folder):
        repository = tmp_path / "hub" / f"models--org--{name}"
        shutil.copytree(folder, repository / "snapshots" / "0123abcd")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0123abcd")
        return repository / "snapshots" / "0123abcd"

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # read when the library was imported, as the cache is
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    model, adapter = cached("tiny-model", world.other), cached("tiny-lora", adapters[0])
    targets, _ = find_targets(["org/tiny-model", "over=org/tiny-lora"], base="org/tiny-model")
    assert targets == [Target("tiny-model", model), Target("over", model, "student", adapter=adapter)]
    torch.testing.assert_close(logits(Loader().load(targets[0])), logits(make_model(world.tokenizer, 2)))
    with pytest.raises(ModelError, match=r"org/tiny does not exist here.*the hub cannot be reached"):
        find_targets(["org/tiny"])


def test_the_teacher_stays_on_one_device_while_it_fits_there_beside_the_students():
    assert teacher_bounds([], 10 * GB, 0) is None, "on a CPU"
    assert teacher_bounds([80 * GB], 70 * GB, 40 * GB) is None, "nowhere else to go"
    assert teacher_bounds([80 * GB, 80 * GB], 50 * GB, 18 * GB) is None  # 68 of 80 GB


def test_a_teacher_that_is_too_large_is_spread_and_leaves_room_for_the_students():
    """85 % of what is free holds weights; the first GPU keeps what the students need."""
    assert teacher_bounds([80 * GB, 80 * GB, 40 * GB], 60 * GB, 20 * GB) == {0: 51 * GB, 1: 68 * GB, 2: 34 * GB}
    assert teacher_bounds([10 * GB, 80 * GB], 60 * GB, 20 * GB) == {0: 0, 1: 68 * GB}


def test_a_spread_teacher_is_loaded_as_the_teacher_actor_loads_it(world, monkeypatch):
    asked = {}
    real = loading.load_causal_lm

    def load(section, field, device, bounds):
        asked.update(section=section, bounds=bounds)
        return real(section, field, device)

    monkeypatch.setattr(loading, "load_causal_lm", load)
    size = loading.dense_bytes(world.other)
    assert size == 4 * sum(parameter.numel() for parameter in make_model(world.tokenizer, 2).parameters())
    monkeypatch.setattr(loading, "free_gpu_memory", lambda: [size + 1000, 10**9])
    model = loading.load_teacher(world.teacher, [world.other])
    assert asked["bounds"] == {0: 850, 1: int(0.85 * 10**9)}
    assert (asked["section"].num_gpus, asked["section"].dtype) == (2, "float32")
    np.testing.assert_allclose(logits(model), logits(make_model(world.tokenizer, 1)), atol=1e-5)
