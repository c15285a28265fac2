"""Writes an adapter folder that can be served, from one whose weights are stored otherwise."""

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, TypeVar

from safetensors.torch import save_file
from torch import Tensor

from ranklet.replicas.adapters.findings import Checked, collect, show
from ranklet.replicas.adapters.invocation import FIELD as INVOCATION
from ranklet.replicas.adapters.links import check_links
from ranklet.replicas.adapters.peft_config import check_fields, read_fields
from ranklet.replicas.adapters.reference import CONFIG_FILE, FILES, WEIGHTS_FILE
from ranklet.replicas.adapters.revision import files_in
from ranklet.replicas.adapters.tensor_names import full_names, parse_key
from ranklet.replicas.conversion.initial_weights import (
    BaseWeights,
    Scaling,
    changes_base,
    doubled_ranks,
    has_known_factors,
    initial_of,
    plain_lora,
)
from ranklet.replicas.conversion.low_rank import METHODS, approximate
from ranklet.replicas.conversion.megatron import is_megatron, of_megatron
from ranklet.replicas.conversion.stored_weights import ConversionError, read_pickled, read_weights
from ranklet.replicas.conversion.tensor_keys import peft_names
from ranklet.replicas.model.architecture import read_architecture, read_config
from ranklet.replicas.model.sentence_files import DENSE_PICKLE_FILE, DENSE_WEIGHTS_FILE, MODULE_FILES, is_file

T = TypeVar("T")
_MAX_COPIED_BYTES = 64 << 20  # of a file that is no part of the adapter's revision
# Fields with which the initial matrices count, and PEFT's defaults.
_SCALES: Final[dict[str, Any]] = {"r": 8, "lora_alpha": 8, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".distcp")


@dataclass(frozen=True)
class Conversion:
    """What to convert.

    Attributes:
        target: does not exist yet.
        model: folder of the base model; needed to undo PiSSA and OLoRA, and for Megatron's modules.
        initial: folder of the adapter before its training; the other way to undo such an initialisation.
        rank: of the LoRA that replaces LoHa or LoKr.
        max_error: largest error of that, relative to the norm of a module's change.
        track: shows the progress over modules.
    """

    source: Path
    target: Path
    model: Path | None = None
    initial: Path | None = None
    rank: int = 64
    max_error: float = 0.01
    track: Callable[[Iterable[str]], Iterable[str]] = field(default=iter, repr=False)

    def run(self) -> list[str]:
        """Write the target. Returns a sentence for each change.

        Raises:
            ConversionError: the source has no equal form, or not within `max_error`. Nothing is written.
            ModelError: the base model cannot be read.
            OSError: a file cannot be read or written.
        """
        if self.target.exists():
            raise ConversionError(f"{self.target}: expected a folder to create, but it exists")
        tensors, notes = _named_tensors(self.source)
        fields = _read_fields(self.source)
        if is_megatron(tensors):
            fields, tensors = self._of_megatron(fields, tensors, notes)
        kind = fields.get("peft_type", "LORA")
        if kind not in ("LORA", *METHODS):
            raise ConversionError(f"peft_type: expected LORA, LOHA or LOKR, got {show(kind)}")
        if kind in METHODS:
            fields, tensors = self._low_rank(fields, tensors, notes)
        elif changes_base(fields.get("init_lora_weights", True)):
            fields, tensors = self._without_initial(fields, tensors, notes)
        weights = self._dense_weights()
        notes += [f"the weights of a Dense layer are in {name} now" for name in weights]
        self._write(fields, weights | {WEIGHTS_FILE: tensors})
        return notes or ["nothing had to be converted; the weights are copied"]

    def _of_megatron(
        self, fields: dict[str, Any], tensors: dict[str, Tensor], notes: list[str]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if self.model is None:
            raise ConversionError("Megatron's modules: expected --model, the base's folder, whose heads order rows")
        made = of_megatron(fields, tensors, read_architecture(read_config(self.model)))
        notes.append("Megatron's modules are divided among those of the base")
        return made

    def _low_rank(
        self, fields: dict[str, Any], tensors: dict[str, Tensor], notes: list[str]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        made = approximate(fields, tensors, self.rank, self.track)
        if made.error > self.max_error:
            raise ConversionError(
                f"{fields['peft_type']}: expected an error of at most {self.max_error:g} at rank {self.rank}, got "
                f"{made.error:.3g} in {made.worst}. Choose a larger --rank, or accept it with --max-error"
            )
        notes.append(
            f"{fields['peft_type']} became LoRA of rank {self.rank}; the largest error of a module is {made.error:.2g} "
            "of its change"
        )
        return made.fields, made.tensors

    def _without_initial(
        self, fields: dict[str, Any], tensors: dict[str, Tensor], notes: list[str]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        init = fields["init_lora_weights"]
        if init == "loftq":
            raise ConversionError(
                "init_lora_weights: 'loftq': the adapter belongs to a quantized base, whose difference to the base is "
                "not stored; train the adapter without LoftQ"
            )
        if fields.get(INVOCATION) is not None:
            raise ConversionError(
                f"{INVOCATION}: expected none with init_lora_weights {show(init)}, which has changed the base's "
                "weights for the tokens before it too; train the adapter with init_lora_weights true"
            )
        settings = _settings(fields, tensors)
        if self.initial is not None:
            before = _read_fields(self.initial)
            for name, default in _SCALES.items():
                expected, got = (each.get(name) or default for each in (fields, before))
                if got != expected:
                    raise ConversionError(f"{self.initial}: expected {name} {show(expected)}, got {show(got)}")
            initial, _ = _named_tensors(self.initial)
        elif self.model is not None and has_known_factors(init):
            with BaseWeights(self.model) as base:
                initial = initial_of(init, tensors, settings, base)
        else:
            ways = "--model, the base's folder, or --initial" if has_known_factors(init) else "--initial"
            raise ConversionError(
                f"init_lora_weights: {show(init)} has changed the base's weights; expected {ways}, the folder of the "
                "adapter as it was saved before its training"
            )
        notes.append(f"the initial weights of {show(init)} are subtracted; the rank is twice as large")
        return doubled_ranks(fields), plain_lora(tensors, initial)

    def _dense_weights(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of pickled Dense layers, by the name of the file that gets them."""
        found = {}
        for name in (each for each in MODULE_FILES if each.endswith(DENSE_WEIGHTS_FILE)):
            pickled = (self.source / name).with_name(DENSE_PICKLE_FILE)
            if is_file(pickled) and not is_file(self.source / name):
                found[name] = read_pickled(pickled)
        return found

    def _copied_files(self) -> list[str]:
        """Return the names of the source's files that the target gets too.

        Raises:
            ConversionError: a link would copy a file from elsewhere.
        """
        beside = [file.name for file in self.source.iterdir() if _is_small(file) and not _is_weights(file)]
        names = sorted({*beside, *files_in(self.source)} - {*FILES})
        outside = list(check_links(self.source, names))
        if outside:
            raise ConversionError("; ".join(outside))
        return names

    def _write(self, fields: dict[str, Any], weights: dict[str, dict[str, Tensor]]) -> None:
        """Write the target beside its place, then move it there.

        Args:
            weights: tensors by the name of their file.
        """
        self.target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=self.target.parent, prefix=f".{self.target.name}-") as scratch:
            folder = Path(scratch) / "made"
            folder.mkdir()
            for name in self._copied_files():
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(self.source / name, folder / name)
            (folder / CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
            for file, tensors in weights.items():
                (folder / file).parent.mkdir(exist_ok=True)
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file)
            folder.rename(self.target)


def _read_fields(folder: Path) -> dict[str, Any]:
    return _checked(read_fields(folder / CONFIG_FILE))


def _named_tensors(folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors by PEFT's names, and a sentence for each change."""
    stored = read_weights(folder)
    names = peft_names(stored)
    notes = []
    if not (folder / WEIGHTS_FILE).is_file():
        notes.append(f"the weights are in one {WEIGHTS_FILE} now")
    renamed = sum(name != plain for name, plain in names.items())
    if renamed:
        notes.append(f"{renamed} tensors have the names that PEFT saves")
    return {names[name]: tensor for name, tensor in stored.items()}, notes


def _settings(fields: dict[str, Any], tensors: dict[str, Tensor]) -> Scaling:
    """Check the config, and return each tensor's scaling."""
    config = _checked(check_fields({**fields, "init_lora_weights": True}, ("*",)))
    modules = {name: key.module for name in tensors if (key := parse_key(name)) is not None}
    names = full_names(tensors.keys(), modules.values())
    settings = _checked(config.apply(names.values()))
    return lambda name: settings.scaling(names[modules[name]])


def _checked(check: Checked[T | None]) -> T:
    """Run a check. Raises ConversionError with all findings."""
    value, findings = collect(check)
    if findings or value is None:
        raise ConversionError("; ".join(findings))
    return value


def _is_small(file: Path) -> bool:
    return file.is_file() and file.stat().st_size <= _MAX_COPIED_BYTES


def _is_weights(file: Path) -> bool:
    return file.suffix in _WEIGHTS or file.name.endswith(".index.json")
