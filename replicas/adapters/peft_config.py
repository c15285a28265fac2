"""`adapter_config.json`, as PEFT 0.21 reads it: every field is honoured, harmless, or refused by name.

The matching rules are PEFT's own (`check_target_module_exists`, `get_pattern_key`), so that a folder means here what it
meant where it was trained.
"""

import json
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from ranklet.replicas.adapters.findings import Checked, shorten, show

# They shape training, or describe the file; a forward pass does not depend on them.
_HARMLESS = {
    "task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "lora_dropout", "megatron_core",
    "loftq_config", "eva_config", "qalora_group_size", "runtime_config", "ensure_weight_tying",
}  # fmt: skip
_HONOURED = {
    "peft_type", "base_model_name_or_path", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights", "bias",
}  # fmt: skip
# These initialisations leave the base weights as they were; the others (pissa, olora, loftq, ...) change them.
_PLAIN_INIT = (True, False, None, "gaussian", "eva", "orthogonal")
_FLOAT32_MAX = 3.4028234e38


@dataclass(frozen=True)
class PeftConfig:
    """The part of an adapter's config that its forward pass depends on."""

    fields: dict[str, Any]

    def targets(self, module: str) -> bool:
        """Whether the config puts LoRA on the module of this full name."""
        excluded, wanted = self.fields.get("exclude_modules"), self.fields.get("target_modules")
        if _names(excluded, module):
            return False
        if isinstance(wanted, str):
            # "all-linear" is every linear layer but the output head
            return not module.endswith(("embed_tokens", "lm_head")) if wanted == "all-linear" else _full(wanted, module)
        # a module named in full is targeted whatever its layer
        return module in (wanted or ()) or (_names(wanted, module) and self._in_layers(module))

    def _in_layers(self, module: str) -> bool:
        wanted = self.fields.get("layers_to_transform")
        if wanted is None or wanted == []:
            return True
        patterns = self.fields.get("layers_pattern") or []
        shapes = [_layer_shape(pattern) for pattern in ([patterns] if isinstance(patterns, str) else patterns)]
        shapes = shapes or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
        found = next(filter(None, (re.match(shape, module) for shape in shapes)), None)
        return found is not None and int(found["idx"]) in ([wanted] if isinstance(wanted, int) else wanted)

    def rank(self, module: str) -> int:
        """The rank of one module, `rank_pattern` applied."""
        return int(_by_pattern(self.fields.get("rank_pattern"), module, self.fields["r"]))

    def scaling(self, module: str) -> float:
        """What B A x is multiplied by: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA."""
        alpha = float(_by_pattern(self.fields.get("alpha_pattern"), module, self.fields.get("lora_alpha", 8)))
        rank = self.rank(module)
        return alpha / math.sqrt(rank) if self.fields.get("use_rslora") else alpha / rank


def _names(wanted: Any, module: str) -> bool:
    if not wanted:
        return False
    if isinstance(wanted, str):
        return _full(wanted, module)
    return any(module == name or module.endswith(f".{name}") for name in wanted)


def _full(pattern: str, module: str) -> bool:
    return re.fullmatch(pattern, module) is not None


def _by_pattern(patterns: Any, module: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(_suffix_shape(pattern), module):
            return value
    return default


def _suffix_shape(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _layer_shape(pattern: str) -> str:
    return rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."


def read_peft_config(path: Path, bases: Sequence[str]) -> Checked[PeftConfig | None]:
    """Check an adapter's config. Returns None if it cannot be used at all.

    Args:
        path: the `adapter_config.json`.
        bases: names (fnmatch patterns) of the served base model.
    """
    if not path.is_file():
        yield f"{path.name}: expected the config that PEFT saves beside the weights; it is missing"
        return None
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        yield f"{path.name}: expected JSON, got: {error}"
        return None
    if not isinstance(fields, dict):
        yield f"{path.name}: expected a JSON object, got {type(fields).__name__}"
        return None
    findings = [*_wrong_types(fields), *_bad_patterns(fields)]
    yield from findings
    if findings:
        return None
    yield from _unsupported(fields)
    yield from _wrong_base(fields.get("base_model_name_or_path"), bases)
    return PeftConfig({"r": 8, **fields})


def _wrong_types(fields: dict[str, Any]) -> Iterator[str]:
    if not _is_count(fields.get("r", 8)):
        yield f"r: expected a whole number of at least 1, got {show(fields.get('r'))}"
    for name, good in (("rank_pattern", _is_count), ("alpha_pattern", _is_number)):
        value = fields.get(name) or {}
        if not isinstance(value, dict) or not all(good(item) for item in value.values()):
            yield f"{name}: expected an object of numbers by module pattern, got {show(value)}"
    if not _is_number(fields.get("lora_alpha", 8)):
        yield f"lora_alpha: expected a number, got {show(fields.get('lora_alpha'))}"
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        value = fields.get(name)
        if not (value is None or isinstance(value, str) or _is_list(value, str)):
            yield f"{name}: expected a list of names or a pattern, got {show(value)}"
    layers = fields.get("layers_to_transform")
    if not (layers is None or isinstance(layers, int) or _is_list(layers, int)):
        yield f"layers_to_transform: expected layer numbers, got {show(layers)}"
    if not fields.get("target_modules"):
        yield f"target_modules: expected at least one module, got {show(fields.get('target_modules'))}"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _FLOAT32_MAX


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _bad_patterns(fields: dict[str, Any]) -> Iterator[str]:
    whole = [value for name in ("target_modules", "exclude_modules") if isinstance(value := fields.get(name), str)]
    shapes = {pattern: pattern for pattern in whole}
    for name in ("rank_pattern", "alpha_pattern"):
        named = fields[name] if isinstance(fields.get(name), dict) else {}
        shapes |= {pattern: _suffix_shape(pattern) for pattern in named}
    layers = fields.get("layers_pattern") or []
    listed = [layers] if isinstance(layers, str) else list(layers) if isinstance(layers, list) else []
    shapes |= {pattern: _layer_shape(pattern) for pattern in listed if isinstance(pattern, str)}
    for pattern, shape in shapes.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # "[[": what it may mean in a later Python
                re.compile(shape)
        except re.error as error:
            yield f"pattern {show(pattern)}: expected a regular expression, got: {error}"


def _unsupported(fields: dict[str, Any]) -> Iterator[str]:
    if fields.get("peft_type", "LORA") != "LORA":
        yield f"peft_type: expected LORA, got {show(fields['peft_type'])}"
    if fields.get("bias", "none") != "none":
        yield f"bias: expected 'none', got {show(fields['bias'])}; train without biases"
    if fields.get("init_lora_weights", True) not in _PLAIN_INIT:
        yield (
            f"init_lora_weights: {show(fields['init_lora_weights'])} changes the base weights; "
            "save the adapter with PEFT's path_initial_model_for_weight_conversion"
        )
    for name, value in fields.items():
        if name not in _HARMLESS and name not in _HONOURED and value not in (None, False, [], {}, ""):
            yield f"{shorten(name)}: not supported; train the adapter without it"


def _wrong_base(named: Any, bases: Sequence[str]) -> Iterator[str]:
    if named is None or named == "":
        return  # PEFT leaves it empty for models built in memory; shapes are checked all the same
    short = _short_name(str(named))
    if any(fnmatch(short.lower(), _short_name(base).lower()) for base in bases):
        return
    served = ", ".join(bases)
    yield (
        f"base_model_name_or_path: expected the served base ({served}), got {show(named)}; if it is the same model, "
        "add that name to the base's aliases"
    )


def _short_name(name: str) -> str:
    """The last part of a hub id or path; of a hub cache's snapshot, the model's."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    cached = [part for part in parts if part.startswith("models--")]
    return cached[-1].rsplit("--", 1)[-1] if cached else parts[-1] if parts else name
