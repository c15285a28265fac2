"""Reads what an adapter for sequence classification says of its labels, as transformers and PEFT save it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

from ranklet.replicas.errors import ModelError
from ranklet.replicas.model.folder import read_json
from ranklet.replicas.model.tokenizer_files import is_id, show

MODEL_CONFIG_FILE: Final = "config.json"
HEAD_NAMES: Final = ("score", "classifier")  # PEFT saves the trained one of these modules
MAX_LABELS: Final = 4096
_MAX_LABEL_CHARS: Final = 256
_MAX_BYTES: Final = 1 << 20
_TASK: Final = "SEQ_CLS"
Problem = Literal["single_label_classification", "multi_label_classification", "regression"]


@dataclass(frozen=True)
class Classifier:
    """The labels of a head that computes logits of a text's last token.

    Attributes:
        labels: None if the folder does not name them.
        problem: what the logits are; None if the folder does not say.
        pad_id: the last token is the last one that is not this token, as in transformers. None for any token.
    """

    labels: tuple[str, ...] | None = None
    problem: Problem | None = None
    pad_id: int | None = None

    def label(self, index: int) -> str:
        return f"LABEL_{index}" if self.labels is None else self.labels[index]


def is_classifier(fields: Mapping[str, Any]) -> bool:
    """Return whether the fields of an adapter's config are those of sequence classification."""
    saved = fields.get("modules_to_save")
    only_head = isinstance(saved, list) and bool(saved) and all(name in HEAD_NAMES for name in saved)
    return fields.get("task_type") == _TASK or (only_head and fields.get("task_type") in (None, "FEATURE_EXTRACTION"))


def read_classifier(folder: Path, model_dir: Path | None) -> Classifier:
    """Read the labels of an adapter's folder from the `config.json` beside its weights.

    Args:
        model_dir: folder of the base model, whose padding token counts if the adapter's folder names none.

    Raises:
        ModelError: a file cannot be read, or its labels are not numbered from 0 on.
    """
    own = _read(folder)
    problem = own.get("problem_type")
    if problem not in (None, *get_args(Problem)):
        raise ModelError(
            f"{MODEL_CONFIG_FILE}: problem_type: expected one of {', '.join(get_args(Problem))}, got {show(problem)}"
        )
    base = {} if model_dir is None or "pad_token_id" in own else _read(model_dir)
    pad_id = (own | base).get("pad_token_id")
    if pad_id is not None and not is_id(pad_id):
        raise ModelError(f"{MODEL_CONFIG_FILE}: pad_token_id: expected a token id, got {show(pad_id)}")
    return Classifier(_labels(own), problem, pad_id)


def _labels(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    found, count = config.get("id2label"), config.get("num_labels")
    if found is None:
        if count is None:
            return None
        if not is_id(count) or not 1 <= count <= MAX_LABELS:
            raise ModelError(f"{MODEL_CONFIG_FILE}: num_labels: expected 1 to {MAX_LABELS}, got {show(count)}")
        return tuple(f"LABEL_{index}" for index in range(count))
    if not isinstance(found, dict) or not 1 <= len(found) <= MAX_LABELS:
        raise ModelError(f"{MODEL_CONFIG_FILE}: id2label: expected 1 to {MAX_LABELS} labels, got {show(found)}")
    return tuple(_in_order(found))


def _in_order(labels: dict[str, Any]) -> Iterator[str]:
    for index in range(len(labels)):
        label = labels.get(str(index))
        if not isinstance(label, str) or len(label) > _MAX_LABEL_CHARS:
            raise ModelError(
                f"{MODEL_CONFIG_FILE}: id2label: expected texts of at most {_MAX_LABEL_CHARS} characters by the "
                f"numbers 0 to {len(labels) - 1}, got {show(label)} for {index}"
            )
        yield label


def _read(folder: Path) -> dict[str, Any]:
    path = folder / MODEL_CONFIG_FILE
    found: dict[str, Any] = read_json(path, dict, MODEL_CONFIG_FILE, _MAX_BYTES) if path.is_file() else {}
    return found
