"""The Ray actor that remembers the last good contents of an application's settings.

A process that starts while a bad content is there, such as the replacement of a gateway that died, goes on with the
last good one. The actor outlives all processes of the application.
"""

import contextlib
import logging
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray.exceptions import RayError

_NAMESPACE = "ranklet"
_TIMEOUT_S = 5.0
_REPEAT_S = 3.0
# Nodes of replicas come and go; the node of the GCS stays. Ray starts the actor again if its process dies.
_OPTIONS = {
    "namespace": _NAMESPACE, "get_if_exists": True, "lifetime": "detached", "max_restarts": -1, "num_cpus": 0,
    "resources": {"node:__internal_head__": 0.001},
}  # fmt: skip

logger = logging.getLogger("ray.serve")


class KeptContents:
    """The actor's class: contents by deployment and setting."""

    def __init__(self) -> None:
        self._contents: dict[tuple[str, str], object] = {}

    def keep(self, deployment: str, name: str, content: object) -> None:
        self._contents[deployment, name] = content

    def restore(self, deployment: str, contents: Mapping[str, object]) -> None:
        """Keep those contents that an actor which has just started does not have."""
        for name, content in contents.items():
            self._contents.setdefault((deployment, name), content)

    def last(self, deployment: str, name: str) -> object:
        return self._contents.get((deployment, name))


class KeeperActor:
    """Client of the actor for the processes of one deployment.

    The actor may lose what it remembers, so each process repeats its contents every three seconds, see `repeat`.
    """

    def __init__(self, application: str, deployment: str) -> None:
        self._name = f"settings-{application}"
        self._deployment = deployment
        self._contents: dict[str, object] = {}
        self._actor: Any = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="settings-keeper")  # Ray's calls block an event loop
        self._repeated_s = time.monotonic()

    def keep(self, name: str, content: object) -> None:
        self._contents[name] = content
        self._thread.submit(self._keep, name, content)

    def repeat(self) -> None:
        now_s = time.monotonic()
        if self._contents and now_s >= self._repeated_s + _REPEAT_S:
            self._repeated_s = now_s
            self._thread.submit(self._restore, dict(self._contents))

    def _restore(self, contents: dict[str, object]) -> None:
        with contextlib.suppress(RayError):  # the next repetition tries again
            self._call("restore", contents)

    def _keep(self, name: str, content: object) -> None:
        try:
            self._call("keep", name, content)
        except RayError as error:
            logger.warning("%s: its content is not remembered yet: %s", name, type(error).__name__)

    def _call(self, method: str, *arguments: object) -> None:
        if self._actor is None:
            self._actor = ray.remote(KeptContents).options(name=self._name, **_OPTIONS).remote()
        try:
            ray.get(getattr(self._actor, method).remote(self._deployment, *arguments), timeout=_TIMEOUT_S)
        except RayError:
            self._actor = None
            raise

    def last(self, name: str) -> Any:
        content = self._thread.submit(self._last, name).result()
        if content is not None:
            self._contents[name] = content
        return content

    def _last(self, name: str) -> Any:
        try:
            actor = ray.get_actor(self._name, namespace=_NAMESPACE)
            return ray.get(actor.last.remote(self._deployment, name), timeout=_TIMEOUT_S)
        except (ValueError, RayError):  # ValueError: there is no such actor
            return None
