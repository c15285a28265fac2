"""A name for one revision of one adapter, light enough for gateways and routers to hold thousands."""

from dataclasses import dataclass, field

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FILES = (CONFIG_FILE, WEIGHTS_FILE)  # what an adapter is made of


@dataclass(frozen=True)
class AdapterRef:
    """One revision of an adapter: where it lies does not matter, only what it is called and what is in it.

    Attributes:
        name: as users say it.
        path: its folder.
        revision: of its content.
        marks: of the files of that content (see `marks_of`); "" where they never change.
    """

    name: str
    path: str = field(compare=False)
    revision: str
    marks: str = field(default="", compare=False)


@dataclass(frozen=True)
class AdapterInfo:
    """An adapter that is verified and in a slot."""

    name: str
    revision: str
    rank: int
    modules: tuple[str, ...]
    bytes: int
