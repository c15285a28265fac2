"""The inference path of a gateway without Ray; the replicas and the tokenizer are fakes."""

import asyncio
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import yaml
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ranklet.cluster.access.admission import Admission
from ranklet.cluster.access.keys import ApiKeys, new_key
from ranklet.cluster.access.quota import Quotas
from ranklet.cluster.access.quota_ledger import Grant, Ledger, QuotaOwner, Statement
from ranklet.cluster.catalog.registry import Registry
from ranklet.cluster.config import LimitsConfig
from ranklet.cluster.ingress.descriptions import AdapterDescriptions
from ranklet.cluster.ingress.embedding_models import EmbeddingModels
from ranklet.cluster.ingress.embeddings import EmbeddingsTask
from ranklet.cluster.ingress.exchange import Exchange, InferenceServices
from ranklet.cluster.ingress.intake import Intake
from ranklet.cluster.ingress.metrics import GatewayMetrics
from ranklet.cluster.ingress.model_tokens import Tokenizers
from ranklet.cluster.ingress.naming import ModelNames
from ranklet.cluster.ingress.observe import Observer
from ranklet.cluster.ingress.replicas_client import ReplicasClient
from ranklet.cluster.ingress.scoring import SCORING_PATHS
from ranklet.cluster.ingress.status import RecentRequests
from ranklet.cluster.message import (
    AdapterText,
    EmbedResult,
    InferenceCall,
    InferenceReply,
    OtherPrompts,
    Refusal,
    ReplicaDescription,
)
from ranklet.replicas.engine.limits import RequestLimits
from ranklet.replicas.model.added_tokens import AddedTokens
from ranklet.replicas.model.embedding_settings import EmbeddingSettings
from ranklet.replicas.model.tokenizer import Truncation
from ranklet.routing.affinity import Affinity
from ranklet.routing.counters import Counters
from ranklet.routing.report import QueueLoad
from tests.cluster.text.small_tokenizers import make

BASE = "base"
HIDDEN = 32
MAX_MODEL_LEN = 4096
DESCRIPTION = ReplicaDescription(
    "r0", 0, 1, None, "", RequestLimits(2 * MAX_MODEL_LEN, HIDDEN, 1000, MAX_MODEL_LEN), ()
)


class FakeTokenizer:
    """Makes a token of each word. Records its calls, and keeps large texts waiting while `released` is not set."""

    def __init__(self, token: int = 1) -> None:
        self.token = token
        self.backend = make("byte_level")  # whose tokens no text here has
        self.encoded: list[Sequence[str]] = []
        self.most_bytes = 0  # under tokenisation at once
        self.released = threading.Event()
        self.released.set()
        self._bytes = 0
        self._lock = threading.Lock()

    def with_added(self, added: AddedTokens) -> "FakeTokenizer":
        return FakeTokenizer(len(added.tokens))

    def count_prompt(self, prompt: str, *, add_special_tokens: bool | None = None) -> int:
        return len(prompt.split())

    def least_tokens(self, text: str) -> int:
        return len(text.encode()) // 64

    def most_characters(self, tokens: int) -> int:
        return 64 * tokens

    def encode_plain(
        self, texts: Sequence[str], *, add_special_tokens: bool, truncation: Truncation | None = None
    ) -> list[NDArray[np.int32]]:
        return self.encode(texts, truncation=truncation)

    def beginnings(self, texts: Sequence[str], tokens: Sequence[int]) -> list[tuple[str, int]]:
        parts = [text.split()[:most] for text, most in zip(texts, tokens, strict=True)]
        return [(" ".join(part), len(part)) for part in parts]

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[NDArray[np.int32]]:
        return self.encode([" ".join(pair) for pair in pairs])

    def encode(
        self, texts: Sequence[str], *, prompt: str | None = None, add_special_tokens: bool | None = None,
        truncation: Truncation | None = None,
    ) -> list[NDArray[np.int32]]:  # fmt: skip
        texts = [(prompt or "") + text for text in texts]
        size_bytes = sum(map(len, texts))
        with self._lock:
            self.encoded.append(texts)
            self._bytes += size_bytes
            self.most_bytes = max(self.most_bytes, self._bytes)
        if size_bytes > 1000:
            assert self.released.wait(60)
        with self._lock:
            self._bytes -= size_bytes
        longest = None if truncation is None else truncation.tokens
        return [np.full(len(text.split()[:longest]), self.token, np.int32) for text in texts]


class FakeReplicas:
    """Stands in for Ray's handle. Answers each call with ones, or with `refusal`; never if `is_silent`.

    Its adapters have the settings of `description_of_adapters`, and it refuses prompts that other settings have made.
    """

    def __init__(self) -> None:
        self.description = DESCRIPTION
        self.refusal: Refusal | None = None
        self.is_silent = False
        self.calls: list[InferenceCall[Any]] = []
        self.description_of_adapters = AdapterText("v1", None, {})
        self.descriptions = 0
        self.logits: dict[str, Sequence[float]] = {}  # of each prompt, by revision; other answers are vectors
        self._method = ""

    def options(self, *, method_name: str) -> "FakeReplicas":
        self._method = method_name
        return self

    def remote(self, *arguments: Any, **kwargs: Any) -> "asyncio.Future[Any]":
        result: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self._method == "describe":
            result.set_result(self.description)
            return result
        if self._method == "text_description":
            self.descriptions += 1
            result.set_result(self.description_of_adapters)
            return result
        self.calls.append(arguments[0])
        if not self.is_silent:
            found = self.refusal or self._other_prompts(arguments[0])
            result.set_result(found or _reply(arguments[0], self.logits.get(self.description_of_adapters.revision)))
        return result

    def _other_prompts(self, call: InferenceCall[Any]) -> Refusal | None:
        used, head, own = call.params.prompting, call.params.head, self.description_of_adapters.embedding
        if head is not None and head.revision == self.description_of_adapters.revision:
            return None
        is_same = own.prompting(used.name) == used and own.dense == call.params.dense
        if call.adapter is None or (head is None and is_same):
            return None
        return Refusal.of(OtherPrompts("other prompts"), "r0", call.adapter.name, None)


def _reply(call: InferenceCall[Any], logits: Sequence[float] | None) -> InferenceReply[EmbedResult]:
    """Return ones, or the logits, to each of which the prompt's length is added."""
    vectors = np.ones((len(call.prompts()), HIDDEN), np.float32)
    if logits is not None:
        vectors = np.stack([np.asarray(logits, np.float32) + len(prompt) for prompt in call.prompts()])
    load = QueueLoad(1, 0, 0.0, 0, 0)
    return InferenceReply(EmbedResult.of(vectors), call.total_tokens, None, "none", "r0", None, 0.0, 0.0, load)


@dataclass
class Parts:
    """A gateway's inference path, and an HTTP client for it.

    Args:
        folder: of adapters, and of the file of keys. Every subfolder `legal-*` is an adapter.
        keys: by name, the patterns of models that each may use, and its tokens per minute.
    """

    folder: Path
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    keys: Mapping[str, tuple[tuple[str, ...], int | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        (self.folder / "legal-v2").mkdir(exist_ok=True)
        self.tokenizer, self.handle = FakeTokenizer(), FakeReplicas()
        self.metrics = GatewayMetrics(10, Counters(), BASE)
        self.admission = Admission(self.limits.max_in_flight_requests)
        self.ledger = Ledger()
        self.quotas = Quotas(self._settle, self.metrics.on_over_quota)
        handle: Any = self.handle
        replicas = ReplicasClient(handle, Affinity(), self.limits, lambda continues: None, "gateway")
        tokenizer: Any = self.tokenizer
        self.base = EmbeddingSettings(prompts={"query": "find this: "})
        self.models = EmbeddingModels(self.base, AdapterDescriptions(replicas, Tokenizers(tokenizer)))
        self.services = InferenceServices(
            limits=self.limits,
            keys=ApiKeys(self._write_keys() if self.keys else None),
            admission=self.admission,
            names=ModelNames([BASE], Registry(self.folder, {})),
            quotas=self.quotas,
            intake=Intake(self.tokenizer, self.limits),
            replicas=replicas,
            observer=Observer(self.metrics, RecentRequests(), "none", "gateway"),
        )

        async def embeddings(request: Request) -> Response:
            return await Exchange(self.services, self.parse, request).answer()

        self.app = Starlette(
            routes=[Route("/v1/embeddings", embeddings, methods=["POST"])]
            + [
                Route(path, self._scoring(parse), methods=["POST"])
                for parse, paths in SCORING_PATHS.items() for path in paths
            ]
        )  # fmt: skip
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://gateway", timeout=60)

    def _scoring(self, parse: Any) -> Any:
        async def answer(request: Request) -> Response:
            return await Exchange(self.services, partial(parse, self.models.descriptions), request).answer()

        return answer

    def parse(self, body: bytes) -> EmbeddingsTask:
        return EmbeddingsTask.parse(self.models, body)

    async def post(self, model: str, texts: Any, key: str | None = None) -> httpx.Response:
        headers = {"authorization": f"Bearer {self.secrets[key]}"} if key else {}
        return await self.http.post("/v1/embeddings", json={"model": model, "input": texts}, headers=headers)

    def sample(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    async def _settle(self, statements: Mapping[QuotaOwner, Statement]) -> Mapping[QuotaOwner, Grant]:
        return self.ledger.settle(statements)

    def _write_keys(self) -> Path:
        self.secrets, entries = {}, []
        for name, (adapters, tokens_per_minute) in self.keys.items():
            secret, entry = new_key(name, admin=False, adapters=adapters, tokens_per_minute=tokens_per_minute)
            self.secrets[name] = secret
            entries.append(entry.model_dump(mode="json"))
        path = self.folder / "keys.yaml"
        path.write_text(yaml.safe_dump({"keys": entries}))
        return path
