"""The Ray actor that remembers the last good contents of an application's settings.

A process that starts while a bad content is there, such as the replacement of a gateway that died, goes on with the
last good one. The actor outlives all processes of the application.
"""

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray.exceptions import RayError

_NAMESPACE = "ranklet"
_TIMEOUT_S = 5.0

logger = logging.getLogger("ray.serve")


class KeptContents:
    """The actor's class: contents by deployment and setting."""

    def __init__(self) -> None:
        self._contents: dict[tuple[str, str], object] = {}

    def keep(self, deployment: str, name: str, content: object) -> None:
        self._contents[deployment, name] = content

    def last(self, deployment: str, name: str) -> object:
        return self._contents.get((deployment, name))


class KeeperActor:
    """Client of the actor for the processes of one deployment. Without the actor, nothing is remembered."""

    def __init__(self, application: str, deployment: str) -> None:
        self._name = f"settings-{application}"
        self._deployment = deployment
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="settings-keeper")  # Ray's calls block an event loop

    def keep(self, name: str, content: object) -> None:
        self._thread.submit(self._keep, name, content)

    def _keep(self, name: str, content: object) -> None:
        options = {
            "name": self._name, "namespace": _NAMESPACE, "get_if_exists": True, "lifetime": "detached", "num_cpus": 0,
        }  # fmt: skip
        try:
            actor: Any = ray.remote(KeptContents).options(**options).remote()
            ray.get(actor.keep.remote(self._deployment, name, content), timeout=_TIMEOUT_S)
        except RayError as error:
            logger.warning("%s: its content is not remembered: %s", name, type(error).__name__)

    def last(self, name: str) -> Any:
        return self._thread.submit(self._last, name).result()

    def _last(self, name: str) -> Any:
        try:
            actor = ray.get_actor(self._name, namespace=_NAMESPACE)
            return ray.get(actor.last.remote(self._deployment, name), timeout=_TIMEOUT_S)
        except (ValueError, RayError):  # ValueError: there is no such actor
            return None
