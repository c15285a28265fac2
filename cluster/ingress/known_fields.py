"""Fields of requests that ranklet does not honour: refused if they change the answer, otherwise accepted or ignored.

Clients send many fields of other servers at values that change nothing, such as `best_of: 1`. A refused field is
therefore accepted at these values, and if it is null.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson

from ranklet.cluster.ingress.protocol import describe_value
from ranklet.replicas.errors import InvalidRequest

IGNORED_HEADER: Final = "x-ranklet-ignored"
_MAX_NAMED = 20
_EMPTY: tuple[Any, ...] = ("", [], {})  # mean the same as null
_PLAIN_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)


@dataclass(frozen=True)
class RefusedField:
    """A field that would change the answer.

    Attributes:
        neutral: values that change nothing, besides null.
        remedy: what to do instead.
    """

    neutral: tuple[Any, ...] = ()
    remedy: str = "Leave it out"


@dataclass(frozen=True)
class KnownFields:
    """The fields of a kind of requests that its form does not have.

    Attributes:
        refused: by name.
        accepted: fields that change nothing.
    """

    refused: Mapping[str, RefusedField]
    accepted: Collection[str]

    def check(self, fields: Mapping[str, Any], honoured: Collection[str]) -> tuple[str, ...]:
        """Return the names of unknown fields. Raises InvalidRequest for a refused one that changes the answer."""
        unknown = []
        for name, value in fields.items():
            if name in honoured or name in self.accepted or value is None:
                continue
            refused = self.refused.get(name)
            if refused is None:
                unknown.append(name)
            elif not any(_equals(value, neutral) for neutral in refused.neutral):
                neutral = " or ".join(_written(each) for each in refused.neutral if each not in _EMPTY) or "null"
                raise InvalidRequest(
                    f"{name}: this field is not supported: expected {neutral}, got {describe_value(value)}. "
                    f"{refused.remedy}",
                    param=name,
                )
        return tuple(unknown)


def ignored_value(names: Collection[str]) -> str:
    """Return the value of the header that names ignored fields. Clients choose the names, so it is bounded."""
    shown = [name if _PLAIN_NAME.fullmatch(name) else "?" for name in list(names)[:_MAX_NAMED]]
    return ",".join([*shown, *(["..."] if len(names) > _MAX_NAMED else [])])


def _equals(value: Any, neutral: Any) -> bool:
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)


def _written(value: Any) -> str:
    return orjson.dumps(value).decode()


_PLAIN = RefusedField()
_OFF = RefusedField((False,))
_EMPTY_LIST = RefusedField(([],))
_EMPTY_OBJECT = RefusedField(({},))

# Fields of other servers, and of clients, that would lead to another model or other fields.
_ELSEWHERE: Final = {
    **dict.fromkeys(
        ("adapter", "adapter_id", "adapter_name", "lora", "lora_id", "lora_name", "lora_request"),
        RefusedField(("",), "Name the adapter in model"),
    ),
    "adapter_source": RefusedField(("",), "Load the adapter by name first"),
    "adapter_parameters": RefusedField(({},), "Adapters are not merged"),
    "extra_body": RefusedField(({},), "Send its fields beside the others: only OpenAI's Python client unpacks it"),
}
_CUTS: Final = "Use truncate_prompt_tokens, -1 for the longest prompt"
_REFUSED: Final = _ELSEWHERE | {
    "use_beam_search": _OFF,
    "length_penalty": RefusedField((1,)),
    "early_stopping": _OFF,
    "bad_words": RefusedField(([],), "Use logit_bias with -100 for the ids of the words"),
    "stop_regex": RefusedField(([], ""), "Use stop"),
    "no_stop_trim": RefusedField((False,), "Use include_stop_str_in_output"),
    "priority": RefusedField((0,)),
    "max_new_tokens": RefusedField((), "Use max_tokens"),
    "min_new_tokens": RefusedField((0,), "Use min_tokens"),
    "do_sample": RefusedField((), "Use temperature: 0 for the likeliest tokens"),
    "custom_logit_processor": RefusedField(("",)),
    "custom_params": _EMPTY_OBJECT,
    "logits_processors": _EMPTY_LIST,
    "logit_processors": _EMPTY_LIST,
    "vllm_xargs": _EMPTY_OBJECT,
    "kv_transfer_params": _EMPTY_OBJECT,
    "prompt_embeds": _EMPTY_LIST,
    "input_embeds": _EMPTY_LIST,
    "thinking_token_budget": _PLAIN,
    "repetition_detection": _PLAIN,
    "logprob_token_ids": _EMPTY_LIST,
    "token_ids_logprob": _EMPTY_LIST,
    "return_hidden_states": _OFF,
    "spaces_between_special_tokens": RefusedField((True,)),
    "truncate": RefusedField((False, "NONE"), _CUTS),
    "truncation": RefusedField((False, "disabled"), _CUTS),
    "store": RefusedField((False,), "Answers are not stored. Leave it out"),
    "service_tier": RefusedField(("auto", "default")),
    "guided_decoding_backend": RefusedField(("", "auto", "guidance"), "It is llguidance. Leave it out"),
    "guided_whitespace_pattern": RefusedField(("",)),
    "structural_tag": RefusedField(({}, "")),
    "ebnf": RefusedField(("",), "Send a grammar in Lark's form as structured_outputs.grammar"),
}
_ACCEPTED: Final = frozenset(
    {
        "user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
        "stream_interval",
    }
)  # fmt: skip

COMPLETION_FIELDS: Final = KnownFields(
    _REFUSED
    | {
        "suffix": RefusedField(("",)),
        "max_completion_tokens": RefusedField((), "Use max_tokens"),
        "messages": RefusedField((), "Send messages to /v1/chat/completions"),
    },
    _ACCEPTED,
)
CHAT_FIELDS: Final = KnownFields(
    _REFUSED
    | {
        "prompt": RefusedField((), "Send a prompt to /v1/completions"),
        "audio": _PLAIN,
        "modalities": RefusedField((["text"],)),
        "web_search_options": _PLAIN,
        "functions": RefusedField(([],), "Send tools"),
        "function_call": RefusedField(("none",), "Send tool_choice"),
        "prediction": _PLAIN,
        "moderation": _PLAIN,
        "chat_template": RefusedField(("",), "A template is code. Put it into the adapter's folder"),
        "echo": _OFF,
        "verbosity": RefusedField(("medium",)),
        "include_reasoning": RefusedField((True,), "Send separate_reasoning, and leave reasoning_content out"),
        "stream_reasoning": RefusedField((True,)),
        "mm_processor_kwargs": _EMPTY_OBJECT,
        "input_ids": RefusedField((), "Send token ids to /v1/completions"),
    },
    _ACCEPTED,
)
_PROMPT: Final = "Put it before each text, or name a prompt of the model's folder in prompt_name"
_FLOATS: Final = "Vectors are float32; encoding_format is float or base64"
EMBEDDING_FIELDS: Final = KnownFields(
    _ELSEWHERE
    | {
        **dict.fromkeys(("prompt", "instruction", "task", "task_type"), RefusedField(("",), _PROMPT)),
        "embed_dtype": RefusedField(("float32", "float"), _FLOATS),
        "output_dtype": RefusedField(("float", "float32"), _FLOATS),
        "precision": RefusedField(("float32", "float"), _FLOATS),
        "embedding_type": RefusedField(("float", "float32"), _FLOATS),
        "embedding_types": RefusedField((["float"], []), _FLOATS),
        "encoding": RefusedField(("float",), "Use encoding_format"),
        "endianness": RefusedField(("little", "native"), "Vectors in base64 are little-endian"),
        "output_dimension": RefusedField((), "Use dimensions"),
        "truncate_dim": RefusedField((), "Use dimensions"),
        "truncate": RefusedField((False, "NONE"), _CUTS),
        "truncation": RefusedField((False, "disabled"), _CUTS),
        "truncation_direction": RefusedField(("Right", "right"), "Use truncation_side"),
        "max_length": RefusedField((), _CUTS),
        "max_tokens": RefusedField((), _CUTS),
        "softmax": _OFF,
        "activation": _OFF,
        "pooling": _PLAIN,
        "pooling_type": _PLAIN,
        "pooling_task": RefusedField(("embed",)),
        "embd_normalize": RefusedField((2,), "Use normalize"),
        "late_chunking": _OFF,
        "return_sparse": _OFF,
        "return_colbert_vecs": _OFF,
        "modality": RefusedField(("text",)),
        "images": _EMPTY_LIST,
        "image_data": _EMPTY_LIST,
        "mm_processor_kwargs": _EMPTY_OBJECT,
        **dict.fromkeys(("inputs", "texts", "text", "content"), RefusedField((), "Use input")),
        "input_ids": RefusedField((), "Send token ids as input"),
        "messages": RefusedField((), "Send texts as input. Chats are for /v1/chat/completions"),
        "chat_template": RefusedField(("",), "Send texts as input"),
        "chat_template_kwargs": _EMPTY_OBJECT,
        "add_generation_prompt": _OFF,
        "continue_final_message": _OFF,
    },
    {
        "user", "metadata", "safety_identifier", "priority", "input_type", "request_id", "rid", "cache_salt",
    },
)  # fmt: skip
_SCORES: Final = _ELSEWHERE | {
    "activation": RefusedField((True,), "Use use_activation: false for logits"),
    "softmax": RefusedField((True,), "Use use_activation: false for logits"),
    "raw_scores": RefusedField((False,), "Use use_activation: false for logits"),
    "instruction": RefusedField(("",), "Put it into the template in the adapter's ranklet.json, or before the query"),
    "chat_template": RefusedField(("",), "Put the template into the adapter's ranklet.json"),
    "chat_template_kwargs": _EMPTY_OBJECT,
    "mm_processor_kwargs": _EMPTY_OBJECT,
    "messages": RefusedField((), "Send texts"),
    "truncate": RefusedField((False, "NONE"), _CUTS),
    "truncation": RefusedField((False, "disabled"), _CUTS),
    "max_length": RefusedField((), _CUTS),
}
_SCORES_ACCEPTED: Final = frozenset(
    {"user", "metadata", "safety_identifier", "priority", "request_id", "rid", "cache_salt"}
)
CLASSIFY_FIELDS: Final = KnownFields(
    _SCORES | dict.fromkeys(("inputs", "texts", "text"), RefusedField((), "Use input")), _SCORES_ACCEPTED
)
_PAIRS: Final = _SCORES | {
    "max_chunks_per_doc": RefusedField((1,), "Send each part as a document"),
    "rank_fields": RefusedField((["text"], []), "Send each document as a text"),
    "return_embeddings": _OFF,
    "task": RefusedField(("",), "Put it before the query"),
}
RERANK_FIELDS: Final = KnownFields(
    _PAIRS
    | {
        "top_k": RefusedField((), "Use top_n"),
        "return_text": RefusedField((True,), "Use return_documents"),
        "texts": RefusedField((), "Use documents"),
    },
    _SCORES_ACCEPTED,
)
SCORE_FIELDS: Final = KnownFields(
    _PAIRS
    | dict.fromkeys(
        ("queries", "documents", "items", "data_1", "data_2", "query"), RefusedField((), "Use text_1 and text_2")
    )
    | {"max_tokens_per_doc": RefusedField((), _CUTS)},
    _SCORES_ACCEPTED,
)
TOKENIZE_FIELDS: Final = KnownFields(
    _ELSEWHERE
    | {
        "chat_template": CHAT_FIELDS.refused["chat_template"],
        "mm_processor_kwargs": _EMPTY_OBJECT,
        "documents": _EMPTY_LIST,
        "truncate_prompt_tokens": RefusedField((), "Cut the answer's tokens"),
    },
    _ACCEPTED,
)
DETOKENIZE_FIELDS: Final = KnownFields(
    _ELSEWHERE | {"skip_special_tokens": RefusedField((False,), "The text has all special tokens")}, _ACCEPTED
)
