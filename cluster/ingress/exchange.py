"""The fixed order of steps that every inference call takes, from its HTTP headers to the end of its answer."""

import asyncio
import contextlib
from dataclasses import dataclass
from functools import partial
from typing import Generic

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from ranklet.cluster.access.admission import Admission
from ranklet.cluster.access.keys import ApiKey, ApiKeys
from ranklet.cluster.access.quota import Quotas
from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.cluster.config import LimitsConfig
from ranklet.cluster.ingress.body import read_body
from ranklet.cluster.ingress.intake import Intake
from ranklet.cluster.ingress.naming import ModelNames
from ranklet.cluster.ingress.observe import Observer
from ranklet.cluster.ingress.protocol import Texts, TokenIds
from ranklet.cluster.ingress.refusals import on_error, refuse
from ranklet.cluster.ingress.replicas_client import ReplicasClient
from ranklet.cluster.ingress.task import AnswerT, InferenceTask, ParseTask
from ranklet.replicas.engine.limits import RequestLimits
from ranklet.replicas.errors import RankletError

_RENDER_INLINE_BYTES = 1 << 20  # larger answers are rendered on a thread
_CLIENT_GONE = 499  # only Ray's log shows it: the client has disconnected


@dataclass(frozen=True)
class InferenceServices:
    """The objects of one gateway that its inference calls share."""

    limits: LimitsConfig
    keys: ApiKeys
    admission: Admission
    names: ModelNames
    quotas: Quotas
    intake: Intake
    replicas: ReplicasClient
    observer: Observer


class Exchange(Generic[AnswerT]):
    """One inference call, of any task, until the end of its answer.

    Steps: check the key, admit the request, read and parse the body, find the model, check the key's rights and quota,
    check the parameters and lengths, tokenise, charge the quota, send the prompts to replicas, render the answer.

    Admission and the charge end with the call. A call that fails or is cancelled costs no quota.
    """

    def __init__(self, services: InferenceServices, parse: ParseTask[AnswerT], request: Request) -> None:
        self._services = services
        self._parse = parse
        self._request = request
        self._record = services.observer.begin(f"{request.method} {request.scope['path']}", request.headers)
        self._held = contextlib.ExitStack()  # admission and the charge

    async def answer(self) -> Response:
        """Take all steps. Renders an error of any step as the answer.

        Raises:
            asyncio.CancelledError: the client disconnected.
        """
        observer, record = self._services.observer, self._record
        try:
            with self._held:
                response = await self._answer()
        except RankletError as error:
            response = refuse(error)
            record.refused(error)
        except ClientDisconnect:
            observer.on_disconnect(record)
            return Response(status_code=_CLIENT_GONE)
        except asyncio.CancelledError:
            observer.on_disconnect(record)
            raise
        except Exception as error:
            response = await on_error(self._request, error)
            record.failed()
        observer.on_answer(record)
        return response

    async def _answer(self) -> Response:
        services, limits = self._services, self._services.limits
        key = services.keys.authenticate(self._request.headers)
        self._held.enter_context(services.admission.admit())
        body = await read_body(self._request, limits.max_body_bytes, limits.body_timeout_s)
        engine_limits = await services.replicas.limits()
        task, adapter, inputs = await services.intake.on_thread(partial(self._check, key, body, engine_limits))
        prompts = await services.intake.tokenise(inputs, engine_limits, key.name if key else "")
        self._charge(key, prompts)
        answer = await task.send(services.replicas, adapter, prompts, engine_limits)
        self._record.answer = answer
        rendering = partial(task.render, answer, self._record.model)
        large = answer.size_bytes > _RENDER_INLINE_BYTES
        content = await services.intake.on_thread(rendering) if large else rendering()
        return Response(content, headers=answer.headers, media_type="application/json")

    def _check(
        self, key: ApiKey | None, body: bytes, engine_limits: RequestLimits
    ) -> tuple[InferenceTask[AnswerT], AdapterLocation | None, Texts | TokenIds]:
        """Take the steps from parsing to tokenising a small body. They share one thread, since each switch costs."""
        services = self._services
        task = self._parse(body)
        adapter = services.names.resolve(task.model, task.lora_path)
        model = adapter.name if adapter else services.names.base
        services.keys.authorize(key, model)
        services.observer.on_model(self._record, model, is_adapter=adapter is not None)
        services.quotas.check(key, model)
        inputs = task.inputs(services.limits.max_texts_per_request, engine_limits)
        return task, adapter, services.intake.tokenise_if_small(inputs, engine_limits, len(body))

    def _charge(self, key: ApiKey | None, prompts: TokenIds) -> None:
        services, record = self._services, self._record
        record.prompts, record.tokens = len(prompts), sum(map(len, prompts))
        self._held.enter_context(services.admission.admit_model(record.model))
        self._held.enter_context(services.quotas.charge(key, record.model, record.tokens))
