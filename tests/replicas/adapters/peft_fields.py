"""Write replicas/PEFT.md: what ranklet does with each field of PEFT's LoraConfig."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft

from ranklet.replicas.adapters.findings import Checked, collect
from ranklet.replicas.adapters.peft_config import check_fields

FILE = Path(__file__).parents[3] / "replicas" / "PEFT.md"
_MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
_BASE = "base"


@dataclass(frozen=True)
class Followed:
    """The field is applied as PEFT applies it. `test` compares both; `but` says where it is refused."""

    test: str
    but: str = ""


@dataclass(frozen=True)
class Unused:
    """The field changes no answer, so each value of it is accepted."""

    example: Any
    reason: str


@dataclass(frozen=True)
class Refused:
    """Values other than PEFT's default are refused with a message."""

    example: Any


_TARGETS = Followed("test_targets_equal_those_of_peft")
_SCALINGS = Followed("test_ranks_and_scalings_equal_those_of_peft")
_TERMS = Followed("test_vectors_of_mixed_batches_equal_those_of_peft")
_ROWS = Followed("test_logprobs_of_mixed_texts_with_token_rows_equal_those_of_peft")
_DESCRIBES = "describes the file or the library"
_TRAINING = "used in training only"
FIELDS: dict[str, Followed | Unused | Refused] = {
    "task_type": Followed("test_logits_equal_those_of_transformers_and_peft"),
    "peft_type": Refused("IA3"),
    "auto_mapping": Unused({"base_model_class": "Qwen3Model"}, _DESCRIBES),
    "peft_version": Unused("0.21.2", _DESCRIBES),
    "base_model_name_or_path": Followed("test_names_of_the_served_base_are_accepted"),
    "revision": Unused("main", _DESCRIBES),
    "inference_mode": Unused(True, _DESCRIBES),
    "r": _SCALINGS,
    "target_modules": _TARGETS,
    "exclude_modules": _TARGETS,
    "lora_alpha": _SCALINGS,
    "lora_dropout": Unused(0.1, _TRAINING),
    "fan_in_fan_out": Refused(True),
    "bias": _TERMS,
    "use_rslora": _SCALINGS,
    "modules_to_save": Followed(_ROWS.test, " for `embed_tokens`, `lm_head` and heads of classifiers"),
    "init_lora_weights": Refused("pissa"),
    "layers_to_transform": _TARGETS,
    "layers_pattern": _TARGETS,
    "rank_pattern": _SCALINGS,
    "alpha_pattern": _SCALINGS,
    "megatron_config": Refused({"hidden_size": 128}),
    "megatron_core": Unused("megatron.core", _TRAINING),
    "trainable_token_indices": Followed(_ROWS.test, " for `embed_tokens` and `lm_head`"),
    "loftq_config": Unused({"loftq_bits": 4}, "init_lora_weights says whether it was used"),
    "eva_config": Unused({"rho": 2.0}, "its initialisation leaves the base as it is"),
    "corda_config": Unused({"corda_method": "kpm"}, "init_lora_weights says whether it was used"),
    "lora_ga_config": Unused({"direction": "ArB2r"}, "init_lora_weights says whether it was used"),
    "use_dora": Followed(_TERMS.test, ", refused by name beside `ensure_weight_tying` and on matrices with own rows"),
    "velora_config": Unused({"num_groups": 4}, "changes the gradients only"),
    "alora_invocation_tokens": Followed(
        "test_texts_of_mixed_batches_equal_those_of_peft",
        ", refused by name where PEFT activates nothing, such as on `embed_tokens`, and beside fields that change "
        "earlier tokens too, such as `bias`",
    ),
    "use_qalora": Refused(True),
    "qalora_group_size": Unused(16, "read with use_qalora only"),
    "monteclora_config": Refused({"samples": 4}),
    "layer_replication": Refused([[0, 2], [1, 3]]),
    "runtime_config": Unused({"ephemeral_gpu_offload": True}, "says where PEFT computes"),
    "lora_bias": Followed(_TERMS.test, ", refused by name on `embed_tokens`, as in PEFT"),
    "target_parameters": Refused(["mlp.experts.gate_up_proj"]),
    "use_bdlora": Refused({"nblocks": 2}),
    "arrow_config": Refused({"top_k": 2}),
    "kasa_config": Refused({"beta": 0.1}),
    "ensure_weight_tying": Followed("test_common_kinds_of_adapters_answer_as_peft_does"),
}


def message(name: str, value: Any) -> str:
    """Return what ranklet says of a config with this field; empty if it is accepted."""

    def check() -> Checked[None]:
        config = yield from check_fields({"target_modules": ["q_proj"], name: value}, (_BASE,))
        if config is not None:
            yield from config.apply(_MODULES)

    return "; ".join(collect(check())[1])


def table() -> str:
    """Return the document.

    Raises:
        KeyError: PEFT has a field that is not in `FIELDS`.
    """
    version = ".".join(peft.__version__.split(".")[:2])
    lines = [
        f"# Fields of PEFT {version}'s `LoraConfig`", "",
        "Made by `python -m tests.replicas.adapters.peft_fields`, which reads the fields from PEFT.", "",
        "| field | value | what ranklet does |", "|---|---|---|",
    ]  # fmt: skip
    for field in dataclasses.fields(peft.LoraConfig):
        match FIELDS[field.name]:
            case Followed(test, but):
                lines.append(f"| `{field.name}` | any | followed{but}; `{test}` |")
            case Unused(_, reason):
                lines.append(f"| `{field.name}` | any | accepted: {reason} |")
            case Refused(example):
                shown = json.dumps(example)
                lines.append(f'| `{field.name}` | such as `{shown}` | refused: "{message(field.name, example)}" |')
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FILE.write_text(table(), encoding="utf-8")
