"""What a gateway knows of how the folders of the base model and of adapters make prompts of embeddings."""

from dataclasses import dataclass

from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.cluster.ingress.descriptions import AdapterDescriptions
from ranklet.cluster.ingress.model_tokens import ModelTokens
from ranklet.replicas.adapters.findings import join
from ranklet.replicas.errors import InvalidRequest
from ranklet.replicas.model.embedding_settings import EmbeddingSettings


@dataclass(frozen=True)
class EmbeddingModel:
    """How texts become vectors with the base model, or with an adapter."""

    settings: EmbeddingSettings
    tokens: ModelTokens


@dataclass(frozen=True)
class EmbeddingModels:
    """The settings of one gateway's models.

    Most adapters make prompts as the base model does. A gateway therefore takes an adapter's settings for the base's
    until a replica refuses a call with `OtherPrompts`, or a request names a prompt that the base does not have.

    Attributes:
        base: settings of the base model.
    """

    base: EmbeddingSettings
    descriptions: AdapterDescriptions

    def known(self, adapter: AdapterLocation | None) -> EmbeddingModel:
        described = None if adapter is None else self.descriptions.known(adapter)
        if described is None:
            return EmbeddingModel(self.base, self.descriptions.tokenizers.base)
        return EmbeddingModel(described.text.embedding, described.tokens)

    async def describe(self, adapter: AdapterLocation) -> EmbeddingModel:
        """Let a replica read the settings of an adapter. Raises the errors of `AdapterDescriptions.describe`."""
        described = await self.descriptions.describe(adapter, again=True)
        return EmbeddingModel(described.text.embedding, described.tokens)

    def forget(self, adapter: AdapterLocation) -> None:
        self.descriptions.forget(adapter)


def no_such_prompt(settings: EmbeddingSettings, name: str) -> InvalidRequest:
    """Return the error for a `prompt_name` that the settings do not have."""
    names = f"one of {join(list(settings.prompts))}, the prompts of the model's folder" if settings.prompts else (
        "null, since the model's folder (config_sentence_transformers.json) has no prompts")  # fmt: skip
    return InvalidRequest(
        f"prompt_name: expected {names}, got {name[:100]!r}. Or put the prompt before each text", param="prompt_name"
    )
