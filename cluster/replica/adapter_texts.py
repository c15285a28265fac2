"""What gateways need of an adapter's folder to make prompts and texts. Gateways have no remote adapters' files."""

import threading
from collections import OrderedDict
from pathlib import Path

from ranklet.cluster.message import AdapterText
from ranklet.cluster.replica.pair_template import pair_template
from ranklet.cluster.replica.ranklet_file import RankletFile, read_ranklet_file
from ranklet.cluster.reranking import Reranking
from ranklet.cluster.text.render_process import RenderProcess
from ranklet.cluster.text.template import folder_special_tokens, folder_template
from ranklet.replicas.adapters.adapter_settings import AdapterSettings
from ranklet.replicas.adapters.reference import RANKLET_FILE, AdapterRef
from ranklet.replicas.adapters.revision import check_unchanged
from ranklet.replicas.errors import InvalidRequest
from ranklet.replicas.model.added_tokens import AddedTokens
from ranklet.replicas.model.logit_score import LogitScore
from ranklet.replicas.model.tokenizer_files import UnusableTokenError

_MAX_KEPT = 256
_TWO_SCORES = (
    f"rerank in {RANKLET_FILE}: expected no false_token_id and true_token_id for a classifier, whose scores are those "
    "of its head"
)


class AdapterTexts:
    """Reads the folders of adapters, each revision once. Thread-safe.

    Args:
        settings: of embeddings.
    """

    def __init__(self, model_dir: Path, settings: AdapterSettings) -> None:
        self._model_dir = model_dir
        self._settings = settings
        self._renderer = RenderProcess()
        self._kept: OrderedDict[AdapterRef, AdapterText] = OrderedDict()
        self._lock = threading.Lock()  # one folder at a time

    def describe(self, adapter: AdapterRef) -> AdapterText:
        """Return the description of a revision. Blocks.

        Raises:
            AdapterChanged: the folder no longer has this revision.
            Unavailable: the vocabularies were not compared in time.
        """
        with self._lock:
            found = self._kept.get(adapter)
            if found is None:
                found = self._read(adapter)
                check_unchanged(adapter)
                self._kept[adapter] = found
                if len(self._kept) > _MAX_KEPT:
                    self._kept.popitem(last=False)
            return found

    def _read(self, adapter: AdapterRef) -> AdapterText:
        folder = Path(adapter.path)
        template, tokens, findings = None, dict[str, str](), list[str]()
        try:
            template = folder_template(folder)
            tokens = folder_special_tokens(folder)
        except UnusableTokenError as error:
            findings.append(str(error))
        compared = self._settings.tokenizers.compare(adapter)
        findings += (finding for finding in compared.findings if finding not in findings)
        settings = RankletFile()
        try:
            settings = read_ranklet_file(folder)
        except InvalidRequest as error:
            findings.append(error.message)
        embedding, reranking = self._settings.read(adapter), settings.reranking
        if embedding.classifier is not None and reranking is not None and reranking.tokens is not None:
            findings.append(_TWO_SCORES)
        if embedding.logit_score is not None and not findings:
            try:
                reranking = self._by_logits(embedding.logit_score, reranking or Reranking(), template, tokens)
            except InvalidRequest as error:
                findings.append(error.message)
        return AdapterText(
            adapter.revision, template, tokens, tuple(findings), embedding, settings.constraint, settings.tool_format,
            reranking, AddedTokens.of(compared.added), adapter.invocation,
        )  # fmt: skip

    def _by_logits(
        self, score: LogitScore, own: Reranking, chat_template: str | None, tokens: dict[str, str]
    ) -> Reranking:
        """Complete what `ranklet.json` says of a causal reranker."""
        template = own.template
        if template is None:
            tokens = folder_special_tokens(self._model_dir) | tokens
            template = pair_template(score, chat_template, tokens, self._renderer)
        return Reranking(template, own.tokens or score.tokens)
