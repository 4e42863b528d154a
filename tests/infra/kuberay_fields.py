"""What KubeRay's custom resources may hold.

No package carries KubeRay's schema, so this is our own, after the API reference of KubeRay 1.7 (docs.ray.io, "KubeRay
CRD API reference"): the fields that a RayCluster and a RayJob know, their types, and which must be there; left out are
those that we would not want (options of an Ingress, a Service of one's own). Fields of a type of Kubernetes are checked
by its schema.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

SCALARS: dict[str, tuple[type, ...]] = {"string": (str,), "boolean": (bool,), "integer": (int,), "number": (int, float)}

# `map` is text to text; [X] a list of X; "a|b" one of these words; a capital another type here, `k8s:` one of
# Kubernetes; ! has to be there.
TYPES: dict[str, dict[str, str]] = {
    "RayClusterSpec": {
        "upgradeStrategy": "RayClusterUpgradeStrategy",
        "authOptions": "AuthOptions",
        "suspend": "boolean",
        "managedBy": "string",
        "autoscalerOptions": "AutoscalerOptions",
        "headServiceAnnotations": "map",
        "enableInTreeAutoscaling": "boolean",
        "headGroupSpec": "HeadGroupSpec!",
        "rayVersion": "string",
        "workerGroupSpecs": "[WorkerGroupSpec]",
    },
    "RayClusterUpgradeStrategy": {"type": "Recreate|None"},
    "AuthOptions": {"enableK8sTokenAuth": "boolean", "secretName": "string", "mode": "disabled|token"},
    "AutoscalerOptions": {
        "resources": "k8s:resources",
        "image": "string",
        "imagePullPolicy": "Always|IfNotPresent|Never",
        "securityContext": "k8s:securityContext",
        "idleTimeoutSeconds": "integer",
        "upscalingMode": "Default|Aggressive|Conservative",
        "version": "v1|v2",
        "env": "k8s:env",
        "envFrom": "k8s:envFrom",
        "volumeMounts": "k8s:volumeMounts",
    },
    "HeadGroupSpec": {
        "template": "k8s:template!",
        "enableIngress": "boolean",
        "resources": "map",
        "labels": "map",
        "rayStartParams": "map",
        "serviceType": "ClusterIP|NodePort|LoadBalancer|ExternalName",
    },
    "WorkerGroupSpec": {
        "groupName": "string!",
        "replicas": "integer",
        "minReplicas": "integer!",
        "maxReplicas": "integer!",
        "idleTimeoutSeconds": "integer",
        "priority": "integer",
        "resources": "map",
        "labels": "map",
        "rayStartParams": "map",
        "template": "k8s:template!",
        "numOfHosts": "integer",
    },
    "RayJobSpec": {
        "activeDeadlineSeconds": "integer",
        "backoffLimit": "integer",
        "rayClusterSpec": "RayClusterSpec",
        "submitterPodTemplate": "k8s:template",
        "metadata": "map",
        "clusterSelector": "map",
        "submitterConfig": "SubmitterConfig",
        "managedBy": "string",
        "entrypoint": "string",
        "runtimeEnvYAML": "string",
        "jobId": "string",
        "submissionMode": "K8sJobMode|HTTPMode|InteractiveMode|SidecarMode",
        "entrypointResources": "string",
        "entrypointNumCpus": "number",
        "entrypointNumGpus": "number",
        "ttlSecondsAfterFinished": "integer",
        "preRunningDeadlineSeconds": "integer",
        "shutdownAfterJobFinishes": "boolean",
        "suspend": "boolean",
    },
    "SubmitterConfig": {"backoffLimit": "integer"},
}

Check = Callable[[str, Any], None]


def faults(kind: str, value: Any, kubernetes: Check, path: str = "spec") -> Iterator[str]:
    """What is wrong with a value of one of `TYPES`; `kubernetes(field, value)` raises for wrong parts of Kubernetes."""
    fields = TYPES[kind]
    if not isinstance(value, dict):
        yield f"{path} is no {kind}"
        return
    yield from (f"{path}.{name} is no field of a {kind}" for name in value if name not in fields)
    yield from (
        f"{path}.{name} is missing" for name, is_a in fields.items() if is_a.endswith("!") and name not in value
    )
    for name, is_a in fields.items():
        if name in value:
            yield from _faults(is_a.rstrip("!"), value[name], kubernetes, f"{path}.{name}")


def _faults(is_a: str, value: Any, kubernetes: Check, path: str) -> Iterator[str]:
    if is_a.startswith("k8s:"):
        try:
            kubernetes(is_a.removeprefix("k8s:"), value)
        except Exception as error:  # noqa: BLE001 whatever the validator raises is a fault of the file
            yield f"{path}: {str(error).splitlines()[0]}"
    elif is_a.startswith("["):
        for at, item in enumerate(value):
            yield from faults(is_a[1:-1], item, kubernetes, f"{path}[{at}]")
    elif is_a in TYPES:
        yield from faults(is_a, value, kubernetes, path)
    elif is_a == "map":
        wrong = not isinstance(value, dict) or any(not isinstance(item, str) for item in value.values())
        yield from [f"{path} is not text to text"] if wrong else []
    elif is_a in SCALARS:
        right = isinstance(value, SCALARS[is_a]) and (is_a == "boolean" or not isinstance(value, bool))
        yield from [] if right else [f"{path} is {value!r}, no {is_a}"]
    elif value not in is_a.split("|"):
        yield f"{path} is {value!r}, none of {is_a}"
