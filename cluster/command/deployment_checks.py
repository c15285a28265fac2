"""Checks of a deployment's file: its form, its router settings, its paths, its HTTP port, and Ray's token."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ranklet.cluster.access.keys import ApiKeys
from ranklet.cluster.catalog.registry import Registry
from ranklet.cluster.command.deployment_file import SERVE_PORT, check_router, http_host
from ranklet.cluster.command.finding import Finding
from ranklet.cluster.command.machine_checks import check_port
from ranklet.cluster.command.token_check import check_manifest_token, check_token
from ranklet.cluster.config import AppArgs
from ranklet.replicas.errors import RankletError


def check_deployment(path: Path) -> Iterator[Finding]:
    """Check a file for `serve deploy`, or a KubeRay manifest. The paths in a manifest are not checked."""
    try:
        content, cluster = _read(path)
        args = AppArgs.model_validate(content["applications"][0]["args"])
    except OSError as error:
        yield Finding("fail", str(path), str(error), "name the file that `serve deploy` receives")
    except (yaml.YAMLError, KeyError, IndexError, TypeError, AttributeError) as error:
        yield Finding("fail", str(path), f"{type(error).__name__}: {error}", "compare it with deploy/config.yaml")
    except ValidationError as error:
        for each in error.errors():
            where = ".".join(map(str, each["loc"]))
            yield Finding("fail", f"args.{where}", each["msg"], "correct it in the file")
    else:
        yield Finding("ok", str(path), "valid")
        yield from (Finding("fail", "router", each, "correct it in the file") for each in check_router(content))
        yield from _check_cluster(content, cluster)
        if cluster is None:
            yield from _check_paths(args)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return Serve's configuration, and `rayClusterConfig` if the file is a KubeRay manifest."""
    documents = list(yaml.safe_load_all(path.read_text()))
    for document in documents:
        if document.get("kind") == "RayService":
            return yaml.safe_load(document["spec"]["serveConfigV2"]), document["spec"]["rayClusterConfig"]
    return documents[0], None


def _check_cluster(content: dict[str, Any], cluster: dict[str, Any] | None) -> Iterator[Finding]:
    if cluster is not None:
        yield check_manifest_token(cluster)
        return
    yield check_token(http_host(content))
    yield check_port(int((content.get("http_options") or {}).get("port", SERVE_PORT)), "HTTP")


def _check_paths(args: AppArgs) -> Iterator[Finding]:
    checks: dict[str, Callable[[], str]] = {
        "base.model_dir": lambda: _describe_model(args.base.model_dir),
        "adapters_dir": lambda: _describe_adapters(args),
        "security.keys_file": lambda: _describe_keys(args.security.keys_file),
    }
    for subject, describe in checks.items():
        try:
            yield Finding("ok", subject, describe())
        except (OSError, ValueError, RankletError) as error:
            message = error.message if isinstance(error, RankletError) else str(error)
            yield Finding("fail", subject, message, "correct the path; it must be valid on every node")


def _describe_model(folder: Path) -> str:
    # imports transformers, which takes seconds
    from ranklet.replicas.model.architecture import read_architecture, read_config

    return f"{folder}: {read_architecture(read_config(folder)).layers} layers"


def _describe_adapters(args: AppArgs) -> str:
    if args.adapters_dir is None:
        return f"none; {len(args.adapters)} by name"
    if not args.adapters_dir.is_dir():
        raise ValueError(f"expected a folder, {args.adapters_dir} does not exist")
    if not os.access(args.adapters_dir, os.W_OK):
        raise ValueError(f"{args.adapters_dir} is not writable, so no adapter can be loaded by name")
    return f"{args.adapters_dir}: {len(Registry(args.adapters_dir, args.adapters).names())} adapters"


def _describe_keys(path: Path | None) -> str:
    ApiKeys(path)
    return str(path) if path else "none: every client may request embeddings"
