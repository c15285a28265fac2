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
from ranklet.cluster.ingress.prompts import EmbeddingPrompts, truncation_of
from ranklet.cluster.ingress.protocol import INPUT_SCHEMA, parse_input, parse_object, validate
from ranklet.cluster.ingress.task import AdmittedCall
from ranklet.replicas.engine.limits import RequestLimits
from ranklet.replicas.engine.params import EmbedParams
from ranklet.replicas.errors import InvalidRequest
from ranklet.replicas.model.tokenizer import TruncationSide

_RENDER_INLINE_BYTES: Final = 1 << 20  # larger answers are rendered on a thread


class EmbeddingsRequest(BaseModel):
    """Body of `POST /v1/embeddings`. `known_fields` has the names of fields that are refused or ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    model: str | None = None
    input: Annotated[Any, WithJsonSchema(INPUT_SCHEMA)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: TruncationSide | None = None
    add_special_tokens: bool | None = None
    normalize: bool | None = None
    use_activation: bool | None = None  # the newer name of normalize in vLLM
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
        form = validate(fields, EmbeddingsRequest)
        for name, value in (("normalize", form.normalize), ("use_activation", form.use_activation)):
            if value is False:
                raise InvalidRequest(
                    f"{name}: expected true or null, got false. Vectors that the model's folder normalises cannot be "
                    "answered otherwise",
                    param=name,
                )
        return cls(form, ignored)

    @property
    def model(self) -> str | None:
        return self.form.model

    @property
    def lora_path(self) -> str | None:
        return self.form.lora_path

    def inputs(self, adapter: AdapterLocation | None, max_texts: int, limits: RequestLimits) -> Inputs | None:
        values = parse_input(self.form.input, max_texts)
        limits.check_dimensions(self.form.dimensions)
        form, longest = self.form, limits.max_embedding_len
        truncation = truncation_of(form.truncate_prompt_tokens, form.truncation_side, longest, "right")
        return Inputs(values, EmbeddingPrompts(limits, form.add_special_tokens, truncation))

    async def prepare(self, adapter: AdapterLocation | None, limits: RequestLimits, owner: str) -> None:
        pass

    async def respond(self, call: AdmittedCall) -> Response:
        params, vector_bytes = EmbedParams(self.form.dimensions), 4 * call.limits.hidden
        replies = await call.replicas.infer("embed", call.adapter, call.prompts, params, vector_bytes)
        normalizes = bool(self.form.normalize or self.form.use_activation)
        call.record.answer = answer = join_embeddings(replies, normalizes=normalizes)
        rendering = partial(render_embeddings, answer, self.form.model or call.model, self.form.encoding_format)
        large = answer.size_bytes > _RENDER_INLINE_BYTES
        content = await call.intake.on_thread(rendering) if large else rendering()
        return Response(content, headers=answer.headers, media_type="application/json")
