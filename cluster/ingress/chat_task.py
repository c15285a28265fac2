"""The task of `POST /v1/chat/completions`."""

from dataclasses import replace
from functools import partial

from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.cluster.ingress.chat import ChatRequest
from ranklet.cluster.ingress.chat_format import ChatFormat
from ranklet.cluster.ingress.fields import TextOptions
from ranklet.cluster.ingress.intake import Inputs
from ranklet.cluster.ingress.known_fields import CHAT_FIELDS
from ranklet.cluster.ingress.protocol import TokenIds, parse_object, validate
from ranklet.cluster.ingress.text_format import TextFormat
from ranklet.cluster.ingress.text_task import TextTask
from ranklet.cluster.ingress.texts import DescribedModel, TextModels
from ranklet.cluster.ingress.tool_fields import OfferedTools, check_shown
from ranklet.cluster.ingress.tool_grammar import lead_of, with_calls
from ranklet.cluster.text.answer import AnswerParts
from ranklet.cluster.text.logprobs import LogprobsFormat
from ranklet.cluster.text.template import ChatTemplate
from ranklet.cluster.text.tool_format import shows_tools
from ranklet.replicas.engine.limits import RequestLimits
from ranklet.replicas.engine.params import GenerateParams
from ranklet.replicas.errors import InvalidRequest
from ranklet.replicas.grammar.constraint import Constraint


class ChatTask(TextTask):
    """One request to `/v1/chat/completions`."""

    def __init__(self, form: ChatRequest, ignored: tuple[str, ...], texts: TextModels, body_bytes: int) -> None:
        super().__init__(form, ignored, texts)
        self._form = form
        self._body_bytes = body_bytes
        self._tools: OfferedTools | None = None
        self._constrained: tuple[DescribedModel, Constraint | None] | None = None
        self._rendered: tuple[DescribedModel, str] | None = None

    @classmethod
    def parse(cls, texts: TextModels, body: bytes) -> "ChatTask":
        """Parse a JSON body. Raises InvalidRequest."""
        fields = parse_object(body)
        ignored = CHAT_FIELDS.check(fields, ChatRequest.model_fields)
        return cls(validate(fields, ChatRequest), ignored, texts, len(body))

    def check(self, limits: RequestLimits) -> tuple[GenerateParams, TextOptions]:
        self._tools = self._form.offered_tools()
        return self._form.params(limits.vocab, limits.max_model_len), self._form.options()

    def present_constraint(self) -> Constraint | None:
        model, constraint = self.text_model, super().present_constraint()
        if self._tools is None or model is None:
            return constraint
        if self._constrained is None or self._constrained[0] is not model:
            tool_format = check_shown(model.tool_format, shows_tools=shows_tools(model.chat_template().source))
            self._constrained = model, with_calls(constraint, self._tools, tool_format, self._grammar_id)
        return self._constrained[1]

    async def prepare(self, adapter: AdapterLocation | None, limits: RequestLimits, owner: str) -> None:
        await super().prepare(adapter, limits, owner)
        model = self.text_model
        assert model is not None, "the base model is known"
        template = model.chat_template()
        if template.quick_for(self._body_bytes) is None:
            text = await template.renderer.run(owner, partial(self._prompt, template.bounded))
            self._rendered = model, text

    def prompts(self, model: DescribedModel, max_texts: int, limits: RequestLimits) -> Inputs | None:
        self._check_reasoning(model)
        if self._rendered is None or self._rendered[0] is not model:
            template = model.chat_template().quick_for(self._body_bytes)
            if template is None:
                return None
            self._rendered = model, self._prompt(template)
        text = self._rendered[1]
        if not text:
            raise InvalidRequest(
                "messages: expected a chat template that makes a prompt, got no text", param="messages"
            )
        limit = self._form.wanted_tokens
        adds_special_tokens = bool(self._form.add_special_tokens)  # the template writes them
        rules = self._form.prompt_rules(
            limits, "messages", limit or 1, adds_special_tokens=adds_special_tokens, is_limited=limit is not None
        )
        return Inputs([text], rules)

    def params_for(self, prompts: TokenIds, limits: RequestLimits) -> GenerateParams:
        params = self.params
        if self._form.wanted_tokens is None:
            params = replace(params, max_tokens=limits.max_model_len - len(prompts[0]))
        if params.grammar is None:
            return params
        return replace(params, grammar=replace(params.grammar, lead=lead_of(self.parts(), self._grammar_id)))

    def make_format(self, options: TextOptions, logprobs: LogprobsFormat, prompts: TokenIds) -> TextFormat:
        return ChatFormat(options, logprobs, prompts, self.parts())

    def shown_ids(self) -> frozenset[int]:
        parts, model = self.parts(), self.text_model
        if parts.is_content or model is None:
            return frozenset()
        tags = (*(parts.tool_format.tags if parts.tool_format else ()), *(parts.tags.texts if parts.tags else ()))
        return frozenset(found for tag in tags if (found := model.tokens.special_id(tag)) is not None)

    def parts(self) -> AnswerParts:
        """Return what the answer may consist of, since the prompt is rendered."""
        assert self._rendered is not None, "called before `prompts`"
        model, prompt = self._rendered
        parts = AnswerParts()
        if self._tools is not None:
            assert model.tool_format is not None, "the constraint comes before the prompt"
            parts = self._tools.parts(model.tool_format)
        if model.tags is None:
            return parts
        return replace(
            parts, tags=model.tags, stage=model.tags.stage_after(prompt), separates=self._separates_reasoning(model)
        )

    def _grammar_id(self, text: str) -> int | None:
        """Return the id of a text that is a special token in grammars, which have the base model's tokens only."""
        return self.texts.tokens.special_id(text)

    def _prompt(self, template: ChatTemplate) -> str:
        return self._form.prompt(template, None if self._tools is None else self._tools.shown)

    def _separates_reasoning(self, model: DescribedModel) -> bool:
        wanted = self._form.separate_reasoning
        return model.separates_reasoning if wanted is None else wanted

    def _check_reasoning(self, model: DescribedModel) -> None:
        if self._form.separate_reasoning and model.tags is None:
            raise InvalidRequest(
                "separate_reasoning: expected false, since the chat template names no tags of reasoning, such as "
                "</think>, got true. Leave it out",
                param="separate_reasoning",
            )
