"""The task of `POST /v1/embeddings`, OpenAI's embeddings API."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import BaseModel, ConfigDict, WithJsonSchema
from starlette.responses import Response

from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.cluster.ingress.answers import join_embeddings, render_embeddings
from ranklet.cluster.ingress.intake import Inputs
from ranklet.cluster.ingress.known_fields import EMBEDDING_FIELDS
from ranklet.cluster.ingress.prompts import EmbeddingPrompts
from ranklet.cluster.ingress.protocol import INPUT_SCHEMA, parse_input, parse_object, validate
from ranklet.cluster.ingress.task import AdmittedCall
from ranklet.replicas.engine.limits import RequestLimits
from ranklet.replicas.engine.params import EmbedParams

_RENDER_INLINE_BYTES: Final = 1 << 20  # larger answers are rendered on a thread


class EmbeddingsRequest(BaseModel):
    """Body of `POST /v1/embeddings`. Unknown fields are ignored and named in a header."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    model: str | None = None
    input: Annotated[Any, WithJsonSchema(INPUT_SCHEMA)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None
    lora_path: str | None = None  # SGLang's field for the adapter


@dataclass(frozen=True)
class EmbeddingsTask:
    """One embeddings request; implements `ranklet.cluster.ingress.task.InferenceTask`."""

    is_text: ClassVar[bool] = False

    form: EmbeddingsRequest
    ignored: tuple[str, ...]

    @classmethod
    def parse(cls, body: bytes) -> "EmbeddingsTask":
        """Parse a JSON body. Raises InvalidRequest."""
        fields = parse_object(body)
        ignored = EMBEDDING_FIELDS.check(fields, EmbeddingsRequest.model_fields)
        return cls(validate(fields, EmbeddingsRequest), ignored)

    @property
    def model(self) -> str | None:
        return self.form.model

    @property
    def lora_path(self) -> str | None:
        return self.form.lora_path

    def inputs(self, adapter: AdapterLocation | None, max_texts: int, limits: RequestLimits) -> Inputs | None:
        values = parse_input(self.form.input, max_texts)
        limits.check_dimensions(self.form.dimensions)
        return Inputs(values, EmbeddingPrompts(limits))

    async def prepare(self, adapter: AdapterLocation | None, limits: RequestLimits) -> None:
        pass

    async def respond(self, call: AdmittedCall) -> Response:
        params, vector_bytes = EmbedParams(self.form.dimensions), 4 * call.limits.hidden
        replies = await call.replicas.infer("embed", call.adapter, call.prompts, params, vector_bytes)
        call.record.answer = answer = join_embeddings(replies)
        rendering = partial(render_embeddings, answer, self.form.model or call.model, self.form.encoding_format)
        large = answer.size_bytes > _RENDER_INLINE_BYTES
        content = await call.intake.on_thread(rendering) if large else rendering()
        return Response(content, headers=answer.headers, media_type="application/json")
