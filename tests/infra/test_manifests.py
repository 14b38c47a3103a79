"""Cluster files: each against the strict schema of whoever will read it, and against what we promise of it."""

import copy
import functools
import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.docker import docker_start_cmds
from ray.autoscaler._private.util import prepare_config, validate_config
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from pipeline.config.load import load_config

INFRA = Path(__file__).parents[2] / "infra"
SCHEMAS = files("kubernetes_validate") / "kubernetes-json-schema" / "v1.37.0-local-strict"
MANIFESTS = [
    pytest.param(document, id=f"{path.stem}-{document['kind']}-{document['metadata']['name']}")
    for path in sorted((INFRA / "kubernetes").glob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text(encoding="utf-8"))
]
RAY = [parameter for parameter in MANIFESTS if parameter.values[0]["apiVersion"] == "ray.io/v1"]
NAMED = {(p.values[0]["kind"], p.values[0]["metadata"]["name"]): p.values[0] for p in MANIFESTS}


@functools.cache
def core() -> Registry[Any]:
    """Kubernetes' own types, read once: kubernetes_validate.validate() reads the 2 MB of them for every document."""
    text = (SCHEMAS / "_definitions.json").read_text()
    resource = Resource.from_contents(json.loads(text), default_specification=DRAFT202012)
    return Registry().with_resource("https://kubernetes.io/api/_definitions.json", resource)


@functools.cache
def validator(api: str, kind: str) -> jsonschema.Draft202012Validator:
    if api == "ray.io/v1":
        schema = yaml.safe_load((Path(__file__).parent / "kuberay.schema.yaml").read_text(encoding="utf-8"))
    else:
        group, _, version = api.rpartition("/")
        name = "-".join(part for part in (kind.lower(), group.partition(".")[0], version) if part)
        schema = json.loads((SCHEMAS / f"{name}.json").read_text())
    return jsonschema.Draft202012Validator(schema, registry=core())


def check(document: dict[str, Any]) -> None:
    validator(document["apiVersion"], document["kind"]).validate(document)


def cluster_spec(document: dict[str, Any]) -> dict[str, Any]:
    return document["spec"]["rayClusterSpec"] if document["kind"] == "RayJob" else document["spec"]


def pod_specs(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if document["apiVersion"] == "ray.io/v1":
        spec = cluster_spec(document)
        yield from (group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]))
    elif "template" in document["spec"]:
        yield document["spec"]["template"]["spec"]


def places(value: Any) -> Iterator[dict[str, Any]]:
    """Every object of a document whose fields the schema lists, and none whose keys are free (labels, quantities)."""
    if isinstance(value, dict):
        yield value
        for key, inner in value.items():
            flat = isinstance(inner, dict) and all(isinstance(item, str) for item in inner.values())
            if not (
                key in ("labels", "matchLabels", "requests", "limits", "rayStartParams") or (key == "selector" and flat)
            ):
                yield from places(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from places(inner)


@pytest.mark.parametrize("document", MANIFESTS)
def test_manifest_is_what_kubernetes_expects(document: dict[str, Any]) -> None:
    check(document)


@pytest.mark.parametrize("document", MANIFESTS)
def test_unknown_field_anywhere_is_refused(document: dict[str, Any]) -> None:
    changed = copy.deepcopy(document)
    found = list(places(changed))
    assert found
    for place in found:
        place["misspelt"] = "x"
        with pytest.raises(jsonschema.ValidationError):
            check(changed)
        del place["misspelt"]
    check(changed)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda spec: spec["authOptions"].update(mode="tokens"), "'tokens' is not one of"),
        (lambda spec: spec["autoscalerOptions"].update(upscalingMode="default"), "'default' is not one of"),
        (lambda spec: spec["gcsFaultToleranceOptions"].pop("redisAddress"), "'redisAddress' is a required property"),
        (lambda spec: spec["headGroupSpec"].pop("template"), "'template' is a required property"),
        (lambda spec: spec["headGroupSpec"]["template"]["metadata"].update(generateName="x"), "'generateName' was un"),
        (lambda spec: spec["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}), "0 is not of type 'string'"),
        (lambda spec: spec["workerGroupSpecs"][0].pop("minReplicas"), "'minReplicas' is a required property"),
        (lambda spec: spec["workerGroupSpecs"][0].update(replicas="1"), "'1' is not of type 'integer'"),
    ],
)
def test_what_kuberay_would_refuse_is_refused(spoil: Callable[[dict[str, Any]], Any], said: str) -> None:
    document = copy.deepcopy(NAMED["RayCluster", "sparta"])
    spoil(document["spec"])
    with pytest.raises(jsonschema.ValidationError, match=re.escape(said)):
        check(document)


@pytest.mark.parametrize("document", RAY)
def test_ray_is_closed_elastic_and_outlives_its_head(document: dict[str, Any]) -> None:
    spec = cluster_spec(document)
    assert spec["authOptions"]["mode"] == "token"
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert spec["gcsFaultToleranceOptions"]["redisAddress"] == "sparta-redis:6379"
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["rayVersion"] == ray.__version__
    for pod in pod_specs(document):
        assert {"name": "sparta", "persistentVolumeClaim": {"claimName": "sparta"}} in pod["volumes"]
    assert spec["autoscalerOptions"]["securityContext"]["allowPrivilegeEscalation"] is False


@pytest.mark.parametrize("document", RAY)
def test_object_store_of_every_node_fits_into_its_shared_memory(document: dict[str, Any]) -> None:
    spec = cluster_spec(document)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (shm,) = [volume["emptyDir"]["sizeLimit"] for volume in pod["volumes"] if volume["name"] == "shm"]
        memory = int(pod["containers"][0]["resources"]["limits"]["memory"].removesuffix("Gi")) * 2**30
        store = int(group["rayStartParams"].get("object-store-memory", 0.3 * memory))  # Ray's default
        assert store < int(shm.removesuffix("Gi")) * 2**30


def test_cluster_and_job_describe_the_same_cluster() -> None:
    first, second = (cluster_spec(parameter.values[0]) for parameter in RAY)
    assert first == second


def test_job_waits_for_gpus_that_are_not_there_yet_and_has_the_environment_of_every_job() -> None:
    spec = NAMED["RayJob", "sparta-demo"]["spec"]
    words = shlex.split(spec["entrypoint"])
    assert words[:3] == ["python", "-m", "pipeline.run"]
    scaling = load_config(words[3], words[4:]).scaling
    assert scaling.use_gpu is True  # "auto" takes a cluster whose GPU nodes still start for one without GPUs
    assert scaling.allow_autoscale
    assert scaling.start_timeout >= 600
    job, everyone = yaml.safe_load(spec["runtimeEnvYAML"]), yaml.safe_load((INFRA / "runtime_env.yaml").read_text())
    assert job == {"env_vars": everyone["env_vars"]}


@pytest.mark.parametrize("document", MANIFESTS)
def test_pods_run_without_privileges_and_say_what_they_need(document: dict[str, Any]) -> None:
    for pod in pod_specs(document):
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert {"cpu", "memory"} <= set(container["resources"]["requests"])
            assert "memory" in container["resources"]["limits"]
            assert ":" in container["image"]
            assert not container["image"].endswith(":latest")


def test_passwords_come_from_the_secret_alone() -> None:
    for path in (INFRA / "kubernetes").glob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        assert "kind: Secret" not in text
        # The secret `sparta` is KubeRay's: it holds the token of the cluster of that name.
        assert not re.search(r"secretName: sparta\b(?!-)|secretKeyRef: \{name: sparta\b(?!-)", text)
        for document in yaml.safe_load_all(text):
            for pod in pod_specs(document):
                for container in pod["containers"]:
                    for variable in container.get("env", []):
                        secret = any(word in variable["name"] for word in ("PASSWORD", "SECRET", "TOKEN"))
                        assert not secret or "valueFrom" in variable or variable["name"].endswith("_FILE")


def test_only_named_pods_may_reach_a_server() -> None:
    policies = [p.values[0] for p in MANIFESTS if p.values[0]["kind"] == "NetworkPolicy"]
    closed = [p for p in policies if "ingress" not in p["spec"]]
    assert [p["spec"]["podSelector"]["matchLabels"] for p in closed] == [{"app.kubernetes.io/part-of": "sparta"}]
    for policy in policies:
        assert all(rule.get("from") for rule in policy["spec"].get("ingress", []))
    services = [p.values[0] for p in MANIFESTS if p.values[0]["kind"] == "Service"]
    assert {service["spec"].get("type", "ClusterIP") for service in services} == {"ClusterIP"}


@pytest.mark.parametrize(
    "installed_by", [{"app.kubernetes.io/name": "kuberay-operator"}, {"app.kubernetes.io/name": "kuberay"}]
)
def test_the_operator_reaches_ray_however_it_was_installed(installed_by: dict[str, str]) -> None:
    """The labels of its pod: name differs between Helm's chart and kustomize, component does not."""
    labels = {**installed_by, "app.kubernetes.io/component": "kuberay-operator"}
    rules = NAMED["NetworkPolicy", "sparta-ray-among-itself"]["spec"]["ingress"]
    (rule,) = [rule for rule in rules if "namespaceSelector" in rule["from"][0]]
    assert rule["from"][0]["podSelector"]["matchLabels"].items() <= labels.items()
    assert {"port": 8265} in rule["ports"]


def test_redis_gets_its_password_from_a_file_and_the_signals_of_its_pod(tmp_path: Path) -> None:
    (container,) = next(pod_specs(NAMED["StatefulSet", "sparta-redis"]))["containers"]
    (tmp_path / "redis_password").write_text("hunter2")
    server = tmp_path / "redis-server"
    server.write_text('#!/bin/sh\necho "process $$ $*"\ncat\n')
    server.chmod(0o755)
    command = [*container["command"], container["args"][0].replace("/run/secrets", str(tmp_path))]
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    with subprocess.Popen(command, env={**os.environ, "PATH": path}, stdout=subprocess.PIPE, text=True) as shell:
        printed, _ = shell.communicate(timeout=10)
    assert printed.splitlines() == [f"process {shell.pid} -", "requirepass hunter2", "appendonly yes", "dir /data"]


def test_mlflow_answers_by_the_names_that_it_is_asked_by() -> None:
    from mlflow.server.security_utils import is_allowed_host_header, is_health_endpoint

    (container,) = next(pod_specs(NAMED["Deployment", "sparta-mlflow"]))["containers"]
    allowed = next(v["value"] for v in container["env"] if v["name"] == "MLFLOW_SERVER_ALLOWED_HOSTS").split(",")
    tracking = {v["name"]: v.get("value") for v in next(pod_specs(RAY[0].values[0]))["containers"][0]["env"]}
    for host in (str(tracking["MLFLOW_TRACKING_URI"]).removeprefix("http://"), "127.0.0.1:5000", "localhost:8000"):
        assert is_allowed_host_header(allowed, host), host
    assert not is_allowed_host_header(allowed, "elsewhere.example:5000")
    assert is_health_endpoint(container["readinessProbe"]["httpGet"]["path"])  # asked by address, which is in no list


def test_object_store_fills_its_disk_and_not_eight_volumes() -> None:
    (container,) = next(pod_specs(NAMED["StatefulSet", "sparta-store"]))["containers"]
    compose = yaml.safe_load((INFRA / "mlflow" / "compose.yaml").read_text())["services"]["store"]["command"]
    assert "-volume.max=0" in container["args"]
    assert compose == container["args"]


def test_ray_up_file_fits_rays_own_schema_as_written_and_as_ray_completes_it() -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    config = yaml.safe_load((INFRA / "cluster.yaml").read_text(encoding="utf-8"))
    jsonschema.validate(config, schema)
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    assert prepared["setup_commands"] == []  # Ray's defaults are in it: a file with node types of its own gets none
    assert prepared["max_workers"] == len(config["provider"]["worker_ips"])
    assert config["auth"]["ssh_private_key"]  # the head logs in to the workers
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**config, "misspelt": 1}, schema)
    for command in (config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]):
        assert "RAY_AUTH_MODE=token" in command
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]


def test_ray_up_starts_containers_that_docker_accepts_and_that_find_the_token() -> None:
    config = yaml.safe_load((INFRA / "cluster.yaml").read_text(encoding="utf-8"))
    docker = config["docker"]
    command = docker_start_cmds(
        config["auth"]["ssh_user"],
        docker["image"],
        {},
        docker["container_name"],
        docker["run_options"],
        config["cluster_name"],
        "/home/sparta",
        "docker",
    )
    words = shlex.split(command)
    assert [word for word in words if word.startswith("--net")] == ["--net=host"]  # given twice, docker refuses it
    options = dict(word.lstrip("-").split("=", 1) for word in words if word.startswith(("--volume=", "--env=RAY")))
    token = Path(options["env"].removeprefix("RAY_AUTH_TOKEN_PATH="))
    assert token.is_relative_to(options["volume"].partition(":")[2])
