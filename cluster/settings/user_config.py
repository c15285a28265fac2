"""`user_config` of the two deployments: the part of a deployment's file that changes without a restart."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from ranklet.cluster.config import AdapterList, GatewayUserConfig

USER_CONFIGS: dict[str, type[AdapterList]] = {"Gateway": GatewayUserConfig, "Replica": AdapterList}
Config = TypeVar("Config", bound=AdapterList)
_REMEDY = "Correct it in the file and deploy the file again"
_MAX_SHOWN_CHARACTERS = 100
_EXPECTED = {  # by the beginning of pydantic's message
    "Input should be greater": "expected a number greater",
    "Input should be": "expected",
    "Input is not a valid path for <class 'pathlib.Path'>": "expected a path",
}
_WITH_CAUSE = ("_parsing", "_type", "_from_float")  # these messages go on after a comma


def read_user_config(kind: type[Config], content: Any, deployment: str) -> Config:
    """Check a `user_config`; None is an empty one.

    Raises:
        ValueError: one sentence for each fault.
    """
    if content is not None and not isinstance(content, Mapping):
        raise ValueError(f"user_config of the {deployment}: expected a map, got {content!r}. {_REMEDY}")
    try:
        return kind.model_validate(content or {})
    except ValidationError as error:
        raise ValueError(f"user_config of the {deployment}: {'; '.join(describe_errors(error))}. {_REMEDY}") from None


def describe_errors(error: ValidationError) -> list[str]:
    """Return what was expected where, and what was there instead, for each error."""
    return [_describe(each) for each in error.errors()]


def _describe(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"] if part != "[key]")
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] not in ("value_error", "missing"):
        begin = next((begin for begin in _EXPECTED if message.startswith(begin)), "")
        message = _EXPECTED.get(begin, "") + message.removeprefix(begin)
        message = message.partition(", ")[0] if error["type"].endswith(_WITH_CAUSE) else message
        message = f"{message}, got {repr(error['input'])[:_MAX_SHOWN_CHARACTERS]}"
    return f"{where}: {message}" if where else message
