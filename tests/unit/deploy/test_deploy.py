"""What stands in the files of a cluster: Ray's own schema, KubeRay's required fields, known metrics, pins that agree.

KubeRay's schema is no part of the project: the manifest may hold the fields named here and no other, and each of these was
looked up in KubeRay's schema (the CRD `rayjobs.ray.io` of 1.6.0 and 1.7.0). Ray's own reading of such a manifest is the other
check; that a real cluster accepts these files is not tested here.
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
from raydistill.errors import ConfigError, ResourceError
from raydistill.preflight.placement import NODE_RESOURCES, check_placement, placement_plan

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


TEXT, COUNT, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}


def closed(*required: str, **fields: Any) -> dict[str, Any]:
    """A JSON schema of an object that has these fields and no other."""
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def list_of(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1}


AMOUNTS = {"type": "object", "additionalProperties": {"anyOf": [TEXT, COUNT]}}
CONTAINER = closed(
    "name", "image",
    name=TEXT, image=TEXT,
    ports=list_of(closed("containerPort", name=TEXT, containerPort=COUNT)),
    envFrom=list_of(closed(secretRef=closed("name", name=TEXT, optional=FLAG))),
    volumeMounts=list_of(closed("name", "mountPath", name=TEXT, mountPath=TEXT)),
    resources=closed(requests=AMOUNTS, limits=AMOUNTS),
)  # fmt: skip
POD = closed(
    "containers",
    restartPolicy={"enum": ["Never", "OnFailure", "Always"]},
    securityContext=closed(runAsNonRoot=FLAG, runAsUser=COUNT, runAsGroup=COUNT, fsGroup=COUNT),
    containers=list_of(CONTAINER),
    volumes=list_of(closed("name", name=TEXT, persistentVolumeClaim=closed("claimName", claimName=TEXT))),
)
GROUP = {"rayStartParams": TEXTS, "template": closed("spec", spec=POD)}
WORKERS = closed(
    "rayStartParams", "template", "groupName", "minReplicas", "maxReplicas",
    groupName=TEXT, replicas=COUNT, minReplicas=COUNT, maxReplicas=COUNT, **GROUP,
)  # fmt: skip
RAY_CLUSTER = closed(
    "headGroupSpec",
    rayVersion=TEXT,
    authOptions=closed(mode={"enum": ["token", "disabled"]}),
    headGroupSpec=closed("rayStartParams", "template", **GROUP),
    workerGroupSpecs=list_of(WORKERS),
)
RAY_JOB = closed(
    "apiVersion", "kind", "metadata", "spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=closed("name", name={"type": "string", "pattern": r"^[a-z]([-a-z0-9]{0,45}[a-z0-9])?$"}),
    spec=closed(
        "entrypoint", "rayClusterSpec",
        entrypoint=TEXT, backoffLimit=COUNT, shutdownAfterJobFinishes=FLAG, ttlSecondsAfterFinished=COUNT,
        rayClusterSpec=RAY_CLUSTER,
    ),
)  # fmt: skip


def kuberay_problems(document: dict[str, Any]) -> list[str]:
    """Where the manifest has a field that is not known, or lacks one that KubeRay (ray.io/v1) requires."""
    found = jsonschema.Draft202012Validator(RAY_JOB).iter_errors(document)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in found]


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
        assert resources[role] == 1
        assert resources["GPU"] >= 1
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


def test_manifest_has_the_fields_that_kuberay_knows_and_requires(manifest):
    assert kuberay_problems(manifest["RayJob"]) == []


WORKER = ("spec", "rayClusterSpec", "workerGroupSpecs", 1)


@pytest.mark.parametrize(
    ("path", "instead", "problem"),
    [
        (("spec", "entrypoint"), None, "spec: 'entrypoint' is a required property"),
        (("spec", "backoffLimit"), "backOffLimit", "spec: Additional properties are not allowed ('backOffLimit'"),
        (
            ("spec", "rayClusterSpec", "headGroupSpec", "template"),
            None,
            "spec.rayClusterSpec.headGroupSpec: 'template' is a required property",
        ),
        ((*WORKER, "groupName"), None, "spec.rayClusterSpec.workerGroupSpecs.1: 'groupName' is a required property"),
        ((*WORKER, "minReplicas"), "minReplica", "('minReplica' was unexpected)"),
        ((*WORKER, "rayStartParams", "resources"), ("resources", {"rollout": 1}), "is not of type 'string'"),
        ((*WORKER, "template", "spec", "containers", 0, "envFrom"), "envfrom", "('envfrom' was unexpected)"),
        (
            (*WORKER, "template", "spec", "containers", 0, "resources", "limits"),
            "limit",
            "containers.0.resources: Additional properties are not allowed ('limit'",
        ),
    ],
)
def test_a_missing_or_misspelt_field_of_the_manifest_is_noticed(manifest, path, instead, problem):
    damaged = json.loads(json.dumps(manifest["RayJob"]))  # without the YAML's shared parts
    place = damaged
    for step in path[:-1]:
        place = place[step]
    value = place.pop(path[-1])
    if isinstance(instead, tuple):
        place[instead[0]] = instead[1]
    elif instead is not None:
        place[instead] = value
    assert any(problem in found for found in kuberay_problems(damaged)), kuberay_problems(damaged)


def test_ray_reads_the_roles_out_of_the_manifest(job):
    derived = _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": "raydistill", "namespace": "default"}, "spec": deepcopy(job["rayClusterSpec"])}
    )
    types = derived["available_node_types"]
    assert set(types) == {"headgroup", *ROLES}
    assert types["headgroup"]["resources"]["CPU"] == 0
    for role in ROLES:
        resources = types[role]["resources"]
        assert resources[role] == 1 <= resources["GPU"], f"{role}: {resources}"
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


def smallest_nodes(types: dict[str, Any]) -> list[dict[str, float]]:
    """The resources of the nodes that Ray keeps when nobody asks for more."""
    return [dict(node["resources"]) for node in types.values() for _ in range(node.get("min_workers", 1))]


def test_manifest_has_room_by_role_for_the_run_it_starts(job):
    config = load_config(arguments_of(job["entrypoint"])).config
    assert config.cluster.by_role, "the nodes' role resources would say nothing"
    assert {NODE_RESOURCES[demand.role] for demand in placement_plan(config)} == set(ROLES)
    derived = _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": "raydistill", "namespace": "default"}, "spec": deepcopy(job["rayClusterSpec"])}
    )
    nodes = smallest_nodes(derived["available_node_types"])
    check_placement(config, nodes)
    with pytest.raises(ResourceError, match="resource 'trainer'"):
        check_placement(config, [node for node in nodes if "trainer" not in node])


def test_cluster_file_has_room_by_role_for_the_job_of_the_docs(cluster):
    jobs = re.findall(r"-- python -m raydistill.train ((?:\\\n|[^\n])*)", (ROOT / "docs/cluster.md").read_text())
    (words,) = [shlex.split(job.replace("\\\n", " ")) for job in jobs if "int4-onpolicy" in job]
    config = load_config([word.replace("@configs", f"@{ROOT}/configs") for word in words]).config
    assert config.cluster.by_role
    check_placement(config, smallest_nodes(prepare_config(deepcopy(cluster))["available_node_types"]))


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
