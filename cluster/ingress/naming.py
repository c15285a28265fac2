"""From what a request says (`model`, `lora_path`) to the base model or an adapter."""

from collections.abc import Sequence

from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.cluster.catalog.registry import Registry
from ranklet.replicas.errors import InvalidRequest


class ModelNames:
    """The names requests may use: those of the base, of adapters, and `base:adapter`."""

    def __init__(self, base_names: Sequence[str], registry: Registry) -> None:
        self._bases = tuple(base_names)
        self.registry = registry

    @property
    def base(self) -> str:
        """The base model's own name."""
        return self._bases[0]

    def resolve(self, model: str | None, lora_path: str | None = None) -> AdapterLocation | None:
        """The adapter a request means; None is the base model.

        Raises:
            InvalidRequest: neither is given, or they contradict each other.
            UnknownModel, AdapterNotFound, InvalidAdapter: see `Registry.find`.
        """
        if not model and not lora_path:
            raise InvalidRequest(
                f"model: expected the name of an adapter or of the base model ({self.base!r}), got none", param="model"
            )
        named = self._adapter_of(model) if model else None
        if not lora_path:
            return named
        asked = self.registry.locate(lora_path, param="lora_path")
        if named is not None and named.name != asked.name:
            raise InvalidRequest(
                f"lora_path: model already names the adapter {named.name!r}, and lora_path names another, "
                f"{asked.name!r}. Give one of them",
                param="lora_path",
            )
        return asked

    def _adapter_of(self, model: str) -> AdapterLocation | None:
        if model in self._bases:
            return None
        for base in self._bases:
            if model.startswith(base + ":"):
                return self.registry.locate(model[len(base) + 1 :])
        return self.registry.locate(model)
