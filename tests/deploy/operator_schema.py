"""KubeRay's own schema of RayCluster and RayJob, where a copy of it lies on this machine.

git clone --branch v1.5.1 https://github.com/ray-project/kuberay
KUBERAY_CRDS=kuberay/ray-operator/config/crd/bases pytest tests/deploy
"""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml


def closed(schema: Any) -> Any:
    """The schema as JSON Schema, and closed: Kubernetes drops a field that it does not know without a word."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    found = {key: value for key, value in schema.items() if key in ("type", "enum", "minimum", "required", "pattern")}
    if isinstance(schema.get("properties"), dict):
        found["properties"] = {name: closed(inner) for name, inner in schema["properties"].items()}
        found["additionalProperties"] = False
    elif isinstance(schema.get("additionalProperties"), dict):
        found["additionalProperties"] = closed(schema["additionalProperties"])
    if "items" in schema:
        found["items"] = closed(schema["items"])
    return found


def operator_schema(kind: str) -> Any:
    """The schema of ``spec``; skips the test where there is none."""
    folder = os.environ.get("KUBERAY_CRDS")
    if folder is None:
        pytest.skip("needs KUBERAY_CRDS, the folder of KubeRay's custom resource definitions")
    whole = yaml.safe_load((Path(folder) / f"ray.io_{kind.lower()}s.yaml").read_text())
    (version,) = [one for one in whole["spec"]["versions"] if one["name"] == "v1"]
    return closed(version["schema"]["openAPIV3Schema"]["properties"]["spec"])
