"""The task of `POST /v1/embeddings`, OpenAI's embeddings API."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, WithJsonSchema

from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.cluster.ingress.answers import Embeddings, join_embeddings, render_embeddings
from ranklet.cluster.ingress.protocol import Texts, TokenIds, parse_body, parse_input
from ranklet.cluster.ingress.replicas_client import ReplicasClient
from ranklet.replicas.engine.limits import RequestLimits
from ranklet.replicas.engine.params import EmbedParams

_INPUT = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}},
        {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
        {
            "type": "array", "minItems": 1,
            "items": {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
        },
    ]
}  # fmt: skip


class EmbeddingsRequest(BaseModel):
    """Body of `POST /v1/embeddings`. Unknown fields are ignored, since clients send fields of their own."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    model: str | None = None
    input: Annotated[Any, WithJsonSchema(_INPUT)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None
    lora_path: str | None = None  # SGLang's field for the adapter


@dataclass(frozen=True)
class EmbeddingsTask:
    """One embeddings request; implements `ranklet.cluster.ingress.task.InferenceTask`."""

    form: EmbeddingsRequest

    @classmethod
    def parse(cls, body: bytes) -> "EmbeddingsTask":
        """Parse a JSON body. Raises InvalidRequest."""
        return cls(parse_body(body, EmbeddingsRequest))

    @property
    def model(self) -> str | None:
        return self.form.model

    @property
    def lora_path(self) -> str | None:
        return self.form.lora_path

    def inputs(self, max_texts: int, limits: RequestLimits) -> Texts | TokenIds:
        inputs = parse_input(self.form.input, max_texts)
        limits.check_dimensions(self.form.dimensions)
        return inputs

    async def send(
        self, replicas: ReplicasClient, adapter: AdapterLocation | None, prompts: TokenIds, limits: RequestLimits
    ) -> Embeddings:
        params = EmbedParams(self.form.dimensions)
        return join_embeddings(await replicas.infer("embed", adapter, prompts, params, 4 * limits.hidden))

    def render(self, answer: Embeddings, model: str) -> bytes:
        return render_embeddings(answer, self.form.model or model, self.form.encoding_format)
