"""Reads and checks the head that PEFT saves beside an adapter for sequence classification."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ranklet.replicas.adapters.findings import Checked, shorten
from ranklet.replicas.adapters.safetensors_file import DTYPES, FLOATS, read_tensor
from ranklet.replicas.adapters.safetensors_header import StoredTensor
from ranklet.replicas.adapters.vector_head import VectorHead
from ranklet.replicas.errors import ModelError
from ranklet.replicas.model.classifier import HEAD_NAMES, MAX_LABELS, MODEL_CONFIG_FILE, Classifier, read_classifier

_MAX_BYTES: Final = 64 << 20  # in float32
_MAX_KEY_CHARS: Final = 512
_KEY: Final = re.compile(
    rf"(?:(?:base_model|model|auto_model)\.)*(?P<name>{'|'.join(HEAD_NAMES)})(?:\.modules_to_save(?:\.default)?)?"
    r"\.(?P<part>weight|bias)"
)


def read_head(
    path: Path, stored: Sequence[StoredTensor], hidden: int, *, expects: bool
) -> Checked[tuple[VectorHead | None, Sequence[StoredTensor]]]:
    """Read the head of a file, and return the file's other tensors too.

    Args:
        hidden: width of the base model.
        expects: whether the adapter is a classifier. Without a head, all tensors are others.

    Raises:
        UnreadableWeightsError: the file cannot be read.
    """
    if not expects:
        return None, stored
    parts: dict[str, StoredTensor] = {}
    others = []
    for tensor in stored:
        found = _KEY.fullmatch(tensor.key) if len(tensor.key) <= _MAX_KEY_CHARS else None
        if found is None:
            others.append(tensor)
        elif parts.setdefault(found["part"], tensor) is not tensor:
            yield f"{shorten(tensor.key)}: a second {found['part']} of the classification head; expected one"
    try:
        classifier = read_classifier(path.parent, None)
    except ModelError as error:
        yield error.message
        return None, others
    return (yield from _check(path, parts, classifier, hidden)), others


def _check(
    path: Path, parts: dict[str, StoredTensor], classifier: Classifier, hidden: int
) -> Checked[VectorHead | None]:
    weight, bias = parts.get("weight"), parts.get("bias")
    if weight is None:
        expected = " or ".join(f"base_model.model.{name}.weight" for name in HEAD_NAMES)
        yield f"task_type: SEQ_CLS needs the trained head ({expected}), which the file does not have"
        return None
    shape = f"[labels, {hidden}] with 1 to {MAX_LABELS} labels"
    if len(weight.shape) != 2 or weight.shape[1] != hidden or not 1 <= weight.shape[0] <= MAX_LABELS:
        yield f"{shorten(weight.key)}: expected the shape {shape}, got {list(weight.shape)}"
        return None
    rows = weight.shape[0]
    if 4 * rows * hidden > _MAX_BYTES:
        yield f"{shorten(weight.key)}: expected at most {_MAX_BYTES} bytes in float32, got {4 * rows * hidden}"
        return None
    if bias is not None and bias.shape != (rows,):
        yield f"{shorten(bias.key)}: expected the shape [{rows}], got {list(bias.shape)}"
        return None
    if classifier.labels is not None and len(classifier.labels) != rows:
        yield (
            f"{shorten(weight.key)}: expected {len(classifier.labels)} rows, as {MODEL_CONFIG_FILE} has labels, "
            f"got {rows}"
        )
        return None
    numbers = yield from read_numbers(path, weight)
    offsets = None if bias is None else (yield from read_numbers(path, bias))
    if numbers is None or (bias is not None and offsets is None):
        return None
    return VectorHead(numbers, offsets)


def read_numbers(path: Path, stored: StoredTensor) -> Checked[NDArray[np.float32] | None]:
    """Read a tensor in float32. Numbers that are not finite are a finding.

    Raises:
        UnreadableWeightsError: the file cannot be read.
    """
    if stored.dtype not in DTYPES:
        yield f"{shorten(stored.key)}: expected {FLOATS}, got {shorten(stored.dtype)}"
        return None
    numbers: NDArray[np.float32] = read_tensor(path, stored).float().numpy()
    if not np.isfinite(numbers).all():
        yield f"{shorten(stored.key)}: expected finite numbers, got NaN or infinity"
        return None
    return numbers
