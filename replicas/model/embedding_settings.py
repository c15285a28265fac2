"""Reads how a folder turns texts into vectors: the files that sentence-transformers saves beside a model or adapter.

Every setting that changes a vector is followed, or refused by name. Settings that only shape training, memory or speed
are accepted. An adapter's folder may come from anyone, so its files have limits and its values are checked.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any

from ranklet.replicas.errors import ModelError
from ranklet.replicas.model.classifier import Classifier
from ranklet.replicas.model.dense_settings import DenseSettings
from ranklet.replicas.model.logit_score import LogitScore, read_logit_score
from ranklet.replicas.model.score_activation import scores_are_logits
from ranklet.replicas.model.sentence_files import (
    MODULES_FILE,
    POOLING_FILE,
    PROMPTS_FILE,
    TRANSFORMER_FILE,
    expect,
    is_file,
    read_optional,
)
from ranklet.replicas.model.sentence_modules import is_cross_encoder, is_logit_score, read_modules
from ranklet.replicas.model.sentence_tokenization import read_tokenization
from ranklet.replicas.model.tokenizer_files import show

_MAX_PROMPT_CHARACTERS = 4096  # of an adapter's prompts, which are put before each text


@dataclass(frozen=True)
class Prompting:
    """What of a folder's settings makes the prompts of a request.

    Attributes:
        name: of the prompt that the request names; None for the default one.
        text: before every input.
        max_tokens: limit on the tokens of a prompt; None for the model's own.
        pools_text: whether pooling reads the tokens of `text`.
        added_tokens: digest of the tokens that the tokenizer has besides the base model's.
    """

    name: str | None = None
    text: str = ""
    max_tokens: int | None = None
    pools_text: bool = True
    added_tokens: str = ""


@dataclass(frozen=True)
class EmbeddingSettings:
    """How texts become vectors.

    Attributes:
        mode: pooling: last, mean or cls.
        normalize: whether vectors have length 1.
        prompt: text before every input.
        prompts: other texts that a request may name instead.
        max_tokens: limit on the tokens of a prompt; None for the model's own.
        lower: whether texts are lowercased.
        special_tokens: whether the tokenizer adds its special tokens.
        pools_prompt: whether pooling reads the tokens of the prompt.
        dense: layers between pooling and normalization.
        classifier: an adapter that computes scores instead of vectors.
        logit_score: a causal reranker.
        cross_encoder: whether sentence-transformers has saved the folder as a reranker with a head.
        scores_are_logits: whether a reranker's scores are its logits instead of their sigmoid.
        added_tokens: digest of the tokens that an adapter's tokenizer has besides the base model's.
    """

    mode: str = "last"
    normalize: bool = True
    prompt: str = ""
    prompts: Mapping[str, str] = dataclass_field(default_factory=dict, hash=False)
    max_tokens: int | None = None
    lower: bool = False
    special_tokens: bool = True
    pools_prompt: bool = True
    dense: tuple[DenseSettings, ...] = ()
    classifier: Classifier | None = None
    logit_score: LogitScore | None = None
    cross_encoder: bool = False
    scores_are_logits: bool = False
    added_tokens: str = ""

    def prompting(self, name: str | None = None) -> Prompting | None:
        """Return how prompts are made for a request that names this prompt; None if the folder has no such prompt."""
        text = self.prompt if name is None else self.prompts.get(name)
        if text is None:
            return None
        return Prompting(name, text, self.max_tokens, self.pools_prompt or not text, self.added_tokens)


def read_base_settings(model_dir: Path) -> EmbeddingSettings:
    """Read the settings of a base model's folder.

    Raises:
        ModelError: a file cannot be read, or a setting is not supported.
    """
    try:
        return read_embedding_settings(model_dir)
    except ModelError as error:
        raise ModelError(f"{model_dir}: {error.message}") from error


def read_embedding_settings(
    folder: Path, base: EmbeddingSettings | None = None, *, classifies: bool = False
) -> EmbeddingSettings:
    """Read the settings of a folder.

    A base model's folder without `modules.json` is pooled as Qwen3-Embedding: last token and L2 norm. What an adapter's
    folder does not say is as in the base model.

    Args:
        base: settings of the base model, for an adapter's folder.
        classifies: whether the adapter has the head of a classifier.

    Raises:
        ModelError: a file cannot be read, or a setting is not supported. The message names the file within the folder.
    """
    described = is_file(folder / MODULES_FILE)
    settings = base or EmbeddingSettings()
    if described and is_logit_score(folder):
        prompt = _prompts(folder, _MAX_PROMPT_CHARACTERS, "CrossEncoder")["prompt"]
        tokenization = read_tokenization(folder, described=True, may_pad=True, task="text-generation")
        return replace(
            settings, **tokenization, dense=(), logit_score=read_logit_score(folder, prompt),
            scores_are_logits=scores_are_logits(folder),
        )  # fmt: skip
    if described and classifies and is_cross_encoder(folder):
        if _prompts(folder, _MAX_PROMPT_CHARACTERS, "CrossEncoder")["prompt"]:
            raise ModelError(f"{PROMPTS_FILE}: default_prompt_name: expected none for a classifier")
        tokenization = read_tokenization(folder, described=True, may_pad=True, task="sequence-classification")
        return replace(
            settings, **tokenization, dense=(), cross_encoder=True, scores_are_logits=scores_are_logits(folder)
        )
    if described:
        settings = EmbeddingSettings(**read_modules(folder, any_path=base is None))
    elif is_file(folder / POOLING_FILE):
        raise ModelError(f"{POOLING_FILE}: expected {MODULES_FILE} beside it, which says how it is used; it is missing")
    if described or is_file(folder / PROMPTS_FILE):
        types = ("SentenceTransformer", "CrossEncoder") if classifies else ("SentenceTransformer",)
        most = sys.maxsize if base is None else _MAX_PROMPT_CHARACTERS
        settings = replace(settings, **_prompts(folder, most, *types))
    if described or is_file(folder / TRANSFORMER_FILE):
        has_whole_prompts = settings.pools_prompt or not (settings.prompt or any(settings.prompts.values()))
        settings = replace(settings, **read_tokenization(folder, described=described, may_pad=has_whole_prompts))
    return replace(settings, scores_are_logits=True) if classifies and scores_are_logits(folder) else settings


def _prompts(folder: Path, most_characters: int, *model_types: str) -> dict[str, Any]:
    """Return the texts that sentence-transformers prepends to inputs: to every one, and by name."""
    config = read_optional(folder, PROMPTS_FILE)
    expect(PROMPTS_FILE, config, "model_type", (None, *model_types))
    name, found = config.get("default_prompt_name"), config.get("prompts") or {}
    if not isinstance(found, dict) or not all(isinstance(text, str | None) for text in found.values()):
        raise ModelError(f"{PROMPTS_FILE}: prompts: expected texts by name, got {show(found)}")
    prompts = {each: text or "" for each, text in found.items()}
    longest = sum(map(len, (*prompts, *prompts.values())))
    if longest > most_characters:
        raise ModelError(f"{PROMPTS_FILE}: prompts: expected at most {most_characters} characters, got {longest}")
    if name is not None and (not isinstance(name, str) or name not in prompts):
        raise ModelError(f"{PROMPTS_FILE}: default_prompt_name: expected the name of a prompt, got {show(name)}")
    return {"prompt": "" if name is None else prompts[name], "prompts": prompts}
