"""The doctor's report: what is fine, what is not, and a way out for each."""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from raydistill.cli import main_with_errors
from raydistill.config import Config
from raydistill.errors import ResourceError, RunError, UserError
from raydistill.preflight.doctor import doctor_command
from raydistill.preflight.findings import check_ports, gpu_findings, rendered_example, template_warnings
from raydistill.preflight.memory import GpuMemory, gpu_memory_of, gpu_remarks, host_memory, host_remark
from raydistill.preflight.storage import check_room, check_storage, check_writable


def arguments(tiny_world: Any, output: Path, *more: str) -> list[str]:
    settings = {
        "student.model": tiny_world.teacher_folder,
        "student.dtype": "float32",
        "data.path": tiny_world.train_path,
        "data.eval_path": tiny_world.validation_path,
        "data.max_length": 160,
        "data.min_prompt_room": 4,
        "data.min_completion": 2,
        "rollout.max_new_tokens": 40,
        "run.output": output,
    }
    return [part for field, value in settings.items() for part in (f"--{field}", str(value))] + list(more)


def report(capsys: pytest.CaptureFixture[str], argv: Sequence[str]) -> tuple[int, dict[str, list[dict[str, str]]]]:
    code = main_with_errors(doctor_command, [*argv, "--json"])
    found: dict[str, list[dict[str, str]]] = {}
    for row in json.loads(capsys.readouterr().out):
        found.setdefault(row["check"], []).append(row)
    return code, found


def test_a_config_that_can_run_is_ready(tiny_world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = report(capsys, arguments(tiny_world, tmp_path))
    assert code == 0
    assert {row["status"] for rows in found.values() for row in rows} == {"ok"}
    assert "<|im_end|>" in found["end of sequence"][0]["text"]
    assert "####" in found["template"][0]["text"]
    assert "data.template: enable_thinking=False" in found["template"][0]["text"]
    assert "400 training rows" in found["data"][0]["text"]
    assert found.keys() >= {"storage", "vocabulary", "memory", "disk", "ports", "placement"}


@pytest.mark.parametrize(("thinking", "block"), [("false", "<think></think>\\n"), ("true", "")])
def test_the_example_shows_the_prompt_with_the_templates_variables(
    tiny_world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], thinking: str, block: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_world.teacher_folder, model)
    template = (model / "chat_template.jinja").read_text()
    switch = "{%- if add_generation_prompt and enable_thinking is false -%}{{- '<think></think>\\n' -}}{%- endif -%}"
    (model / "chat_template.jinja").write_text(template + switch)
    settings = ("--student.model", str(model), "--data.template.enable_thinking", thinking)
    code, found = report(capsys, arguments(tiny_world, tmp_path, *settings))
    assert code == 0
    example, *others = found["template"]
    assert others == []
    assert f"assistant\\n{block}' -> '" in example["text"]
    assert f"enable_thinking={thinking.title()}" in example["text"]


def test_what_a_template_does_not_read_and_a_date_of_its_own_are_warnings() -> None:
    (unread,) = template_warnings("{{ messages }}", {"enable_thinking": False, "reasoning_effort": "low"})
    assert unread.status == "warning"
    assert "data.template.reasoning_effort is not read" in unread.text
    dated = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b') %}{% endif %}"
    (date,) = template_warnings(dated, {"enable_thinking": False})
    assert "set data.template.date_string" in date.text
    assert template_warnings(dated, {"date_string": "26 Jul 2024"}) == []


def test_every_problem_is_one_line_with_a_way_out(
    tiny_world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = ("--data.path", str(tmp_path / "none.jsonl"), "--teacher.num_gpus", "64")
    code, found = report(capsys, arguments(tiny_world, tmp_path, *missing))
    assert code == 2
    (models,) = found["models and data"]
    assert models["status"] == "problem"
    assert "none.jsonl" in models["text"]
    (placement,) = found["placement"]
    assert "needs 64 GPUs" in placement["text"]
    assert "memory" not in found  # nothing was read that it could be estimated from
    problems = [row["text"] for rows in found.values() for row in rows if row["status"] == "problem"]
    assert len(problems) == 2
    for text in problems:
        assert "\n" not in text
        assert re.search(r"\b(data|rollout|trainer|teacher)\.\w+|<role>\.\w+", text), f"names no field: {text}"
        assert re.search(r"\b(give|lower|set|choose|add|check)\b", text), f"names no way out: {text}"


def test_templates_that_render_differently_are_shown_side_by_side(
    tiny_world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_world.teacher_folder, teacher)
    code, found = report(capsys, arguments(tiny_world, tmp_path, "--teacher.model", str(teacher)))
    assert (code, len(found["template"])) == (0, 2)
    assert found["template"][1]["text"].startswith(
        "student.model and teacher.model both render '<|im_start|>user\\nHello"
    )
    template = teacher / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>", "<|im_start|>the "))
    code, found = report(capsys, arguments(tiny_world, tmp_path, "--teacher.model", str(teacher)))
    assert code == 0
    different = found["template"][1]
    assert different["status"] == "warning"
    assert "student.model renders a question and its answer as '<|im_start|>user" in different["text"]
    assert "teacher.model as '<|im_start|>the user" in different["text"]
    assert "copy chat_template.jinja" in different["text"]


def test_a_tokenizer_without_a_template_renders_plain_text(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert rendered_example(tokenizer, {}).startswith("<|im_start|>user\nHello")
    tokenizer.chat_template = "{{ raise_exception('no assistant') }}"
    assert rendered_example(tokenizer, {}) == "(an error: no assistant)"
    tokenizer.chat_template = None
    assert rendered_example(tokenizer, {}) == "Hello\nHi.<|im_end|>"


GB = 10**9


def plan_of(*gpus: tuple[list[str], float], **parts: dict[str, int]) -> dict[str, Any]:
    """A plan with GPUs (roles, share) and the GPU parts of each role, in GB."""
    rows = [
        {"role": role, "count": 2, "name": name, "place": "GPU", "bytes": size * GB}
        for role, of_role in parts.items()
        for name, size in of_role.items()
    ]
    rows.append({"role": "trainer", "count": 2, "name": "A and B", "place": "host", "bytes": 10})
    return {"memory": rows, "gpus": [{"roles": roles, "count": 1, "share": share} for roles, share in gpus]}


def remark(plan: dict[str, Any], gb: int | None, **changes: Any) -> tuple[str, str]:
    gpu = GpuMemory(name="L4", bytes=gb * GB) if gb else None
    (said,) = gpu_remarks(Config.model_validate(changes), plan, gpu)
    return said.status, said.text


def test_an_actor_that_does_not_fit_its_gpu_is_a_warning_with_a_way_out() -> None:
    large = plan_of((["trainer"], 1), trainer={"frozen weights": 8, "activations (rough)": 20})
    assert host_remark(large).status == "ok"
    status, text = remark(large, 22)
    assert status == "warning"
    assert text.startswith(
        "one trainer actor takes about 28 GB of a GPU (L4 with 22 GB); lower trainer.sequences_per_mic"
    )
    assert remark(large, 79)[0] == "ok"
    assert remark(large, None)[1].endswith("which GPUs the nodes have is not known here")
    share = plan_of((["teacher"], 0.3), teacher={"weights": 8})
    assert "of which 30% are booked (teacher.num_gpus)); lower" in remark(share, 22)[1]


def test_vllms_cache_takes_what_is_left_and_is_not_counted() -> None:
    fits = plan_of((["rollout"], 1), rollout={"weights, dense": 8, "KV cache": 40})
    assert remark(fits, 22)[0] == "ok"
    status, text = remark(plan_of((["rollout"], 1), rollout={"weights, dense": 20}), 22)
    assert status == "warning"
    assert "vLLM takes 85% (rollout.gpu_memory_utilization)); lower rollout.kv_cache_gib" in text


def test_actors_that_share_a_gpu_are_added_up() -> None:
    teaching = plan_of((["teacher", "evaluation"], 1), teacher={"weights": 40}, evaluation={"weights": 41})
    status, text = remark(teaching, 80)
    assert status == "warning"
    assert text.startswith(
        "2 actors share a GPU and take about 81 GB of it (teacher 40 GB, evaluation 41 GB) (L4 with 80 GB); "
    )
    assert "set evaluation.num_gpus=0 (on the CPU), book a GPU for each (<role>.num_gpus=1)" in text
    assert remark(teaching, 82)[0] == "ok"
    sampling = plan_of((["rollout", "trainer"], 1), rollout={"weights, dense": 10}, trainer={"frozen weights": 30})
    status, text = remark(sampling, 80)
    assert status == "warning"
    assert "rollout 10 GB beside its KV cache, trainer 30 GB" in text
    assert text.endswith("; lower rollout.gpu_memory_utilization, or use larger GPUs")
    assert remark(sampling, 80, rollout={"gpu_memory_utilization": 0.6})[0] == "ok"
    assert "raise rollout.gpu_memory_utilization" in remark(sampling, 80, rollout={"gpu_memory_utilization": 0.1})[1]
    assert remark(sampling, 80, rollout={"engine": "hf"})[0] == "ok"


def test_host_memory_that_does_not_suffice_names_the_largest_roles_fields() -> None:
    parts = [
        {"role": role, "count": 1, "name": "weights", "place": "host", "bytes": size}
        for role, size in (("teacher", 10**15), ("trainer", 10**12))
    ]
    host = host_remark({"memory": parts, "gpus": []})
    assert host.status == "warning"
    assert "; lower teacher.batch_tokens, set teacher.dtype='bfloat16'" in host.text


def test_a_containers_limit_is_the_hosts_memory_for_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    v2, v1 = tmp_path / "memory.max", tmp_path / "limit_in_bytes"
    monkeypatch.setattr("raydistill.preflight.memory.CGROUP_LIMITS", (v2, v1))
    whole = host_memory()
    assert whole > 2**20
    v1.write_text("9223372036854771712\n")  # none
    v2.write_text("max\n")
    assert host_memory() == whole
    v2.write_text(f"{2**20}\n")
    assert host_memory() == 2**20


def test_a_clusters_gpus_are_known_by_their_accelerator_types() -> None:
    def node(**resources: float) -> dict[str, Any]:
        return {"Alive": True, "Resources": resources}

    large, small = node(GPU=4, **{"accelerator_type:H100": 1}), node(GPU=1, **{"accelerator_type:A10G": 1})
    assert gpu_memory_of([node(CPU=8), large]) == GpuMemory(name="H100", bytes=79 * 2**30)
    found = gpu_memory_of([large, small])
    assert found is not None
    assert found.name == "A10G"
    assert gpu_memory_of([large, node(GPU=1)]) is None
    assert gpu_memory_of([node(CPU=8)]) is None


class InProcess:
    """A pool of one rollout actor without Ray, which may get other weights than it should."""

    added = 0.0

    def __init__(self, *_: Any) -> None:
        self._actor: Any = None

    async def begin(self, name: str, config: Config, spec: Any, held_out: None) -> "InProcess":
        from raydistill.actors.rollout import RolloutActor

        self._actor = RolloutActor("rollout-0", "hf")
        self._actor.start(name, spec)
        return self

    async def load(self, weights: Any, version: int, with_codes: bool) -> list[Any]:
        tensors = {name: array + self.added for name, array in weights.tensors.items()}
        return [self._actor.load("doctor", replace(weights, tensors=tensors), with_codes)]

    async def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("gpus", "status"), [({"accelerator_type:L4": 1.0, "GPU": 1.0}, "warning"), ({"GPU": 1.0}, "ok")]
)
def test_a_clusters_gpus_are_held_against_the_plan(
    monkeypatch: pytest.MonkeyPatch, gpus: dict[str, float], status: str
) -> None:
    nodes = [{"Alive": True, "Resources": gpus}]
    plan = plan_of((["trainer"], 1), trainer={"frozen weights": 30})
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert gpu_findings(Config(), plan, nodes) == []  # this machine's own count
    (found,) = gpu_findings(Config.model_validate({"cluster": {"address": "head:6379"}}), plan, nodes)
    assert (found.check, found.status) == ("memory", status)


def test_a_job_holds_its_memory_against_the_gpus_of_the_cluster_it_joined(
    tiny_world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    from raydistill.config.load import load_config
    from raydistill.launch import run

    joined: list[str] = []
    nodes = [{"Alive": True, "Resources": {"CPU": 9.0, "GPU": 4.0, "accelerator_type:T4": 1.0}}]
    monkeypatch.setattr("raydistill.launch.start_cluster", lambda config: joined.append(config.cluster.address))
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    monkeypatch.setattr("raydistill.preflight.memory.GIB", 1000)  # of the T4 there
    monkeypatch.setattr("raydistill.preflight.storage.check_nodes_reach_storage", stop_here)
    console = Console(record=True, width=1000, file=StringIO())
    settings = ("--cluster.address", "head:6379", "--trainer.num_gpus", "1")
    with pytest.raises(RunError, match="far enough"):
        run(load_config(arguments(tiny_world, tmp_path, *settings)).config, console=console)
    assert joined == ["head:6379"]
    assert "warning: one trainer actor takes about" in console.export_text()
    assert "not known here" not in console.export_text()


def stop_here(*_: Any) -> None:
    raise RunError("far enough")


def test_roles_without_a_cluster_are_a_warning_that_names_the_field(
    tiny_world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = report(capsys, arguments(tiny_world, tmp_path, "--cluster.by_role", "true"))
    fits, refused = found["placement"]
    assert (code, fits["status"], refused["status"]) == (0, "ok", "warning")
    assert "cluster.by_role=true" in refused["text"]
    assert "set cluster.address" in refused["text"]


def test_parity_of_a_run_that_samples_nothing_says_what_to_set(
    tiny_world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = report(capsys, arguments(tiny_world, tmp_path, "--objective.on_policy_fraction", "0", "--parity"))
    (parity,) = found["parity"]
    assert (code, parity["status"]) == (0, "warning")
    assert "nothing samples here (objective.on_policy_fraction=0)" in parity["text"]
    assert "set objective.on_policy_fraction above 0" in parity["text"]


@pytest.mark.parametrize(("added", "status"), [(0.0, "ok"), (0.1, "problem")])
def test_parity_measures_the_engine_against_the_trainers_student(
    tiny_world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    added: float, status: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("raydistill.launch.start_cluster", lambda config: None)
    monkeypatch.setattr("raydistill.actors.rollout_pool.RolloutPool", InProcess)
    monkeypatch.setattr(InProcess, "added", added)
    monkeypatch.setattr("ray.put", lambda value: value)
    settings = ("--rollout.engine", "hf", "--quant.format", "int2", "--parity")
    code, found = report(capsys, arguments(tiny_world, tmp_path, *settings))
    (parity,) = found["parity"]
    assert (code, parity["status"]) == (0 if status == "ok" else 2, status)
    assert re.search(
        r"noise floor of the policy gap: mean \S+, p99 \S+ nats \(bound .*\); codes [0-9a-f]+", parity["text"]
    )
    assert ("both sides must quantize the same way" in parity["text"]) == (status == "problem")
    assert ("rollout.engine='hf'" in parity["text"]) == (status == "problem")


def test_an_output_that_cannot_be_written_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = Config.model_validate({"run": {"output": tmp_path / "file" / "outputs"}})
    with pytest.raises(ResourceError, match=r"choose another run\.output"):
        check_writable(config)


def test_a_storage_is_written_and_read_back(
    tiny_world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"file://{tmp_path}/remote"
    code, found = report(capsys, arguments(tiny_world, tmp_path, "--run.storage", url))
    assert code == 0
    assert found["run.storage"] == [
        {"check": "run.storage", "status": "ok", "text": f"{url} was written and read back"}
    ]
    assert list((tmp_path / "remote").iterdir()) == []


@pytest.mark.parametrize(
    ("url", "said"), [("nope://bucket/x", "cannot be opened"), ("file:///proc/nobody/x", "does not exist; create")]
)
def test_a_storage_that_cannot_be_used_is_a_problem(monkeypatch: pytest.MonkeyPatch, url: str, said: str) -> None:
    monkeypatch.setattr("raydistill.recovery.storage.PAUSES_S", ())
    config = Config.model_validate({"run": {"storage": url}})
    with pytest.raises(UserError, match=f"run.storage='{url}'.*{said}") as wrong:
        check_storage(config)
    assert "\n" not in str(wrong.value)


def test_checkpoints_that_do_not_fit_the_disk_are_a_problem(tmp_path: Path) -> None:
    config = Config.model_validate({"run": {"output": tmp_path}, "checkpoint": {"keep_last": 1, "keep_best": 1}})
    assert check_room(config, 1000).startswith("4 checkpoints need about 64 KB")
    with pytest.raises(ResourceError, match=r"checkpoint\.keep_last"):
        check_room(config, 10**15)


def test_checkpoints_of_a_run_that_goes_on_have_their_room_already(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config.model_validate({"run": {"output": tmp_path}, "checkpoint": {"keep_last": 1, "keep_best": 1}})
    usage = shutil.disk_usage(tmp_path)._replace(free=40_000)
    monkeypatch.setattr("raydistill.preflight.storage.shutil.disk_usage", lambda _: usage)
    with pytest.raises(ResourceError, match="4 checkpoints need about 64 KB"):
        check_room(config, 1000)
    for version in (2, 4):
        folder = tmp_path / "runs" / "one" / "checkpoints" / f"step-{version:06d}" / "optimizer"
        folder.mkdir(parents=True)
        (folder / "state.pt").write_bytes(bytes(16_000))
    text = check_room(config, 1000, tmp_path / "runs" / "one")
    assert text == "4 checkpoints need about 64 KB, 40 KB are free, 32 KB lie there already"


def test_a_machine_that_cannot_reach_itself_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "reach each other at" in check_ports()
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "203.0.113.7")  # of nobody: reserved for documentation
    with pytest.raises(ResourceError, match=r"cannot connect to each other at 203\.0\.113\.7 .* firewall"):
        check_ports()


def test_a_job_makes_the_same_checks_before_anything_starts(
    tiny_world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    from raydistill.config.load import load_config
    from raydistill.launch import run

    monkeypatch.setattr("raydistill.launch.start_cluster", lambda config: pytest.fail("a problem was not noticed"))
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "203.0.113.7")
    config = load_config(arguments(tiny_world, tmp_path)).config
    with pytest.raises(ResourceError, match="cannot connect to each other"):
        run(config, console=Console(quiet=True))
    assert not (tmp_path / "runs").exists()
