"""Reads the settings of Dense layers, which sentence-transformers applies to pooled vectors. Imports no torch."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ranklet.replicas.errors import ModelError
from ranklet.replicas.model.sentence_files import MODULES_FILE, expect, is_file, read_file, refuse_others
from ranklet.replicas.model.tokenizer_files import is_id, show

MAX_WIDTH: Final = 16_384
ACTIVATIONS: Final = ("Identity", "Tanh", "ReLU", "GELU", "Sigmoid", "SiLU")
_ACTIVATION: Final = re.compile(rf"torch\.nn\.(?:modules\.(?:activation|linear)\.)?({'|'.join(ACTIVATIONS)})")
_SENTENCE: Final = (None, "sentence_embedding")
_FIELDS: Final = {
    "in_features", "out_features", "bias", "activation_function", "use_residual", "module_input_name",
    "module_output_name",
}  # fmt: skip


@dataclass(frozen=True)
class DenseSettings:
    """One layer: `activation(W x + b)`, plus x or a projection of x if it is residual.

    Attributes:
        path: its folder, within the model's or adapter's.
        activation: one of `ACTIVATIONS`.
    """

    path: str
    inputs: int
    outputs: int
    bias: bool = True
    activation: str = "Tanh"
    residual: bool = False

    def __str__(self) -> str:
        added = " + residual" if self.residual else ""
        return f"{self.inputs} -> {self.outputs} ({self.activation}{added})"

    @property
    def projects(self) -> bool:
        """Whether the layer has a second matrix, for the residual."""
        return self.residual and self.inputs != self.outputs


def width_after(layers: Sequence[DenseSettings], width: int) -> int:
    """Return the width of vectors that had `width` before the layers."""
    return layers[-1].outputs if layers else width


def read_dense_settings(folder: Path, path: str) -> DenseSettings:
    """Read the settings of the layer in a subfolder.

    Raises:
        ModelError: the file cannot be read, or a setting is not supported.
    """
    name = f"{path}/config.json"
    if not is_file(folder / name):
        raise ModelError(f"{name}: expected the Dense layer that {MODULES_FILE} names; the file is missing")
    config: dict[str, Any] = read_file(folder, name, dict)
    refuse_others(name, config, _FIELDS)
    for field in ("module_input_name", "module_output_name"):
        expect(name, config, field, _SENTENCE)
    for field in ("bias", "use_residual"):
        expect(name, config, field, (None, True, False))
    activation = config.get("activation_function", "torch.nn.Tanh")
    found = _ACTIVATION.fullmatch(activation) if isinstance(activation, str) else None
    if found is None:
        expected = ", ".join(f"torch.nn.{each}" for each in ACTIVATIONS)
        raise ModelError(f"{name}: activation_function: expected one of {expected}, got {show(activation)}")
    inputs, outputs = (_width(name, field, config.get(field)) for field in ("in_features", "out_features"))
    return DenseSettings(
        path, inputs, outputs, config.get("bias", True) is not False, found[1], config.get("use_residual") is True
    )


def _width(name: str, field: str, value: Any) -> int:
    if not is_id(value) or not 1 <= value <= MAX_WIDTH:
        raise ModelError(f"{name}: {field}: expected 1 to {MAX_WIDTH}, got {show(value)}")
    return int(value)
