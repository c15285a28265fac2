"""The task of `POST /v1/embeddings`, OpenAI's embeddings API."""

from functools import partial
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import BaseModel, ConfigDict, WithJsonSchema
from starlette.responses import Response

from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.cluster.ingress.answers import render_embeddings
from ranklet.cluster.ingress.embedding_models import EmbeddingModel, EmbeddingModels, no_such_prompt
from ranklet.cluster.ingress.intake import Inputs
from ranklet.cluster.ingress.known_fields import EMBEDDING_FIELDS
from ranklet.cluster.ingress.prompts import EmbeddingPrompts, truncation_of
from ranklet.cluster.ingress.protocol import INPUT_SCHEMA, parse_input, parse_object, validate
from ranklet.cluster.ingress.task import AdmittedCall
from ranklet.cluster.ingress.vectors import compute_vectors
from ranklet.replicas.engine.limits import RequestLimits
from ranklet.replicas.engine.params import EmbedParams
from ranklet.replicas.errors import InvalidRequest
from ranklet.replicas.model.dense_settings import width_after
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
    prompt_name: str | None = None  # of the prompts that the folder of the model has
    normalize: bool | None = None
    use_activation: bool | None = None  # the newer name of normalize in vLLM
    user: str | None = None
    lora_path: str | None = None  # SGLang's field for the adapter


class EmbeddingsTask:
    """One embeddings request; implements `ranklet.cluster.ingress.task.InferenceTask`."""

    is_text: ClassVar[bool] = False

    def __init__(self, form: EmbeddingsRequest, ignored: tuple[str, ...], models: EmbeddingModels) -> None:
        self.ignored = ignored
        self._form = form
        self._models = models
        self._described: EmbeddingModel | None = None  # of the adapter
        self._params = EmbedParams()

    @classmethod
    def parse(cls, models: EmbeddingModels, body: bytes) -> "EmbeddingsTask":
        """Parse a JSON body. Raises InvalidRequest."""
        fields = parse_object(body)
        ignored = EMBEDDING_FIELDS.check(fields, EmbeddingsRequest.model_fields)
        form = validate(fields, EmbeddingsRequest)
        if None not in (form.normalize, form.use_activation) and form.normalize != form.use_activation:
            raise InvalidRequest(
                f"use_activation: expected null or the value of normalize, got {form.use_activation}",
                param="use_activation",
            )
        return cls(form, ignored, models)

    @property
    def model(self) -> str | None:
        return self._form.model

    @property
    def lora_path(self) -> str | None:
        return self._form.lora_path

    def inputs(self, adapter: AdapterLocation | None, max_texts: int, limits: RequestLimits) -> Inputs | None:
        form, name = self._form, self._form.prompt_name or None
        values = parse_input(form.input, max_texts)
        has_texts = isinstance(values[0], str)
        if name is not None and not has_texts:
            raise InvalidRequest("prompt_name: expected texts as input, got token ids", param="prompt_name")
        model = self._described or self._models.known(adapter)
        settings, tokens = model.settings, model.tokens
        prompting = settings.prompting(name)
        width = width_after(settings.dense, limits.hidden)
        fits = prompting is not None and limits.allows_dimensions(form.dimensions, width)
        if not fits and adapter is not None and self._described is None:
            return None  # the adapter's folder may have this prompt, or other dimensions
        limits.check_dimensions(form.dimensions, width)
        if prompting is None:
            raise no_such_prompt(settings, name or "")
        longest = limits.longest_embedding(reads_last=settings.mode == "last", folder_limit=settings.max_tokens)
        truncation = truncation_of(form.truncate_prompt_tokens, form.truncation_side, longest, "right")
        skipped = 0
        if has_texts and not prompting.pools_text:
            skipped = tokens.tokenizer.count_prompt(prompting.text, add_special_tokens=form.add_special_tokens)
            if truncation is not None and truncation.side == "left":
                raise InvalidRequest(
                    "truncation_side: expected right, since pooling leaves out the prompt at the left, got left",
                    param="truncation_side",
                )
        normalize = form.use_activation if form.normalize is None else form.normalize
        self._params = EmbedParams(
            form.dimensions, normalize=normalize, skipped=skipped, prompting=prompting, dense=settings.dense
        )
        rules = EmbeddingPrompts(
            tokens.limits(limits), longest, prompting.text, skipped, form.add_special_tokens, truncation
        )
        return Inputs(values, rules, tokens.tokenizer)

    async def prepare(self, adapter: AdapterLocation | None, limits: RequestLimits, owner: str) -> None:
        if adapter is not None:
            self._described = await self._models.describe(adapter)

    async def respond(self, call: AdmittedCall) -> Response:
        answer = await compute_vectors(call, lambda: self._params, self._models.forget)
        rendering = partial(render_embeddings, answer, self._form.model or call.model, self._form.encoding_format)
        large = answer.size_bytes > _RENDER_INLINE_BYTES
        content = await call.intake.on_thread(rendering) if large else rendering()
        return Response(content, headers=answer.headers, media_type="application/json")
