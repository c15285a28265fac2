"""The files in deploy/ pass their linters and schemas, and the Dockerfile's steps work."""

import configparser
import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from ranklet.cluster.command.deployment_file import drain_time_s
from ranklet.cluster.config import AppArgs
from ranklet.cluster.datapath import SHUTDOWN_TIMEOUTS_S
from tests.deploy.kuberay import RAY_SERVICE
from tests.needs import needs

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = "1.33"


def dockerfile() -> list[tuple[str, str]]:
    """Return its instructions, with continued lines joined."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines) if word]


def test_the_dockerfile_passes_its_linter() -> None:
    linter = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([linter, DEPLOY / "Dockerfile"], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout


def test_the_dockerfiles_steps_install_a_working_package(tmp_path: Path) -> None:
    """Run its COPY and pip steps in an empty folder and a new environment with this environment's dependencies."""
    image, home = tmp_path / "image", tmp_path / "home"
    image.mkdir()
    home.mkdir()
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for word, rest in dockerfile():
        if word == "COPY":
            *sources, target = rest.split()
            assert set(sources) <= allowed, ".dockerignore excludes a source from the build"
            for source in sources:
                into = image / target if (ROOT / source).is_dir() else image
                subprocess.run(["cp", "-r", ROOT / source, into], check=True)
    (install,) = [rest for word, rest in dockerfile() if word == "RUN" and rest.startswith("pip install")]
    venv.create(tmp_path / "env")  # PYTHONPATH has pip
    binaries = tmp_path / "env" / "bin"
    environment = {
        **os.environ, "PATH": f"{binaries}:{os.environ['PATH']}", "PYTHONPATH": sysconfig.get_path("purelib"),
        "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0",
    }  # fmt: skip
    subprocess.run(f"exec python -m {install}", shell=True, cwd=image, env=environment, check=True, timeout=200)
    (command,) = [yaml.safe_load(rest) for word, rest in dockerfile() if word == "CMD"]
    installed = binaries / command[0]
    assert installed.exists()
    assert (image / command[2].removeprefix("/opt/ranklet/")).exists()
    where = "import ranklet.cluster.app, ranklet.replicas.engine.engine; print(ranklet.cluster.app.__file__)"
    imported = subprocess.run(
        [binaries / "python", "-c", where], cwd=home, env=environment, capture_output=True, text=True, check=True
    )
    assert imported.stdout.startswith(str(tmp_path / "env"))
    shown = subprocess.run([installed, *command[1:], "--help"], cwd=home, env=environment, capture_output=True)
    assert shown.returncode == 0


def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "kuberay.yaml").read_text()))


def manifest() -> dict[str, Any]:
    return documents()[0]


def pod_templates() -> list[dict[str, Any]]:
    cluster = manifest()["spec"]["rayClusterConfig"]
    return [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_the_manifest_is_a_ray_service() -> None:
    jsonschema.validate(manifest(), RAY_SERVICE)
    for template in pod_templates():
        pod = {"apiVersion": "v1", "kind": "Pod", "spec": template["spec"]}
        pod["metadata"] = {"name": "pod", **template["metadata"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
        mounted = {mount["name"] for each in pod["spec"]["containers"] for mount in each["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["spec"]["volumes"]}


def image_environment() -> dict[str, str]:
    (variables,) = [rest for word, rest in dockerfile() if word == "ENV"]
    return dict(variable.split("=") for variable in variables.split())


def test_ray_in_the_image_does_not_start_without_a_token(tmp_path: Path) -> None:
    """Without a token, Ray unpickles what anyone sends, which runs code."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--temp-dir={tmp_path}"]
    done = subprocess.run(
        command, env=environment | image_environment() | {"HOME": str(tmp_path)},
        capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert done.returncode != 0
    assert "no authentication token was found" in done.stdout + done.stderr


def test_the_manifest_turns_rays_token_on() -> None:
    assert manifest()["spec"]["rayClusterConfig"]["authOptions"] == {"mode": "token"}
    for template in pod_templates():
        for container in template["spec"]["containers"]:
            assert {"name": "RAY_AUTH_MODE", "value": "token"} in container["env"]


def test_only_the_pods_of_ranklet_reach_rays_ports() -> None:
    _, policy = documents()
    kubernetes_validate.validate(policy, KUBERNETES, strict=True)
    spec = policy["spec"]
    assert spec["policyTypes"] == ["Ingress"]
    for template in pod_templates():
        assert spec["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    http = yaml.safe_load(manifest()["spec"]["serveConfigV2"])["http_options"]
    from_anyone = [rule for rule in spec["ingress"] if "from" not in rule]
    assert from_anyone == [{"ports": [{"protocol": "TCP", "port": http["port"]}]}]
    on_all_ports = [rule for rule in spec["ingress"] if "ports" not in rule]
    assert on_all_ports == [{"from": [{"podSelector": spec["podSelector"]}]}]


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("spec", "serveConfigV2"), {"applications": []}),
        (("spec", "rayClusterConfig", "workers"), []),
        (("spec", "rayClusterConfig", "authOptions", "mode"), "basic"),
    ],
)
def test_an_invalid_manifest_is_rejected(where: tuple[str, ...], value: Any) -> None:
    content = manifest()
    inner = content
    for name in where[:-1]:
        inner = inner[name]
    inner[where[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, RAY_SERVICE)


def repeated_keys(node: Any) -> list[str]:
    """Return the keys that a mapping in the YAML node has twice. PyYAML keeps only the last one."""
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value]
        return [key for key in set(keys) if keys.count(key) > 1] + [
            found for _, value in node.value for found in repeated_keys(value)
        ]
    children = node.value if isinstance(node, yaml.SequenceNode) else []
    return [found for child in children for found in repeated_keys(child)]


@pytest.mark.parametrize("name", ["config.yaml", "local.yaml", "kuberay.yaml"])
def test_ray_and_ranklet_accept_each_configuration(name: str) -> None:
    content = manifest()["spec"]["serveConfigV2"] if name == "kuberay.yaml" else (DEPLOY / name).read_text()
    assert repeated_keys(yaml.compose(content)) == []
    parsed = ServeDeploySchema.model_validate(yaml.safe_load(content))
    (application,) = parsed.applications
    AppArgs.model_validate(application.args)


def test_the_manifest_requests_enough_cpus_and_gpus() -> None:
    """Otherwise Ray would leave replicas pending, without an error."""
    spec = manifest()["spec"]
    (application,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    cluster = spec["rayClusterConfig"]
    (workers,) = cluster["workerGroupSpecs"]

    def limits(group: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        return found

    cpus = int(limits(cluster["headGroupSpec"])["cpu"]) + workers["replicas"] * int(limits(workers)["cpu"])
    gpus = workers["replicas"] * int(limits(workers)["nvidia.com/gpu"])
    asked = [(each["num_replicas"], each["ray_actor_options"]) for each in application["deployments"]]
    assert sum(count * options["num_cpus"] for count, options in asked) <= cpus
    assert sum(count * options.get("num_gpus", 0) for count, options in asked) == gpus


@needs("systemd-analyze")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    program = Path(sys.executable).parent / "ranklet"
    unit = tmp_path / "ranklet.service"
    unit.write_text((DEPLOY / "ranklet.service").read_text().replace("/opt/ranklet/bin/ranklet", str(program)))
    command = ["systemd-analyze", "verify", "--man=no", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_unit_gives_a_stop_the_time_to_drain() -> None:
    """`ranklet up` gets SIGTERM first, drains as long as the gateways do, and then ends Ray."""
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(DEPLOY / "ranklet.service")
    service = unit["Service"]
    assert (service["KillMode"], "ExecStop" in service, "KillSignal" in service) == ("mixed", False, False)
    start_s = int(re.findall(r"--timeout-s (\d+)", service["ExecStart"])[0])
    drains_s = [drain_time_s(yaml.safe_load((DEPLOY / f"{name}.yaml").read_text())) for name in ("config", "local")]
    assert max(drains_s) == SHUTDOWN_TIMEOUTS_S["Gateway"]
    assert int(service["TimeoutStopSec"]) >= max(drains_s) + 30
    assert int(service["TimeoutStartSec"]) > start_s
