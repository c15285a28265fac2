"""Reads and checks the weights of Dense layers, as sentence-transformers saves them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from ranklet.replicas.adapters.findings import Checked, collect, join
from ranklet.replicas.adapters.safetensors_header import UnreadableWeightsError, read_header
from ranklet.replicas.adapters.saved_head import read_numbers
from ranklet.replicas.errors import ModelError
from ranklet.replicas.model.dense import DenseLayer, DenseLayers
from ranklet.replicas.model.dense_settings import DenseSettings
from ranklet.replicas.model.embedding_settings import read_base_settings
from ranklet.replicas.model.sentence_files import DENSE_PICKLE_FILE, DENSE_WEIGHTS_FILE, is_file

_MAX_BYTES: Final = 64 << 20  # of all layers, in float32: each vector is multiplied by them
_WEIGHT, _BIAS, _PROJECTION = "linear.weight", "linear.bias", "residual.weight"


def read_base_dense(model_dir: Path, hidden: int) -> DenseLayers:
    """Read the Dense layers of a base model's folder.

    Args:
        hidden: width of pooled vectors.

    Raises:
        ModelError: the layers cannot be used.
    """
    layers, findings = collect(read_dense(model_dir, read_base_settings(model_dir).dense, hidden))
    if layers is None or findings:
        raise ModelError(f"{model_dir}: {'; '.join(findings)}")
    return layers


def read_dense(folder: Path, settings: Sequence[DenseSettings], hidden: int) -> Checked[DenseLayers | None]:
    """Read the Dense layers of a folder.

    Args:
        hidden: width of pooled vectors.
    """
    numbers = sum(each.inputs * each.outputs * (2 if each.projects else 1) for each in settings)
    if 4 * numbers > _MAX_BYTES:
        yield f"Dense layers: expected at most {_MAX_BYTES} bytes in float32, got {4 * numbers}"
        return None
    layers = []
    for each in settings:
        if each.inputs != hidden:
            yield f"{each.path}/config.json: in_features: expected {hidden}, the width before it, got {each.inputs}"
            return None
        layer, findings = collect(_read_layer(folder / each.path / DENSE_WEIGHTS_FILE, each))
        yield from (f"{each.path}/{finding}" for finding in findings)
        if layer is None:
            return None
        layers.append(layer)
        hidden = each.outputs
    return DenseLayers(tuple(layers))


def _read_layer(path: Path, settings: DenseSettings) -> Checked[DenseLayer | None]:
    if not is_file(path):
        yield _missing(path)
        return None
    shapes: dict[str, tuple[int, ...]] = {_WEIGHT: (settings.outputs, settings.inputs)}
    if settings.bias:
        shapes[_BIAS] = (settings.outputs,)
    if settings.projects:
        shapes[_PROJECTION] = shapes[_WEIGHT]
    found: dict[str, Tensor] = {}
    try:
        stored = {tensor.key: tensor for tensor in read_header(path)}
        if stored.keys() != shapes.keys():
            yield f"{path.name}: expected the tensors {join(shapes)}, got {join(stored) or 'none'}"
            return None
        for key, shape in shapes.items():
            if stored[key].shape != shape:
                yield f"{path.name}: {key}: expected the shape {list(shape)}, got {list(stored[key].shape)}"
                return None
            numbers = yield from read_numbers(path, stored[key])
            if numbers is None:
                return None
            found[key] = torch.from_numpy(numbers)
    except UnreadableWeightsError as error:
        yield str(error)
        return None
    return DenseLayer(settings, found[_WEIGHT], found.get(_BIAS), found.get(_PROJECTION))


def _missing(path: Path) -> str:
    if is_file(path.parent / DENSE_PICKLE_FILE):
        return (
            f"{DENSE_PICKLE_FILE}: pickle is never read; expected {path.name}, which `ranklet adapters convert` makes "
            "of an adapter's folder, and SentenceTransformer of any that it loads and saves again"
        )
    return f"{path.name}: expected the weights of the Dense layer; the file is missing"
