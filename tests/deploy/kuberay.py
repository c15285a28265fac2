"""A JSON schema of KubeRay's RayService (ray.io/v1), without the parts that Kubernetes itself defines.

Field names and types are those of ray-operator/apis/ray/v1 in ray-project/kuberay. Kubernetes' own schema checks pods.
The API server drops fields that are not in KubeRay's schema, without an error.
"""

from typing import Any


def _closed(required: tuple[str, ...] = (), **fields: Any) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


_TEXT, _FLAG, _COUNT, _OBJECT = {"type": "string"}, {"type": "boolean"}, {"type": "integer"}, {"type": "object"}
_TEXTS = {"type": "object", "additionalProperties": _TEXT}
_LIST = {"type": "array", "items": _TEXT}

_HEAD = _closed(
    ("rayStartParams", "template"),
    serviceType=_TEXT, headService=_OBJECT, enableIngress=_FLAG, rayStartParams=_TEXTS, template=_OBJECT,
)  # fmt: skip
_WORKERS = _closed(
    ("groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"),
    groupName=_TEXT, replicas=_COUNT, minReplicas=_COUNT, maxReplicas=_COUNT, numOfHosts=_COUNT,
    rayStartParams=_TEXTS, template=_OBJECT,
    scaleStrategy=_closed(workersToDelete=_LIST, multihostReplicasToDelete=_LIST),
)  # fmt: skip
_CLUSTER = _closed(
    ("headGroupSpec",),
    headGroupSpec=_HEAD, workerGroupSpecs={"type": "array", "items": _WORKERS}, rayVersion=_TEXT,
    authOptions=_closed(("mode",), mode={"enum": ["token", "disabled"]}, secretName=_TEXT, enableK8sTokenAuth=_FLAG),
    enableInTreeAutoscaling=_FLAG, autoscalerOptions=_OBJECT, headServiceAnnotations=_TEXTS, suspend=_FLAG,
)  # fmt: skip
RAY_SERVICE = _closed(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "ray.io/v1"}, kind={"const": "RayService"}, metadata=_OBJECT,
    spec=_closed(
        serveConfigV2=_TEXT, rayClusterConfig=_CLUSTER, serveService=_OBJECT, rayClusterDeletionDelaySeconds=_COUNT
    ),
)  # fmt: skip
