"""The manifests hold to KubeRay's schema, and the image can be built of what is there. No cluster, no Docker daemon."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from scarcade import __version__
from scarcade.jobs.cli import parsed
from tests.deploy.operator_schema import operator_schema

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


def manifest(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


def clusters() -> Iterator[Any]:
    yield manifest("raycluster.yaml")["spec"]
    yield manifest("rayjob.yaml")["spec"]["rayClusterSpec"]


def problems(schema: Any, spec: Any) -> list[str]:
    checker = jsonschema.Draft202012Validator(schema)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in checker.iter_errors(spec)]


def names(**types: Any) -> dict[str, Any]:
    """A schema of an object with these fields and no others."""
    return {"type": "object", "properties": types, "additionalProperties": False}


TEXT, WHOLE, FLAG, ANY = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}, {"type": "object"}
GROUP = {"rayStartParams": {"type": "object", "additionalProperties": TEXT}, "template": names(spec=ANY)}
CLUSTER = names(
    rayVersion=TEXT,
    authOptions=names(mode={"enum": ["token", "disabled"]}),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=names(
        version={"enum": ["v1", "v2"]}, idleTimeoutSeconds=WHOLE, securityContext=ANY, resources=ANY
    ),
    headGroupSpec=names(**GROUP),
    workerGroupSpecs={
        "type": "array",
        "items": names(groupName=TEXT, replicas=WHOLE, minReplicas=WHOLE, maxReplicas=WHOLE, **GROUP),
    },
)
JOB = names(
    entrypoint=TEXT,
    runtimeEnvYAML=TEXT,
    backoffLimit=WHOLE,
    submitterConfig=names(backoffLimit=WHOLE),
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished=WHOLE,
    activeDeadlineSeconds=WHOLE,
    rayClusterSpec=CLUSTER,
)
OURS = {"RayCluster": CLUSTER, "RayJob": JOB}
"""The fields that our manifests use, so that a slip of the pen is found where KubeRay's own schema is not at hand."""


@pytest.mark.parametrize(("name", "kind"), [("raycluster.yaml", "RayCluster"), ("rayjob.yaml", "RayJob")])
def test_fields_are_spelled_right(name: str, kind: str) -> None:
    found = manifest(name)
    assert (found["apiVersion"], found["kind"]) == ("ray.io/v1", kind)
    assert problems(OURS[kind], found["spec"]) == []


@pytest.mark.parametrize(("name", "kind"), [("raycluster.yaml", "RayCluster"), ("rayjob.yaml", "RayJob")])
def test_the_operator_takes_it(name: str, kind: str) -> None:
    assert problems(operator_schema(kind), manifest(name)["spec"]) == []


@pytest.mark.parametrize(
    ("where", "key", "value"),
    [
        ((), "authOption", {"mode": "token"}),
        (("authOptions",), "mode", "tokens"),
        (("workerGroupSpecs", 0), "minReplicas", "none"),
    ],
)
def test_a_slip_of_the_pen_is_found(where: tuple[Any, ...], key: str, value: Any) -> None:
    spec = manifest("raycluster.yaml")["spec"]
    place = spec
    for part in where:
        place = place[part]
    place[key] = value
    assert problems(CLUSTER, spec)


def test_the_operator_finds_a_slip_in_a_pod() -> None:
    schema = operator_schema("RayCluster")
    for where, key, value in [((), "volumeMount", []), (("securityContext",), "readonly", True)]:
        spec = manifest("raycluster.yaml")["spec"]
        place = spec["headGroupSpec"]["template"]["spec"]["containers"][0]
        for part in where:
            place = place[part]
        place[key] = value
        assert problems(schema, spec), key


def test_a_token_is_asked_for_and_nodes_come_and_go() -> None:
    for spec in clusters():
        assert spec["authOptions"] == {"mode": "token"}
        assert spec["rayVersion"] == PINS["ray"]
        assert spec["enableInTreeAutoscaling"]
        groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
        assert set(groups) == {"cpu", "gpu"}
        assert all(group["minReplicas"] == 0 < group["maxReplicas"] for group in groups.values())


def test_nobody_is_root_and_nothing_is_written_but_where_it_may() -> None:
    for spec in clusters():
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            pod = group["template"]["spec"]
            assert pod["securityContext"]["runAsNonRoot"]
            (container,) = pod["containers"]
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            assert container["securityContext"]["readOnlyRootFilesystem"]
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            assert mounted == {volume["name"] for volume in pod["volumes"]}
            gpu = "nvidia.com/gpu" in container["resources"]["limits"]
            assert container["image"] == f"REGISTRY/scarcade:{__version__}{'-gpu' if gpu else ''}"
            claims = [v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
            assert claims == [manifest("storage.yaml")["metadata"]["name"]]


def test_no_secret_stands_in_a_manifest() -> None:
    for path in DEPLOY.glob("*.yaml"):
        assert not re.search(
            r"(?i)(token|secret|password|access_key\w*)\w*: *['\"]?[A-Za-z0-9/+]{16,}", path.read_text()
        )


def test_the_job_runs_a_command_that_exists_and_is_resumed() -> None:
    spec = manifest("rayjob.yaml")["spec"]
    program, *argv = shlex.split(spec["entrypoint"])
    assert program == "scarcade"
    _, bound, _ = parsed(argv)
    assert str(bound.arguments["out"]).startswith("/shared/")
    assert bound.arguments["sections"].tree["scale"]["min_workers"] == "2"
    assert spec["shutdownAfterJobFinishes"]
    assert spec["backoffLimit"] > 0
    workers = next(group for group in spec["rayClusterSpec"]["workerGroupSpecs"] if group["groupName"] == "cpu")
    (container,) = workers["template"]["spec"]["containers"]
    assert int(container["resources"]["limits"]["cpu"]) >= int(argv[argv.index("--threads") + 1])
    assert workers["maxReplicas"] >= int(argv[argv.index("--workers") + 1])


def test_the_policy_lets_in_ray_and_its_operator_alone() -> None:
    spec = manifest("networkpolicy.yaml")["spec"]
    assert spec["policyTypes"] == ["Ingress"]
    nodes, operator = spec["ingress"]
    assert nodes["from"] == [{"podSelector": spec["podSelector"]}]
    assert operator["ports"] == [{"port": 8265, "protocol": "TCP"}]


# the image


def instructions() -> list[tuple[str, str]]:
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def test_what_the_image_copies_is_there_and_let_through() -> None:
    let = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = set()
    for name, rest in instructions():
        if name == "COPY" and not rest.startswith("--from"):
            *sources, _ = rest.split()
            copied |= {source.removeprefix("./") for source in sources}
    assert copied == let
    for source in copied:
        assert (ROOT / source).exists(), source
    links = {path.name for path in (ROOT / "scarcade").iterdir() if path.is_symlink()}
    assert links <= copied  # what the package's links lead to


def test_the_image_is_pinned_small_and_not_root() -> None:
    found = instructions()
    stages = [rest.split()[0] for name, rest in found if name == "FROM"]
    assert stages == ["python:${PYTHON}-slim"] * 2
    assert ("ARG", "PYTHON=3.11") in found
    assert ("ARG", f"TORCH={PINS['torch']}") in found
    installs = [rest for name, rest in found if name == "RUN" and "pip install" in rest]
    assert len(installs) == 2
    assert all("--constraint constraints.txt" in one for one in installs)
    last = max(i for i, (name, _) in enumerate(found) if name == "FROM")
    users = [rest for name, rest in found[last:] if name == "USER"]
    assert users == ["1000"]
    extras = dict(rest.split("=", 1) for name, rest in found if name == "ARG" and "=" in rest)["EXTRAS"].split(",")
    project = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras)
    apt = next(rest for _, rest in found if "apt-get install" in rest)
    assert "--no-install-recommends" in apt
    assert "rm -rf /var/lib/apt/lists" in apt
