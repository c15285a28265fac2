"""What a gateway needs to know of the base model and of adapters to make prompts and texts."""

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.cluster.config import TextConfig
from ranklet.cluster.ingress.constraint_checks import ConstraintChecks
from ranklet.cluster.ingress.descriptions import AdapterDescriptions, DescribedAdapter, TextDescriber
from ranklet.cluster.ingress.fair_budget import FairBudget
from ranklet.cluster.ingress.intake import SMALL_BODY_BYTES
from ranklet.cluster.ingress.model_tokens import ModelTokens, Tokenizers
from ranklet.cluster.message import AdapterText
from ranklet.cluster.text.reasoning import ThinkTags, tags_of
from ranklet.cluster.text.render_process import RenderProcess, TrustedRenderer
from ranklet.cluster.text.template import ChatTemplate, folder_special_tokens, folder_template
from ranklet.cluster.text.tool_format import FORMATS, ToolFormat, format_of
from ranklet.replicas.adapters.invocation import Invocation
from ranklet.replicas.engine.limits import RequestLimits
from ranklet.replicas.errors import InvalidRequest, ModelError
from ranklet.replicas.grammar.constraint import Constraint
from ranklet.replicas.model.tokenizer import PromptTokenizer
from ranklet.replicas.model.tokenizer_files import UnusableTokenError

TemplateOwner = Literal["base", "adapter"]
_FINGERPRINT_CHARS: Final = 8  # of each revision


class BoundedRenderer:
    """Renders chat templates in a process of its own, off the event loop and bounded in time, one at a time."""

    def __init__(self) -> None:
        self.process = RenderProcess()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="render")
        self._turns = FairBudget(1, jobs=1)

    async def run(self, owner: str, work: Callable[[], str]) -> str:
        """Run `work`, which renders with `process`. Owners take turns."""
        async with self._turns.spend(owner, 1):
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)


@dataclass(frozen=True)
class OwnedTemplate:
    """A chat template.

    Attributes:
        quick: renders in this process; None for an adapter's, which may come from anyone.
        bounded: renders in the process of `renderer`.
    """

    owner: TemplateOwner
    source: str
    quick: ChatTemplate | None
    bounded: ChatTemplate
    renderer: BoundedRenderer

    def quick_for(self, body_bytes: int) -> ChatTemplate | None:
        """Return the template for a body that is rendered at once; None if rendering it may take long."""
        return self.quick if body_bytes <= SMALL_BODY_BYTES else None


@dataclass(frozen=True)
class DescribedModel:
    """The base model, or one revision of an adapter.

    Attributes:
        revision: of the adapter; None for the base model.
        template: None if neither folder has one.
        end_ids: tokens that end its texts.
        fingerprint: of the base model and the adapter.
        constraint: of its texts, unless the request has one.
        tool_format: of calls of tools; None if it is not known.
        tags: of reasoning; None if the template names none.
        is_classifier: whether it computes scores, and no texts.
        invocation: as in `AdapterRef`.
        tokens: what becomes of its texts and token ids.
        special_tokens: texts of special tokens by the names that templates use.
        separates_reasoning: whether reasoning is apart from the content, unless the request says otherwise.
    """

    revision: str | None
    template: OwnedTemplate | None
    end_ids: frozenset[int]
    fingerprint: str
    tokens: ModelTokens
    constraint: Constraint | None = None
    tool_format: ToolFormat | None = None
    tags: ThinkTags | None = None
    separates_reasoning: bool = False
    is_classifier: bool = False
    invocation: Invocation | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    def chat_template(self) -> OwnedTemplate:
        """Return the template. Raises InvalidRequest if there is none."""
        if self.template is None:
            raise InvalidRequest(
                "messages: expected a chat template (chat_template.jinja, or chat_template in tokenizer_config.json) "
                "in the adapter's folder or the base model's, found none. Send a prompt to /v1/completions instead",
                param="messages",
            )
        return self.template

    def pin(self, adapter: AdapterLocation | None) -> AdapterLocation | None:
        """Return the location of exactly this revision."""
        if adapter is None:
            return None
        return replace(adapter, requested_revision=self.revision, invocation=self.invocation)


class TextModels:
    """Describes the models of one gateway.

    Args:
        model_dir: folder of the base model.
        config: of chats.

    Attributes:
        tokens: of the base model.
        checks: of what texts must be.
        descriptions: of adapters. Calls name their revision, and replicas refuse an old one.
    """

    def __init__(
        self, tokenizer: PromptTokenizer, model_dir: Path, replicas: TextDescriber, config: TextConfig | None = None
    ) -> None:
        self._config = config or TextConfig()
        tokenizers = Tokenizers(tokenizer)
        self.tokens = tokenizers.base
        self.model_dir = model_dir
        self.descriptions = AdapterDescriptions(replicas, tokenizers)
        self.checks = ConstraintChecks()
        self._base_renderer, self._adapter_renderer = BoundedRenderer(), BoundedRenderer()
        self.special_tokens, self._base_template = self._read_base()

    def check(self, limits: RequestLimits) -> None:
        """Raise InvalidRequest if the base model generates no text."""
        problem = limits.no_text or self.tokens.problem
        if problem is not None:
            raise InvalidRequest(f"model: expected a model that generates text: {problem}", param="model")

    def generates(self, limits: RequestLimits | None) -> bool:
        return limits is not None and limits.no_text is None and self.tokens.problem is None

    def known(self, adapter: AdapterLocation | None, limits: RequestLimits) -> DescribedModel | None:
        """Return what is known of a model; None if `describe` must come first."""
        if adapter is None:
            template = self._base_template
            return DescribedModel(
                None, template, frozenset(limits.end_ids), _fingerprint(limits, None), self.tokens,
                **self._answers(template), special_tokens=self.special_tokens,
            )  # fmt: skip
        described = self.descriptions.known(adapter)
        return None if described is None else self._model(described, limits)

    async def describe(self, adapter: AdapterLocation, limits: RequestLimits) -> DescribedModel:
        """Let a replica describe an adapter. Raises the errors of `AdapterDescriptions.describe`."""
        return self._model(await self.descriptions.describe(adapter), limits)

    def forget(self, adapter: AdapterLocation) -> None:
        self.descriptions.forget(adapter)

    def template_owner(self, adapter: AdapterLocation | None) -> TemplateOwner | None:
        """Return whose chat template answers; None if there is none, or if the adapter is not described yet."""
        described = None if adapter is None else self.descriptions.known(adapter)
        if adapter is not None and described is None:
            return None
        template = self._base_template if described is None else self._template_of(described.text)
        return None if template is None else template.owner

    def _model(self, described: DescribedAdapter, limits: RequestLimits) -> DescribedModel:
        text, tokens = described.text, described.tokens
        end = tokens.backend.token_to_id(text.special_tokens.get("eos_token", ""))
        own = () if end is None or end >= tokens.limits(limits).vocab else (end,)
        ends = frozenset((*limits.end_ids, *own))
        template = self._template_of(text)
        return DescribedModel(
            text.revision, template, ends, _fingerprint(limits, text.revision), tokens, text.constraint,
            **self._answers(template, text.tool_format), is_classifier=text.embedding.classifier is not None,
            invocation=text.invocation,
            special_tokens=self.special_tokens | text.special_tokens,
        )  # fmt: skip

    def _answers(self, template: OwnedTemplate | None, named: str | None = None) -> dict[str, Any]:
        """Return what is known of the answers to a template's prompts.

        Args:
            named: the format of calls that the adapter's folder names.
        """
        source = "" if template is None else template.source
        is_base = template is not None and template.owner == "base"
        given, found = self._config.tool_format, format_of(source)
        chosen = named or (given if is_base or found is None else None)
        return {
            "tool_format": found if chosen is None else FORMATS[chosen],
            "tags": tags_of(source),
            "separates_reasoning": self._config.separate_reasoning,
        }

    def _template_of(self, text: AdapterText) -> OwnedTemplate | None:
        if text.chat_template is None:
            return self._base_template
        tokens, renderer = self.special_tokens | text.special_tokens, self._adapter_renderer
        bounded = ChatTemplate(text.chat_template, tokens, renderer.process)
        return OwnedTemplate("adapter", text.chat_template, None, bounded, renderer)

    def _read_base(self) -> tuple[dict[str, str], OwnedTemplate | None]:
        try:
            tokens, source = folder_special_tokens(self.model_dir), folder_template(self.model_dir)
        except UnusableTokenError as error:
            raise ModelError(f"{self.model_dir}: {error}") from error
        if source is None:
            return tokens, None
        quick = ChatTemplate(source, tokens, TrustedRenderer())
        bounded = ChatTemplate(source, tokens, self._base_renderer.process)
        return tokens, OwnedTemplate("base", source, quick, bounded, self._base_renderer)


def _fingerprint(limits: RequestLimits, revision: str | None) -> str:
    parts = (limits.base_revision, revision or "")
    return "fp_" + "_".join(part[:_FINGERPRINT_CHARS] for part in parts if part)
