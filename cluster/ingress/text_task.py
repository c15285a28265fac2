"""The tasks of `POST /v1/completions` and `POST /v1/chat/completions`."""

import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Final

import orjson
from starlette.responses import Response

from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.cluster.ingress.answers import begun_headers, join_texts
from ranklet.cluster.ingress.completions import CompletionsRequest
from ranklet.cluster.ingress.fields import TextFields, TextOptions
from ranklet.cluster.ingress.frame_queue import FrameQueue
from ranklet.cluster.ingress.generation import PieceSink, TextGeneration
from ranklet.cluster.ingress.intake import Inputs
from ranklet.cluster.ingress.known_fields import COMPLETION_FIELDS
from ranklet.cluster.ingress.model_tokens import widest_limits
from ranklet.cluster.ingress.protocol import TokenIds, parse_object, validate
from ranklet.cluster.ingress.stream import EventStream, StreamedTexts, open_stream
from ranklet.cluster.ingress.task import AdmittedCall
from ranklet.cluster.ingress.text_format import CompletionsFormat, TextFormat, WholeTexts, shown_prompt_logprobs
from ranklet.cluster.ingress.texts import DescribedModel, TextModels
from ranklet.cluster.message import no_classifier
from ranklet.cluster.text.frames import DONE, StreamFrames
from ranklet.cluster.text.logprobs import LogprobsFormat
from ranklet.replicas.engine.limits import RequestLimits
from ranklet.replicas.engine.params import GenerateParams
from ranklet.replicas.errors import AdapterChanged, InvalidRequest, UnknownModel
from ranklet.replicas.grammar.constraint import Constraint

_RENDER_INLINE_TOKENS: Final = 10_000  # larger answers are rendered on a thread


class TextTask:
    """One text request; implements `ranklet.cluster.ingress.task.InferenceTask`.

    Args:
        fields: that the request and all text requests have.
        ignored: names of the request's unknown fields.
    """

    is_text: ClassVar[bool] = True

    def __init__(self, fields: TextFields, ignored: tuple[str, ...], texts: TextModels) -> None:
        self.fields = fields
        self.ignored = ignored
        self.texts = texts
        self.text_model: DescribedModel | None = None
        self.params = GenerateParams()
        self._constraint: Constraint | None = None  # of the request
        self._checked: Constraint | None = None
        self.options: TextOptions | None = None
        self._vocab: int | None = None  # that the parameters are checked for

    @property
    def model(self) -> str | None:
        return self.fields.model

    @property
    def lora_path(self) -> str | None:
        return self.fields.lora_path

    def inputs(self, adapter: AdapterLocation | None, max_texts: int, limits: RequestLimits) -> Inputs | None:
        model = self.text_model = self.text_model or self.texts.known(adapter, limits)
        if self.options is None:
            self.texts.check(limits)
            self._constraint = self.fields.constraint()
        limits = widest_limits(limits) if model is None else model.tokens.limits(limits)
        if limits.vocab != self._vocab:
            self.params, self.options = self.check(limits)
            self._vocab = limits.vocab
        if self.text_model is not None and self.text_model.is_classifier:
            raise no_classifier(adapter.name if adapter is not None else "")
        constraint = self.present_constraint()
        if constraint != self._checked and not self.texts.checks.is_known(constraint, limits):
            return None
        if self.text_model is None:
            return None
        self.params = replace(self.params, grammar=None if constraint is None else constraint.grammar)
        made = self.prompts(self.text_model, max_texts, limits)
        return None if made is None else replace(made, tokenizer=self.text_model.tokens.tokenizer)

    async def prepare(self, adapter: AdapterLocation | None, limits: RequestLimits, owner: str) -> None:
        if self.text_model is None and adapter is not None:
            self.text_model = await self.texts.describe(adapter, limits)
        constraint = self.present_constraint()
        if not self.texts.checks.is_known(constraint, limits) and constraint is not None:
            await self.texts.checks.check(constraint, owner)
        self._checked = constraint

    def present_constraint(self) -> Constraint | None:
        """Return the request's constraint, or else that of the model, as far as it is described."""
        if self._constraint is not None or self.text_model is None:
            return self._constraint
        return self.text_model.constraint

    def check(self, limits: RequestLimits) -> tuple[GenerateParams, TextOptions]:
        """Return the checked parameters and options. Raises InvalidRequest."""
        raise NotImplementedError

    def prompts(self, model: DescribedModel, max_texts: int, limits: RequestLimits) -> Inputs | None:
        """Return the prompts; None if `prepare` must come first. Raises InvalidRequest."""
        raise NotImplementedError

    def params_for(self, prompts: TokenIds, limits: RequestLimits) -> GenerateParams:
        """Return the parameters for these prompts."""
        return self.params

    def make_format(self, options: TextOptions, logprobs: LogprobsFormat, prompts: TokenIds) -> TextFormat:
        raise NotImplementedError

    def shown_ids(self) -> frozenset[int]:
        """Return the special tokens that belong to the texts."""
        return frozenset()

    async def respond(self, call: AdmittedCall) -> Response:
        try:
            return await self._respond(call, call.prompts)
        except UnknownModel:
            adapter = call.adapter
            if adapter is None or adapter.requested_revision is not None:
                raise
            # The adapter was replaced after it was described: its template and the ends of its texts may differ.
            self.texts.forget(adapter)
            self.text_model = None
        prompts = await call.remake_prompts()
        try:
            return await self._respond(call, prompts)
        except UnknownModel as error:
            raise AdapterChanged(f"adapter {call.model!r} is being replaced. Send the request again") from error

    async def _respond(self, call: AdmittedCall, prompts: TokenIds) -> Response:
        model, options = self.text_model, self.options
        assert model is not None, "called before `inputs`"
        assert options is not None, "called before `inputs`"
        params = self.params_for(prompts, call.limits)
        logprobs = LogprobsFormat(model.tokens.bytes, as_ids=options.names_ids)
        text_format = self.make_format(options, logprobs, prompts)
        head: dict[str, Any] = {
            "id": text_format.id_prefix + (self.fields.request_id or self.fields.rid or uuid.uuid4().hex),
            "created": int(time.time()),
            "model": self.fields.model or call.model,
            "system_fingerprint": model.fingerprint,
        }

        on_tokens = call.meter(streams=options.streams).add
        call.record.is_generating = True

        def generation(sink: PieceSink) -> TextGeneration:
            return TextGeneration(
                prompts, params, options, model.tokens.bytes, model.end_ids, sink, on_tokens, self.shown_ids()
            )

        pinned = model.pin(call.adapter)
        if options.streams:
            return await self._stream(call, pinned, params, options, head, text_format, generation)
        whole = WholeTexts(len(prompts) * params.n)
        run = generation(whole)
        replies = await call.replicas.generate(pinned, prompts, params, run, key_name=call.key_name)
        run.complete(replies)
        call.record.answer = answer = join_texts(replies)
        call.record.reasons = run.reasons()

        def render() -> bytes:
            scores = None
            if options.shows_prompt_logprobs and run.prompt_logprobs is not None:
                best = self.fields.prompt_logprobs or 0
                scores = shown_prompt_logprobs(prompts, run.prompt_logprobs, best, logprobs)
            fields = text_format.whole(whole.texts, scores)
            return orjson.dumps({**head, "object": text_format.kind, **fields, "usage": run.usage()})

        usage = run.usage()
        is_large = options.keeps_tokens and usage["total_tokens"] > _RENDER_INLINE_TOKENS
        content = await call.intake.on_thread(render) if is_large else render()
        return Response(content, headers=answer.headers, media_type="application/json")

    async def _stream(
        self, call: AdmittedCall, adapter: AdapterLocation | None, params: GenerateParams, options: TextOptions,
        head: dict[str, Any], text_format: TextFormat, generation: Callable[[PieceSink], TextGeneration],
    ) -> Response:  # fmt: skip
        limits = call.stream_limits
        frames = StreamFrames(
            text_format.chunk_kind, head["id"], model=head["model"], created=head["created"],
            fingerprint=head["system_fingerprint"], reports_usage=options.usage_at_end or options.usage_always,
        )  # fmt: skip
        queue = FrameQueue(limits.max_waiting_stream_bytes)
        sink = StreamedTexts(queue, frames, text_format, usage_always=options.usage_always)
        sink.generation = run = generation(sink)

        async def generate() -> None:
            try:
                replies = await call.replicas.generate(adapter, run.prompts, params, run, key_name=call.key_name)
            except UnknownModel as error:
                if not queue.has_begun:
                    raise
                raise AdapterChanged(
                    f"a replica failed after it had sent a part of the text, and adapter {call.model!r} was replaced "
                    "meanwhile, so that no other can continue it. Send the request again"
                ) from error
            run.complete(replies)
            call.record.answer = join_texts(replies)
            call.record.reasons = run.reasons()
            queue.close(*([frames.usage(run.usage())] if options.usage_at_end else []), DONE)

        generating = await open_stream(queue, generate)
        return EventStream(queue, generating, begun_headers(run.begun), limits.request_timeout_s)


class CompletionsTask(TextTask):
    """One request to `/v1/completions`."""

    def __init__(self, form: CompletionsRequest, ignored: tuple[str, ...], texts: TextModels) -> None:
        super().__init__(form, ignored, texts)
        self._form = form

    @classmethod
    def parse(cls, texts: TextModels, body: bytes) -> "CompletionsTask":
        """Parse a JSON body. Raises InvalidRequest."""
        fields = parse_object(body)
        ignored = COMPLETION_FIELDS.check(fields, CompletionsRequest.model_fields)
        return cls(validate(fields, CompletionsRequest), ignored, texts)

    def check(self, limits: RequestLimits) -> tuple[GenerateParams, TextOptions]:
        return self._form.params(limits.vocab), self._form.options()

    def prompts(self, model: DescribedModel, max_texts: int, limits: RequestLimits) -> Inputs | None:
        values = self._form.prompts(max_texts)
        if len(values) * self.params.n > max_texts:
            raise InvalidRequest(
                f"n: expected at most {max_texts} texts in one request (limits.max_texts_per_request), got "
                f"{len(values)} prompts with n={self.params.n}. Send several requests",
                param="n",
            )
        adds_special_tokens = self._form.add_special_tokens is not False
        # Without output, the prompt may fill the context but for the token that is made and dropped.
        max_tokens = self.params.max_tokens
        rules = self._form.prompt_rules(
            limits, "prompt", max_tokens, adds_special_tokens=adds_special_tokens, is_limited=True
        )
        return Inputs(values, rules)

    def make_format(self, options: TextOptions, logprobs: LogprobsFormat, prompts: TokenIds) -> TextFormat:
        return CompletionsFormat(options, logprobs, prompts, self.params.n)
