"""What stands in the files of a cluster: Ray's own schema, KubeRay's required fields, known metrics, pins that agree.

The manifest's structure is checked by hand (KubeRay's schema is no part of the project) and by Ray's reading of such a
manifest; that a real cluster accepts these files is not tested here.
"""

import json
import re
import shlex
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary
from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer, get_nodes_for
from ray.autoscaler._private.util import prepare_config, validate_config

from raydistill.config.load import load_config
from raydistill.errors import ConfigError
from raydistill.preflight.placement import placement_plan

ROOT = Path(__file__).parents[3]
ROLES = ("rollout", "teacher", "trainer")
IMAGE_FOLDER = "/app"  # where the Dockerfile puts the project
SHARED = "/shared"

# What the driver exports, as Ray names it, and the labels beside `run`.
METRICS: dict[str, tuple[str, ...]] = {
    "ray_raydistill_step": (),
    "ray_raydistill_loss": (),
    "ray_raydistill_kl_nats": (),
    "ray_raydistill_tokens_per_s": ("stage",),
    "ray_raydistill_wait_s": ("stage",),
    "ray_raydistill_busy_s": ("stage",),
    "ray_raydistill_policy_gap_nats": ("actor",),
    "ray_raydistill_staleness_steps": (),
    "ray_raydistill_queue_depth": ("stage",),
}


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return loaded


@pytest.fixture(scope="module")
def manifest() -> dict[str, dict[str, Any]]:
    """The manifest's documents by kind."""
    return {doc["kind"]: doc for doc in yaml.safe_load_all((ROOT / "deploy/rayjob.yaml").read_text())}


@pytest.fixture(scope="module")
def job(manifest: dict[str, dict[str, Any]]) -> dict[str, Any]:
    spec: dict[str, Any] = manifest["RayJob"]["spec"]
    return spec


def arguments_of(entrypoint: str) -> list[str]:
    """What follows `python -m raydistill.train`, with the image's paths turned into the checkout's."""
    words = shlex.split(entrypoint)
    assert words[:3] == ["python", "-m", "raydistill.train"], entrypoint
    return [word.replace(f"@{IMAGE_FOLDER}/", f"@{ROOT}/") for word in words[3:]]


def groups(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Head and worker groups by name."""
    spec = job["rayClusterSpec"]
    return {"head": spec["headGroupSpec"]} | {group["groupName"]: group for group in spec["workerGroupSpecs"]}


def kuberay_problems(document: dict[str, Any]) -> list[str]:
    """Fields that KubeRay (ray.io/v1) requires and the manifest lacks."""
    problems = []
    if (document.get("apiVersion"), document.get("kind")) != ("ray.io/v1", "RayJob"):
        problems.append("apiVersion, kind")
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", document.get("metadata", {}).get("name", "")):
        problems.append("metadata.name")
    spec = document["spec"]
    problems += [f"spec.{field}" for field in ("entrypoint", "rayClusterSpec") if not spec.get(field)]
    cluster = spec.get("rayClusterSpec", {})
    for place, group in [("head", cluster.get("headGroupSpec", {}))] + [
        (f"worker {index}", group) for index, group in enumerate(cluster.get("workerGroupSpecs", []))
    ]:
        wanted = ["rayStartParams", "template"]
        wanted += ["groupName", "minReplicas", "maxReplicas"] if place != "head" else []
        problems += [f"{place}: {field}" for field in wanted if field not in group]
        problems += [
            f"{place}: {k} is no string" for k, v in group.get("rayStartParams", {}).items() if not isinstance(v, str)
        ]
        containers = group.get("template", {}).get("spec", {}).get("containers", [])
        problems += [f"{place}: containers"] if not containers else []
        problems += [f"{place}: container.{f}" for c in containers for f in ("name", "image") if f not in c]
    return problems


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    found = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert len(found) == sum(bool(line) and not line.startswith("#") for line in lines), f"{name} pins something twice"
    return found


def test_cluster_file_passes_rays_own_schema(cluster):
    validate_config(prepare_config(deepcopy(cluster)))


def test_rays_schema_notices_a_misspelt_node_type_field_and_too_few_workers(cluster):
    misspelt = deepcopy(cluster)
    misspelt["available_node_types"]["rollout"]["min_worker"] = 1
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(misspelt))
    with pytest.raises(ValueError, match="max_workers"):
        validate_config(prepare_config(deepcopy(cluster) | {"max_workers": 1}))


def test_cluster_file_has_a_node_type_with_a_resource_for_each_role(cluster):
    types = cluster["available_node_types"]
    assert set(types) == {"head", *ROLES}
    assert cluster["head_node_type"] == "head"
    for role in ROLES:
        resources = types[role]["resources"]
        assert set(resources) == {"CPU", "GPU", role}, f"{role}: {resources}"
        assert resources[role] == resources["GPU"] >= 1
        assert 1 <= types[role]["min_workers"] <= types[role]["max_workers"]
    assert sum(types[role]["max_workers"] for role in ROLES) <= cluster["max_workers"]


@pytest.mark.parametrize("role", ROLES)
def test_rays_scheduler_answers_a_roles_request_with_a_node_of_its_type(cluster, role):
    types = prepare_config(deepcopy(cluster))["available_node_types"]
    asked = [{role: 1, "GPU": 1, "CPU": 0.5}]
    scorer = partial(_default_utilization_scorer, node_availability_summary=NodeAvailabilitySummary({}))
    chosen, unmet = get_nodes_for(types, {}, "head", cluster["max_workers"], asked, scorer)
    assert (dict(chosen), unmet) == ({role: 1}, [])


def test_cluster_file_installs_the_pins_and_holds_no_secret(cluster):
    commands = " ".join(cluster["setup_commands"])
    mounted = next(iter(cluster["file_mounts"]))
    named = re.findall(rf"-r {mounted}/(\S+)", commands)
    assert named == ["requirements/cuda.txt"]
    assert all((ROOT / name).is_file() for name in named)
    assert "--no-deps -r" not in commands  # cuda.txt is no closure
    for file in ("cluster.yaml", "deploy/rayjob.yaml", "deploy/grafana.json", "Dockerfile"):
        assert not re.search(
            r"AKIA|hf_[A-Za-z0-9]{8}|(?i:password|secret_key|token)\s*[:=]\s*\S{12}", (ROOT / file).read_text()
        )


def test_manifest_has_what_kuberay_requires(manifest):
    assert kuberay_problems(manifest["RayJob"]) == []


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        (("entrypoint",), "spec.entrypoint"),
        (("rayClusterSpec", "headGroupSpec", "template"), "head: template"),
        (("rayClusterSpec", "workerGroupSpecs", 1, "groupName"), "worker 1: groupName"),
        (("rayClusterSpec", "workerGroupSpecs", 2, "maxReplicas"), "worker 2: maxReplicas"),
    ],
)
def test_a_missing_field_of_the_manifest_is_noticed(manifest, path, problem):
    damaged = deepcopy(manifest["RayJob"])
    place = damaged["spec"]
    for step in path[:-1]:
        place = place[step]
    del place[path[-1]]
    assert problem in kuberay_problems(damaged)


def test_ray_reads_the_roles_out_of_the_manifest(job):
    derived = _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": "raydistill", "namespace": "default"}, "spec": deepcopy(job["rayClusterSpec"])}
    )
    types = derived["available_node_types"]
    assert set(types) == {"headgroup", *ROLES}
    assert types["headgroup"]["resources"]["CPU"] == 0
    for role in ROLES:
        resources = types[role]["resources"]
        assert resources[role] == resources["GPU"] >= 1, f"{role}: {resources}"
        assert {other for other in ROLES if other in resources} == {role}


def test_manifest_retries_with_a_fixed_name_on_the_shared_volume(manifest, job):
    assert job["backoffLimit"] >= 1
    config = load_config(arguments_of(job["entrypoint"])).config
    assert config.run.name, "a retried run finds its checkpoints by its name"
    assert config.run.output.is_relative_to(SHARED)
    claim = manifest["PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for name, group in groups(job).items():
        pod = group["template"]["spec"]
        volumes = {
            v["name"] for v in pod["volumes"] if v["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        }
        assert [m["mountPath"] for m in pod["containers"][0]["volumeMounts"] if m["name"] in volumes] == [SHARED], name


def test_manifest_has_room_for_the_run_it_starts(job):
    config = load_config(arguments_of(job["entrypoint"])).config
    for demand in placement_plan(config):
        if demand.role not in ROLES:
            continue
        group = groups(job)[demand.role]
        gpus = group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
        assert demand.count * demand.num_gpus <= group["minReplicas"] * gpus, demand


def test_every_container_has_requests_within_its_limits_and_one_image(job):
    containers = [group["template"]["spec"]["containers"][0] for group in groups(job).values()]
    assert len({container["image"] for container in containers}) == 1
    for container in containers:
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert {"cpu", "memory"} <= set(requests) == set(limits)
        assert int(requests["cpu"]) <= int(limits["cpu"])
        assert requests["memory"] == limits["memory"]


def test_manifest_names_the_ray_version_of_the_pins(job):
    assert job["rayClusterSpec"]["rayVersion"] == pins("cuda.txt")["ray"]


@pytest.mark.parametrize("file", ["cluster.yaml", "deploy/rayjob.yaml", "Dockerfile", "docs/cluster.md"])
def test_files_of_the_project_that_are_named_exist(file):
    text = (ROOT / file).read_text()
    named = re.findall(r"\b((?:configs|requirements|deploy|docs)/[\w.-]+\.(?:toml|txt|yaml|json|md))", text)
    assert named, f"{file} names no file"
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_the_loader_notices_a_wrong_field_in_an_entrypoint(job):
    with pytest.raises(ConfigError):
        load_config(arguments_of(job["entrypoint"] + " --trainer.num_worker 4"))


def test_dashboard_shows_every_metric_and_no_unknown_one():
    board = json.loads((ROOT / "deploy/grafana.json").read_text())
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert all(panel["targets"] for panel in board["panels"])
    shown = [re.findall(r"\b(ray_\w+)", expression) for expression in expressions]
    assert all(len(names) == 1 for names in shown)
    assert sorted(name for names in shown for name in names) == sorted(METRICS)


def test_dashboard_selects_by_run_and_names_only_labels_that_exist():
    board = json.loads((ROOT / "deploy/grafana.json").read_text())
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert re.fullmatch(r"label_values\((\w+), run\)", variables["run"]["definition"])
    assert variables["datasource"]["type"] == "datasource"
    for panel in board["panels"]:
        for target in panel["targets"]:
            metric, selector = re.fullmatch(r"(\w+)\{(.*)\}", target["expr"]).groups()
            assert selector == 'run=~"$run"'
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) == {"run", *METRICS[metric]}, panel["title"]


def test_dashboard_panels_do_not_overlap():
    board = json.loads((ROOT / "deploy/grafana.json").read_text())
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in board["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


def test_each_image_installs_its_own_pins_and_runs_as_no_root():
    stages = dict(re.findall(r"^FROM \S+ AS (\w+)\n(.*?)(?=^FROM |\Z)", (ROOT / "Dockerfile").read_text(), re.M | re.S))
    assert set(stages) == {"base", "cpu", "cuda"}
    for target in ("cpu", "cuda"):
        assert set(re.findall(r"requirements/(\w+)\.txt", stages[target])) == {target}
        assert re.findall(r"^USER (\w+)$", stages[target], re.M) == ["ray"]
    assert f"WORKDIR {IMAGE_FOLDER}" in stages["base"]


def test_the_image_gets_everything_it_copies():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line[1:] for line in ignored if line.startswith("!")}
    assert {"raydistill", "configs", "requirements", "pyproject.toml", "README.md"} == kept
    assert all((ROOT / name).exists() for name in kept)
