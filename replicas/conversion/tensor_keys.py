"""Renames tensors to the names that PEFT saves."""

import re
from collections.abc import Iterable

from ranklet.replicas.adapters.findings import join, shorten
from ranklet.replicas.conversion.stored_weights import ConversionError

# Added by DistributedDataParallel, torch.compile, FSDP and activation checkpointing.
_WRAPPERS = re.compile(r"(?:^module\.|\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)")
# A state dict has the adapter's name behind that of a matrix; `save_pretrained` removes it.
_NAMED = re.compile(
    r"(?P<matrix>\.(?:lora_(?:embedding_)?[AB]|lora_magnitude_vector|(?:hada|lokr)_\w+))\.(?P<adapter>(?!weight$|bias$)[^.]+)"
)


def peft_names(names: Iterable[str]) -> dict[str, str]:
    """Return the name that PEFT saves, by the name in the file.

    Raises:
        ConversionError: the tensors belong to several adapters, or two get the same name.
    """
    found: dict[str, str] = {}
    adapters = set()
    for name in names:
        plain = _WRAPPERS.sub("", name)
        if (named := _NAMED.search(plain)) is not None:
            adapters.add(named["adapter"])
            plain = plain[: named.end("matrix")] + plain[named.end() :]
        found[name] = plain
    if len(adapters) > 1:
        raise ConversionError(f"expected one adapter's tensors, got those of {join(adapters)}; save each by itself")
    taken: dict[str, str] = {}
    for name, plain in found.items():
        if plain in taken:
            raise ConversionError(f"{shorten(name)} and {shorten(taken[plain])} are two tensors of one name")
        taken[plain] = name
    return found
