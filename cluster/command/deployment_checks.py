"""Checks of a deployment's file: its form, router, `user_config`, paths and HTTP port, and Ray's token."""

import difflib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ranklet.cluster.access.keys import ApiKeys
from ranklet.cluster.catalog.folders import FolderScanner
from ranklet.cluster.catalog.overrides import Overrides
from ranklet.cluster.catalog.registry import Registry
from ranklet.cluster.command.deployment_file import (
    SERVE_PORT,
    check_router,
    check_user_configs,
    http_host,
    user_configs,
)
from ranklet.cluster.command.finding import Finding
from ranklet.cluster.command.machine_checks import check_port, resources_here
from ranklet.cluster.command.requirements import missing_resources
from ranklet.cluster.command.token_check import check_manifest_token, check_token
from ranklet.cluster.config import AppArgs
from ranklet.cluster.settings.user_config import USER_CONFIGS, describe_errors
from ranklet.replicas.errors import RankletError


def check_deployment(path: Path, *, ray_start: bool) -> Iterator[Finding]:
    """Check a file for `ranklet up` or `serve deploy`, or a KubeRay manifest. Paths in a manifest are not checked.

    Args:
        ray_start: Whether Ray is started by hand, perhaps on several machines.
    """
    try:
        content, cluster = _read(path)
        args = AppArgs.model_validate(content["applications"][0]["args"])
    except OSError as error:
        yield Finding("fail", str(path), str(error), "name the file of the deployment")
    except (yaml.YAMLError, KeyError, IndexError, TypeError, AttributeError) as error:
        yield Finding("fail", str(path), f"{type(error).__name__}: {error}", "compare it with deploy/config.yaml")
    except ValidationError as error:
        for each in error.errors():
            where = ".".join(map(str, each["loc"]))
            yield Finding("fail", f"args.{where}", each["msg"], "correct it in the file")
    else:
        yield from _check_form(path, content)
        yield from (Finding("fail", "router", each, "correct it in the file") for each in check_router(content))
        yield from (Finding("fail", "user_config", each, "correct it") for each in check_user_configs(content))
        yield from _check_cluster(content, cluster, args, ray_start=ray_start)
        if cluster is None:
            yield from _check_paths(args)
            yield from _check_user_folders(content, args)


def _check_form(path: Path, content: dict[str, Any]) -> Iterator[Finding]:
    from ray.serve.schema import DeploymentSchema, ServeApplicationSchema, ServeDeploySchema  # takes seconds to import

    application = content["applications"][0]
    deployments = application.get("deployments") or []
    yield from _check_keys("file", content, ServeDeploySchema.model_fields)
    yield from _check_keys("application", application, ServeApplicationSchema.model_fields)
    for each in deployments:
        yield from _check_keys(str(each.get("name")), each, DeploymentSchema.model_fields)
    faults = []
    try:
        ServeDeploySchema.model_validate(content)
    except ValidationError as error:
        faults += [f"Ray Serve: {fault}" for fault in describe_errors(error)]
    names = [each.get("name") for each in deployments]
    faults += [
        f"deployments: expected {' or '.join(USER_CONFIGS)}, got {name!r}" for name in names if name not in USER_CONFIGS
    ]
    if faults:
        yield from (Finding("fail", str(path), fault, "correct it in the file") for fault in faults)
    else:
        yield Finding("ok", str(path), "valid")


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return Serve's configuration, and `rayClusterConfig` if the file is a KubeRay manifest."""
    documents = list(yaml.safe_load_all(path.read_text()))
    for document in documents:
        if document.get("kind") == "RayService":
            return yaml.safe_load(document["spec"]["serveConfigV2"]), document["spec"]["rayClusterConfig"]
    return documents[0], None


def _check_cluster(
    content: dict[str, Any], cluster: dict[str, Any] | None, args: AppArgs, *, ray_start: bool
) -> Iterator[Finding]:
    if cluster is not None:
        yield check_manifest_token(cluster)
        return
    if ray_start:
        yield check_token(http_host(content), open_ray=args.security.open_ray)
    else:
        yield Finding("ok", "Ray's token", "`ranklet up` makes one")
    yield check_port(int((content.get("http_options") or {}).get("port", SERVE_PORT)), "HTTP")
    if not ray_start:
        missing = missing_resources(content, resources_here())
        yield from (
            Finding("fail", "CPUs and GPUs", each, "edit the file, or add machines to a Ray cluster")
            for each in missing
        )


def _check_paths(args: AppArgs) -> Iterator[Finding]:
    checks: dict[str, Callable[[], str]] = {
        "base.model_dir": lambda: _describe_model(args.base.model_dir),
        "adapters_dir": lambda: _describe_adapters(args),
        "adapters_dir/.ranklet": lambda: _describe_overrides(args.adapters_dir),
        "security.keys_file": lambda: _describe_keys(args.security.keys_file),
    }
    read_only = _is_read_only(args.adapters_dir)
    for subject, describe in checks.items():
        try:
            value = describe()
            if subject == "adapters_dir" and read_only:
                remedy = "fine if adapters are only added from outside; else let the service's user write to it"
                yield Finding("warn", subject, f"{value}; read-only, so none can be loaded or unloaded by name", remedy)
            else:
                yield Finding("ok", subject, value)
        except (OSError, ValueError, RankletError) as error:
            message = error.message if isinstance(error, RankletError) else str(error)
            yield Finding("fail", subject, message, "correct the path or the file; it must be valid on every node")


def _check_keys(where: str, given: dict[str, Any], known: Iterable[str]) -> Iterator[Finding]:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            value = "Ray Serve ignores it" + (f"; did you mean {near[0]!r}?" if near else "")
            yield Finding("warn", f"{key!r} of the {where}", value, "correct or remove it in the file")


def _check_user_folders(content: dict[str, Any], args: AppArgs) -> Iterator[Finding]:
    """A wrong folder in a `user_config` refuses the requests for its adapter only."""
    for deployment, config in user_configs(content):
        registry = Registry(None, {}, args.base_names)
        registry.set_user_config({name: path.absolute() for name, path in config.adapters.items()})
        for name in config.adapters:
            try:
                registry.locate(name)
            except RankletError as error:
                yield Finding("warn", f"user_config of the {deployment}", error.message, "correct the path or the name")


def _is_read_only(folder: Path | None) -> bool:
    return folder is not None and folder.is_dir() and not os.access(folder, os.W_OK)


def _describe_model(folder: Path) -> str:
    # imports transformers, which takes seconds
    from ranklet.replicas.model.architecture import read_architecture, read_config

    return f"{folder}: {read_architecture(read_config(folder)).layers} layers"


def _describe_adapters(args: AppArgs) -> str:
    if args.adapters_dir is None:
        return f"none; {len(args.adapters)} by name"
    if not args.adapters_dir.is_dir():
        raise ValueError(f"expected a folder, {args.adapters_dir} does not exist")
    # without the file of overrides, which is a subject of its own
    found = set(Registry(None, args.adapters).names()) | FolderScanner(args.adapters_dir).scan().adapters.keys()
    return f"{args.adapters_dir}: {len(found)} adapters"


def _describe_overrides(adapters_dir: Path | None) -> str:
    if adapters_dir is None or not adapters_dir.is_dir():
        return "none"
    return f"{len(Overrides(adapters_dir).entries())} adapters loaded or unloaded by name"


def _describe_keys(path: Path | None) -> str:
    ApiKeys(path)
    return str(path) if path else "none: every client may request embeddings"
