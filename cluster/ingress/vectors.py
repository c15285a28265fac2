"""Lets replicas compute the vectors of a call, and makes its prompts again if its adapter has changed."""

from collections.abc import Callable

from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.cluster.ingress.answers import Embeddings, join_embeddings
from ranklet.cluster.ingress.protocol import TokenIds
from ranklet.cluster.ingress.task import AdmittedCall
from ranklet.cluster.message import EmbedResult, InferenceReply, OtherPrompts
from ranklet.replicas.engine.limits import RequestLimits
from ranklet.replicas.engine.params import EmbedParams
from ranklet.replicas.errors import AdapterChanged
from ranklet.replicas.model.dense_settings import width_after


async def compute_vectors(
    call: AdmittedCall, params: Callable[[], EmbedParams], forget: Callable[[AdapterLocation], None]
) -> Embeddings:
    """Return the vectors of a call, or what its head computes of them.

    Args:
        params: returns those of the prompts that were made last.
        forget: drops what is known of an adapter.

    Raises:
        AdapterChanged: the adapter changes again and again.
        RankletError: an error of `ReplicasClient.infer`.
    """
    try:
        replies = await _infer(call, call.prompts, params())
    except OtherPrompts:
        assert call.adapter is not None, "the base model has the prompts of its folder"
        forget(call.adapter)
        prompts = await call.remake_prompts()
        try:
            replies = await _infer(call, prompts, params())
        except OtherPrompts as error:
            raise AdapterChanged(f"adapter {call.model!r} is being replaced. Send the request again") from error
    call.record.answer = answer = join_embeddings(replies)
    return answer


async def _infer(call: AdmittedCall, prompts: TokenIds, params: EmbedParams) -> list[InferenceReply[EmbedResult]]:
    result_bytes = 4 * _outputs(params, call.limits)
    return await call.replicas.infer("embed", call.adapter, prompts, params, result_bytes, key_name=call.key_name)


def _outputs(params: EmbedParams, limits: RequestLimits) -> int:
    """Return the largest number of values that the result of a prompt may have."""
    if params.head is not None:
        return params.head.most_outputs
    return limits.width if params.dense is None else width_after(params.dense, limits.hidden)
