"""The YAML file of a deployment, which `serve deploy`, `ranklet up` and `ranklet doctor` read."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ranklet.cluster.access.keys import ApiKeys
from ranklet.cluster.catalog.overrides import Overrides
from ranklet.cluster.command.absolute_paths import make_paths_absolute
from ranklet.cluster.config import AdapterList, AppArgs
from ranklet.cluster.datapath import ROUTER, SHUTDOWN_TIMEOUTS_S, is_loopback
from ranklet.cluster.settings.user_config import USER_CONFIGS, read_user_config
from ranklet.replicas.errors import RankletError
from ranklet.routing.policy import check_policy

_BUILDER = "ranklet.cluster.app:build"
SERVE_HOST = "127.0.0.1"  # Serve's default
SERVE_PORT = 8000


def read_configuration(
    path: Path, directory: Path | None = None, report: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Read a configuration, fill in the HTTP port, and make its paths absolute.

    Args:
        directory: Relative paths start here. None is the current folder.
        report: Called with each warning.

    Raises:
        ValueError: The file is not a YAML map, a setting is not accepted, or the folder of the base model is missing.
        OSError: The file cannot be read.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: expected YAML, got: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a map, as in deploy/local.yaml; got {type(content).__name__}")
    findings = [*check_router(content), *check_user_configs(content)]
    if findings:
        raise ValueError(f"{path}: {'; '.join(findings)}")
    content["http_options"] = {"port": SERVE_PORT} | (content.get("http_options") or {})
    for application in _applications(content):
        _check_arguments(path, application["args"], (directory or Path.cwd()).absolute(), report)
        make_paths_absolute(application, (directory or Path.cwd()).absolute())
    return content


def _check_arguments(path: Path, values: dict[str, Any], directory: Path, report: Callable[[str], None]) -> None:
    try:
        args = AppArgs.model_validate(values)
    except ValidationError as error:
        found = [f"args.{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        raise ValueError(f"{path}: {'; '.join(found)}") from None
    if not (directory / args.base.model_dir).is_dir():
        raise ValueError(f"{path}: base.model_dir: expected a folder, {_missing(args.base.model_dir, directory)}")
    try:  # gateways would not start
        if args.security.keys_file is not None:
            ApiKeys(directory / args.security.keys_file)
        if args.adapters_dir is not None:
            Overrides(directory / args.adapters_dir)
    except RankletError as error:
        raise ValueError(f"{path}: {error.message}") from None
    if args.adapters_dir is not None and not (directory / args.adapters_dir).is_dir():
        missing = _missing(args.adapters_dir, directory)
        report(f"warning: adapters_dir: {missing}. Until it does, no adapter is served from it")


def _missing(path: Path, directory: Path) -> str:
    return f"{path} does not exist" + ("" if path.is_absolute() else f" in {directory}")


def drain_time_s(content: Mapping[str, Any]) -> float:
    """Return how long requests in flight may take when the cluster stops."""
    times: dict[str, float] = {}
    for application in _applications(content):
        times |= SHUTDOWN_TIMEOUTS_S
        for deployment in application.get("deployments") or []:
            if (given := deployment.get("graceful_shutdown_timeout_s")) is not None:
                times[deployment.get("name", "")] = float(given)
    return max(times.values(), default=0.0)


def http_host(content: Mapping[str, Any]) -> str:
    return str((content.get("http_options") or {}).get("host") or SERVE_HOST)


def base_url(content: Mapping[str, Any]) -> str:
    """Return the URL at which this machine reaches the service."""
    host = http_host(content)
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"http://{f'[{host}]' if ':' in host else host}:{content['http_options']['port']}"


def with_open_admin(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy in which `security.open_admin` is true where HTTP listens on loopback only.

    Requests without a key may then change adapters. Applications that set `security.open_admin` keep their value.
    """
    opened = copy.deepcopy(dict(content))
    if is_loopback(http_host(content)):
        for application in _applications(opened):
            security = application["args"]["security"] = dict(application["args"].get("security") or {})
            security.setdefault("open_admin", True)
    return opened


def check_router(content: Mapping[str, Any]) -> list[str]:
    """Return one message per setting in `request_router_kwargs` that ranklet's router does not accept.

    The router itself does not raise for such a setting, because an exception there would block every request.
    """
    return [
        f"{deployment.get('name')}: request_router_kwargs: {finding}"
        for application in _applications(content)
        for deployment in application.get("deployments") or []
        for finding in _check_router_config(deployment.get("request_router_config") or {})
    ]


def check_user_configs(content: Mapping[str, Any]) -> list[str]:
    """Return one sentence per `user_config` with which its deployment would not start."""
    found = []
    for name, given in _user_configs(content):
        try:
            read_user_config(USER_CONFIGS[name], given, name)
        except ValueError as error:
            found.append(str(error))
    return found


def user_configs(content: Mapping[str, Any]) -> Iterator[tuple[str, AdapterList]]:
    """Yield the name of each deployment and its `user_config`, without those that are faulty."""
    for name, given in _user_configs(content):
        with contextlib.suppress(ValueError):
            yield name, read_user_config(USER_CONFIGS[name], given, name)


def _user_configs(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for application in _applications(content):
        for deployment in application.get("deployments") or []:
            if deployment.get("name") in USER_CONFIGS:
                yield deployment["name"], deployment.get("user_config")


def _check_router_config(config: Mapping[str, Any]) -> list[str]:
    if config.get("request_router_class", ROUTER) != ROUTER:
        return []
    settings = config.get("request_router_kwargs") or {}
    if not isinstance(settings, dict):
        return [f"expected a map, got {settings!r}"]
    return check_policy(settings)


def _applications(content: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the applications of ranklet that have arguments."""
    for application in content.get("applications") or []:
        if application.get("import_path") == _BUILDER and isinstance(application.get("args"), dict):
            yield application
