"""Cluster files: each against the strict schema of whoever will read it, and against what we promise of it."""

import copy
import functools
import json
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

INFRA = Path(__file__).parents[2] / "infra"
SCHEMAS = files("kubernetes_validate") / "kubernetes-json-schema" / "v1.37.0-local-strict"
MANIFESTS = [
    pytest.param(document, id=f"{path.stem}-{document['kind']}-{document['metadata']['name']}")
    for path in sorted((INFRA / "kubernetes").glob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text(encoding="utf-8"))
]
RAY = [parameter for parameter in MANIFESTS if parameter.values[0]["apiVersion"] == "ray.io/v1"]


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


def test_cluster_and_job_describe_the_same_cluster() -> None:
    first, second = (cluster_spec(parameter.values[0]) for parameter in RAY)
    assert first == second


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


def test_ray_up_file_fits_rays_own_schema() -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    config = yaml.safe_load((INFRA / "cluster.yaml").read_text(encoding="utf-8"))
    jsonschema.validate(config, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**config, "misspelt": 1}, schema)
    for command in (config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]):
        assert "RAY_AUTH_MODE=token" in command
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
