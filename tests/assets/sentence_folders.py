"""Writes the files that sentence-transformers saves beside a model or an adapter, from a description of them."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sentence_transformers.base.modules.dense import Dense

HIDDEN = 32
SMALL_MODEL: dict[str, Any] = {
    "hidden_size": HIDDEN, "intermediate_size": 48, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 16,
    "vocab_size": 600, "max_position_embeddings": 128,
}  # fmt: skip
MODULES = {
    "Transformer": "sentence_transformers.base.modules.transformer.Transformer",
    "Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    "Dense": "sentence_transformers.base.modules.dense.Dense",
    "Normalize": "sentence_transformers.base.modules.normalize.Normalize",
}
OLD_FLAGS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}


@dataclass(frozen=True)
class SentenceFolder:
    """What a folder says about embeddings.

    Attributes:
        modules: kinds in order.
        old_names: write the fields as releases before 6 do.
        prompt: the default prompt.
        prompts: others, by name.
        transformer: content of sentence_bert_config.json; None writes no file.
        tokenizer: changed fields of tokenizer_config.json.
        appends: whether the tokenizer's post-processor appends the end token; None leaves it as it is.
        lowers: whether the tokenizer lowercases.
        dense: arguments of each Dense layer, but its input's width. The layers follow the pooling.
    """

    modules: tuple[str, ...] = ("Transformer", "Pooling", "Normalize")
    mode: str = "lasttoken"
    include_prompt: bool = True
    old_names: bool = False
    prompt: str = ""
    prompts: dict[str, str] = field(default_factory=dict)
    transformer: dict[str, Any] | None = None
    tokenizer: dict[str, Any] = field(default_factory=dict)
    appends: bool | None = None
    lowers: bool = False
    dense: tuple[dict[str, Any], ...] = ()

    def write(self, folder: Path, hidden: int) -> Path:
        """Write the files into a folder that has the tokenizer's."""
        after = self.modules.index("Pooling") + 1
        kinds = (*self.modules[:after], *("Dense" for _ in self.dense), *self.modules[after:])
        paths = ["" if kind == "Transformer" else f"{index}_{kind}" for index, kind in enumerate(kinds)]
        types = {kind: f"sentence_transformers.models.{kind}" if self.old_names else MODULES[kind] for kind in kinds}
        _write(
            folder / "modules.json",
            [
                {"idx": index, "name": str(index), "path": path, "type": types[kind]}
                for index, (kind, path) in enumerate(zip(kinds, paths, strict=True))
            ],
        )
        if self.old_names:
            flags = {flag: mode == self.mode for mode, flag in OLD_FLAGS.items()}
            pooling: dict[str, Any] = {"word_embedding_dimension": hidden, **flags}
        else:
            pooling = {"embedding_dimension": hidden, "pooling_mode": self.mode}
        pooling_path = folder / paths[kinds.index("Pooling")]
        _write(pooling_path / "config.json", {**pooling, "include_prompt": self.include_prompt})
        for path, arguments in zip(paths[after:], self.dense, strict=False):
            layer = Dense(hidden, **arguments)
            (folder / path).mkdir(exist_ok=True)
            layer.save(str(folder / path))
            hidden = layer.out_features
        if self.transformer is not None:
            _write(folder / "sentence_bert_config.json", self.transformer)
        default = {"prompts": {"task": self.prompt, **self.prompts}, "default_prompt_name": "task"}
        prompts = default if self.prompt else {"prompts": self.prompts}
        _write(folder / "config_sentence_transformers.json", prompts)
        self._change_tokenizer(folder)
        return folder

    def _change_tokenizer(self, folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        _write(path, json.loads(path.read_text()) | self.tokenizer)
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text())
        if self.appends is False:
            content["post_processor"] = None
        if self.lowers:
            content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, content["normalizer"]]}
        path.write_text(json.dumps(content, ensure_ascii=False))


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
