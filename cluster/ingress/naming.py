"""Resolves the model's name in a request to the base model or an adapter."""

from collections.abc import Sequence

from ranklet.cluster.access.keys import ApiKey, ApiKeys
from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.cluster.catalog.registry import Registry
from ranklet.cluster.names import MAX_NAME_CHARACTERS, normal_name, readings
from ranklet.replicas.errors import InvalidRequest, UnknownModel

_MAX_REVISION_CHARACTERS = 64
_MOST_DECOMPOSED = 4  # characters that one may become in another Unicode form


class ModelNames:
    """Resolves `base`, `adapter`, `adapter@revision`, and either of the last two after `base:`.

    `ranklet.cluster.names` has the rules of names.

    Args:
        base_names: the base model's own name, then its aliases.
    """

    def __init__(self, base_names: Sequence[str], registry: Registry) -> None:
        self._bases = tuple(map(normal_name, base_names))
        self._prefixes = sorted((name + ":" for name in self._bases), key=len, reverse=True)
        self._max_characters = max(map(len, base_names)) + MAX_NAME_CHARACTERS + _MAX_REVISION_CHARACTERS + len(":@")
        self._registry = registry

    @property
    def base(self) -> str:
        return self._bases[0]

    def names_of(self, model: str) -> tuple[str, ...]:
        """Return all names of the base model or of an adapter, by its own name."""
        return self._bases if model == self.base else (model,)

    def resolve(self, key: ApiKey | None, model: str | None, lora_path: str | None = None) -> AdapterLocation | None:
        """Return the adapter that a request names, or None for the base model. Reads the file system.

        Rights are checked first. So a key learns of no model that it may not use, not even whether it exists.

        Args:
            key: of the request; None if the service has no keys.

        Raises:
            Forbidden: the key may not use the model.
            InvalidRequest: both fields are missing, or they name different adapters.
            UnknownModel: a name is too long.
            RankletError: an error of `Registry.locate`.
        """
        if not model and not lora_path:
            raise InvalidRequest(
                f"model: expected the name of an adapter or of the base model ({self.base!r}), got none", param="model"
            )
        named = self._locate(key, model) if model and not (lora_path and self._is_base(model)) else None
        if not lora_path:
            return named
        self._check_length(lora_path, "lora_path")
        adapter = self._find(key, normal_name(lora_path), "lora_path")
        if named is not None and named.name != adapter.name:
            raise InvalidRequest(
                f"lora_path: expected {named.name!r}, the adapter that `model` names, got {adapter.name!r}. "
                "Give one of the two fields",
                param="lora_path",
            )
        return adapter

    def _is_base(self, model: str) -> bool:
        self._check_length(model, "model")
        return normal_name(model) in self._bases

    def _locate(self, key: ApiKey | None, model: str) -> AdapterLocation | None:
        if self._is_base(model):
            ApiKeys.authorize(key, *self._bases)
            return None
        name = normal_name(model)
        prefix = next(filter(name.startswith, self._prefixes), "")
        return self._find(key, name[len(prefix) :], "model")

    def _find(self, key: ApiKey | None, name: str, param: str) -> AdapterLocation:
        if key is None:
            return self._registry.locate(name, param)
        if not any(map(key.may_use, readings(name))):
            ApiKeys.authorize(key, name)
        return self._registry.locate(name, param, key.may_use)

    def _check_length(self, name: str, param: str) -> None:
        # For an unknown name, the registry searches similar names, which is slow for a long one.
        if len(name) > self._max_characters * (1 if name.isascii() else _MOST_DECOMPOSED):
            raise UnknownModel(
                f"{param}: expected a name of at most {self._max_characters} characters, got {len(name)}. "
                "GET /v1/models lists what is served",
                param=param,
            )
