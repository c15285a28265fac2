"""Reads `adapter_config.json` as PEFT 0.21 does: every field is applied, ignored as harmless, or refused by name.

The matching rules are those of PEFT's `check_target_module_exists` and `get_pattern_key`.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ranklet.replicas.adapters.base_name import check_base_name
from ranklet.replicas.adapters.findings import Checked, shorten, show
from ranklet.replicas.adapters.invocation import FIELD as INVOCATION
from ranklet.replicas.adapters.invocation import Invocation, check_invocation, invocation_of
from ranklet.replicas.adapters.limits import MAX_CONFIG_BYTES, MAX_ENTRIES, MAX_PATTERN_CHARS, MAX_RANK
from ranklet.replicas.adapters.nested import missing_config
from ranklet.replicas.adapters.pattern_process import NO_LAYER
from ranklet.replicas.adapters.patterns import Pattern, PatternMatch, match_patterns
from ranklet.replicas.adapters.token_settings import TokenSettings, unsupported_token_fields, wrong_token_fields
from ranklet.replicas.model.classifier import is_classifier
from ranklet.replicas.model.git_lfs import is_pointer, pointer_message
from ranklet.replicas.model.modules import EMBED_TOKENS, LM_HEAD
from ranklet.replicas.regular_file import TooLargeError, read_regular

# These fields shape training or describe the file; a forward pass does not depend on them.
_HARMLESS = {
    "task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "lora_dropout", "megatron_core",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "qalora_group_size",
    "runtime_config",
}  # fmt: skip
_APPLIED = {
    "peft_type", "base_model_name_or_path", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights", "bias",
    "ensure_weight_tying", "use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", INVOCATION,
}  # fmt: skip
# These initialisations leave the base weights as they were; the others (pissa, olora, loftq, ...) change them.
_PLAIN_INIT = (True, False, None, "gaussian", "eva", "orthogonal")
_LORA = "LORA"
_METHODS = {
    "PREFIX_TUNING": "prefix tuning", "PROMPT_TUNING": "prompt tuning", "MULTITASK_PROMPT_TUNING": "prompt tuning",
    "P_TUNING": "p-tuning", "CPT": "prompt tuning", "ADAPTION_PROMPT": "LLaMA-Adapter", "IA3": "(IA)3",
    "OFT": "orthogonal fine-tuning", "BOFT": "orthogonal fine-tuning", "HRA": "orthogonal fine-tuning",
    "ADALORA": "AdaLoRA", "LOHA": "LoHa", "LOKR": "LoKr", "VERA": "VeRA", "XLORA": "a mixture of LoRA adapters",
    "LN_TUNING": "tuning of norms", "TRAINABLE_TOKENS": "training of single tokens", "FOURIERFT": "FourierFT",
}  # fmt: skip
_BIASES = ("none", "all", "lora_only")
_FLOAT32_MAX = 3.4028234e38
_ALL_LINEAR = "all-linear"
_TIED = (EMBED_TOKENS, LM_HEAD)  # a tied model uses one weight for both
_ANY_LAYER = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")  # PEFT's rule without a layers_pattern


@dataclass(frozen=True)
class PeftConfig:
    """Fields of an adapter's config whose types and limits are checked."""

    fields: dict[str, Any]

    def apply(self, modules: Iterable[str]) -> Checked["LoraSettings | None"]:
        """Match the config's patterns against the full names of a model's modules."""
        matches = match_patterns(tuple(self._patterns()), tuple(dict.fromkeys((*modules, *_TIED))))
        for pattern, reason in matches.errors.items():
            yield f"{pattern.field}: pattern {show(pattern.text)}: {shorten(reason)}"
        return None if matches.errors else LoraSettings(self.fields, matches.found)

    def _patterns(self) -> Iterator[Pattern]:
        for name in ("target_modules", "exclude_modules"):
            value = self.fields.get(name)
            if isinstance(value, str) and (name, value.lower()) != ("target_modules", _ALL_LINEAR):
                yield Pattern(name, value)
        for name in ("rank_pattern", "alpha_pattern"):
            yield from (Pattern(name, text) for text in self.fields.get(name) or {})
        yield from (Pattern("layers_pattern", text) for text in self._layers_patterns())

    def _layers_patterns(self) -> list[str]:
        patterns = self.fields.get("layers_pattern") or []
        return [patterns] if isinstance(patterns, str) else patterns


class LoraSettings:
    """An adapter's config applied to the modules of a model; its methods take full names of these modules."""

    def __init__(self, fields: dict[str, Any], found: Mapping[str, Mapping[str, PatternMatch]]) -> None:
        self._fields = fields
        self._found = {name: found.get(name, {}) for name in MAX_ENTRIES}
        self._ranks = self._values("rank_pattern")
        self._alphas = self._values("alpha_pattern")
        layers = fields.get("layers_to_transform")
        self._layers = frozenset([layers] if isinstance(layers, int) else layers or ())
        self._any_layer = layers is None or layers == []
        self._names = {
            name: frozenset(value)
            for name in ("target_modules", "exclude_modules")
            if not isinstance(value := fields.get(name) or (), str)
        }
        self._dotted = {name for name, value in self._names.items() if any("." in each for each in value)}

    def targets(self, module: str) -> bool:
        """Whether the config puts LoRA on the module."""
        if self._selects("exclude_modules", module):
            return False
        if "target_modules" not in self._names:
            if self._fields["target_modules"].lower() == _ALL_LINEAR:  # every linear layer except the output head
                return not module.endswith(_TIED)
            return self._selects("target_modules", module)
        # layers_to_transform does not apply to a module that is named in full
        full_name = module in self._names["target_modules"]
        return full_name or (self._selects("target_modules", module) and self._in_layers(module))

    @property
    def tokens(self) -> TokenSettings:
        return TokenSettings.of(self._fields)

    @property
    def classifies(self) -> bool:
        return is_classifier(self._fields)

    @property
    def ties_head(self) -> bool:
        """Whether the head of a tied model has the LoRA of the token embedding, which then is targeted as well.

        PEFT compares patterns with the short names of the two modules, even if their full names are longer.
        """
        if not self._fields.get("ensure_weight_tying"):
            return False
        if "target_modules" in self._names:
            return any(name.rpartition(".")[2] in _TIED for name in self._names["target_modules"])
        return any(name in self._found["target_modules"] for name in _TIED)

    @property
    def uses_dora(self) -> bool:
        """Whether each targeted module has a magnitude for each output column."""
        return bool(self._fields.get("use_dora"))

    @property
    def invocation(self) -> Invocation | None:
        """Return the tokens from which on the adapter changes a prompt; None if it changes all."""
        return invocation_of(self._fields)

    @property
    def has_lora_bias(self) -> bool:
        """Whether B of each targeted module has a bias."""
        return bool(self._fields.get("lora_bias"))

    @property
    def bias(self) -> str:
        """Return which biases of the base are trained: "none", "all", or "lora_only", those of targeted modules."""
        return str(self._fields.get("bias", "none"))

    def rank(self, module: str) -> int:
        return int(self._ranks.get(module, self._fields.get("r", 8)))

    def scaling(self, module: str) -> float:
        """Return the factor of B A x: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA."""
        alpha, rank = float(self._alphas.get(module, self._fields.get("lora_alpha", 8))), self.rank(module)
        return alpha / math.sqrt(rank) if self._fields.get("use_rslora") else alpha / rank

    def _values(self, name: str) -> dict[str, Any]:
        return {module: self._fields[name][match.text] for module, match in self._found[name].items()}

    def _selects(self, name: str, module: str) -> bool:
        if name in self._names:
            names = self._names[name]
            last = module.rpartition(".")[2]
            return last in names or (name in self._dotted and any(map(names.__contains__, _dotted_suffixes(module))))
        return module in self._found[name]

    def _in_layers(self, module: str) -> bool:
        if self._any_layer:
            return True
        if not self._fields.get("layers_pattern"):
            any_list = _ANY_LAYER.match(module)
            return any_list is not None and int(any_list["idx"]) in self._layers
        match = self._found["layers_pattern"].get(module)
        return match is not None and match.layer in self._layers - {NO_LAYER}


def _dotted_suffixes(name: str) -> Iterator[str]:
    """Yield the name, and what follows each of its dots."""
    yield name
    while name := name.partition(".")[2]:
        yield name


def read_peft_config(path: Path, bases: Sequence[str]) -> Checked[PeftConfig | None]:
    """Read and check an adapter's `adapter_config.json`, see `read_fields` and `check_fields`."""
    fields = yield from read_fields(path)
    return None if fields is None else (yield from check_fields(fields, bases))


def read_fields(path: Path) -> Checked[dict[str, Any] | None]:
    """Read the fields of a config. Returns None if it is no JSON object."""
    if not path.is_file():
        yield missing_config(path.parent)
        return None
    try:
        content = read_regular(path, MAX_CONFIG_BYTES)
        if is_pointer(content):
            yield pointer_message(path.name)
            return None
        fields = json.loads(content.decode("utf-8"))
    except TooLargeError as error:
        yield f"{path.name}: {error.strerror}"
        return None
    except (OSError, ValueError, RecursionError) as error:
        yield f"{path.name}: expected JSON, got: {shorten(str(error))}"
        return None
    if not isinstance(fields, dict):
        yield f"{path.name}: expected a JSON object, got {type(fields).__name__}"
        return None
    return fields


def check_fields(fields: dict[str, Any], bases: Sequence[str]) -> Checked[PeftConfig | None]:
    """Check the fields of a config. Returns None if they cannot be used at all.

    Args:
        bases: names (fnmatch patterns) of the served base model.
    """
    kind = fields.get("peft_type", _LORA)
    if kind != _LORA:  # the other fields and the weights are those of another method
        named = f", which is {_METHODS[kind]}" if isinstance(kind, str) and kind in _METHODS else ""
        yield f"peft_type: expected {_LORA}, got {show(kind)}{named}; only LoRA adapters can be served"
        return None
    unusable = [*_wrong_types(fields), *_beyond_limits(fields)]
    yield from unusable
    if unusable:
        return None
    yield from _unsupported(fields)
    yield from check_base_name(fields.get("base_model_name_or_path"), bases)
    return PeftConfig(fields)


def _wrong_types(fields: dict[str, Any]) -> Iterator[str]:
    if not _is_count(fields.get("r", 8)):
        yield f"r: expected a whole number from 1 to {MAX_RANK}, got {show(fields.get('r'))}"
    for name, good, kind in (
        ("rank_pattern", _is_count, f"ranks up to {MAX_RANK}"),
        ("alpha_pattern", _is_number, "numbers"),
    ):
        value = fields.get(name) or {}
        if not isinstance(value, dict) or not all(good(item) for item in value.values()):
            yield f"{name}: expected an object of {kind} by module pattern, got {show(value)}"
    if not _is_number(fields.get("lora_alpha", 8)):
        yield f"lora_alpha: expected a number, got {show(fields.get('lora_alpha'))}"
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        value = fields.get(name)
        if not (value is None or isinstance(value, str) or _is_list(value, str)):
            yield f"{name}: expected a list of names or a pattern, got {show(value)}"
    yield from wrong_token_fields(fields)
    layers = fields.get("layers_to_transform")
    if not (layers is None or isinstance(layers, int) or _is_list(layers, int)):
        yield f"layers_to_transform: expected layer numbers, got {show(layers)}"
    if not fields.get("target_modules"):
        yield f"target_modules: expected at least one module, got {show(fields.get('target_modules'))}"


def _beyond_limits(fields: dict[str, Any]) -> Iterator[str]:
    for name, limit in MAX_ENTRIES.items():
        value = fields.get(name) or ()
        entries = [value] if isinstance(value, str) else value if isinstance(value, list | dict) else []
        if len(entries) > limit:
            yield f"{name}: expected at most {limit} entries, got {len(entries)}"
        longest = max((entry for entry in entries if isinstance(entry, str)), key=len, default="")
        if len(longest) > MAX_PATTERN_CHARS:
            got = f"{len(longest)}: {show(longest)}"
            yield f"{name}: expected entries of at most {MAX_PATTERN_CHARS} characters, got {got}"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_RANK


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _FLOAT32_MAX


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _unsupported(fields: dict[str, Any]) -> Iterator[str]:
    if fields.get("bias", "none") not in _BIASES:
        yield f"bias: expected one of {', '.join(_BIASES)}, got {show(fields['bias'])}"
    if fields.get("use_dora") and fields.get("lora_bias"):
        yield "lora_bias: PEFT does not combine it with use_dora; expected one of them"
    yield from check_invocation(fields)
    if fields.get("init_lora_weights", True) not in _PLAIN_INIT:
        yield (
            f"init_lora_weights: {show(fields['init_lora_weights'])} changes the base weights; "
            "convert the adapter with `ranklet adapters convert`"
        )
    yield from unsupported_token_fields(fields)
    yield from _unsupported_layers(fields)
    for name, value in fields.items():
        if name not in _HARMLESS and name not in _APPLIED and value not in (None, False, [], {}, ""):
            yield f"{shorten(name)}: not supported; train the adapter without it"


def _unsupported_layers(fields: dict[str, Any]) -> Iterator[str]:
    """Yield findings on fields of layers that PEFT refuses, where it would ignore them."""
    layers, pattern = fields.get("layers_to_transform"), fields.get("layers_pattern")
    if isinstance(fields["target_modules"], str):
        for name, value in (("layers_to_transform", layers), ("layers_pattern", pattern)):
            if value not in (None, []):
                yield f"{name}: PEFT does not combine it with a pattern in target_modules; expected one of them"
    elif pattern and layers is None:
        yield "layers_pattern: expected layers_to_transform beside it, which names the layers, got none"
