"""The fixed order of steps that every inference call takes, from its HTTP headers to the end of its answer."""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Generic, Self

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from ranklet.cluster.access.admission import Admission
from ranklet.cluster.access.keys import ApiKey, ApiKeys
from ranklet.cluster.access.quota import Quotas
from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.cluster.config import LimitsConfig
from ranklet.cluster.ingress.body import read_body
from ranklet.cluster.ingress.intake import Intake, ParsedRequest
from ranklet.cluster.ingress.observe import Observer
from ranklet.cluster.ingress.refusals import on_error, refuse
from ranklet.cluster.ingress.replicas_client import ReplicasClient
from ranklet.cluster.ingress.task import AnswerT, ParseTask
from ranklet.replicas.errors import RankletError

_RENDER_INLINE_BYTES = 1 << 20  # larger answers are rendered on a thread
_CLIENT_GONE = 499  # for Ray's log; the client has disconnected


@dataclass(frozen=True)
class InferenceServices:
    """The objects of one gateway that its inference calls share.

    Attributes:
        base: name of the base model.
        label: the value of the `adapter` label in metrics, by the adapter's name.
    """

    base: str
    limits: LimitsConfig
    keys: ApiKeys
    admission: Admission
    intake: Intake
    quotas: Quotas
    replicas: ReplicasClient
    observer: Observer
    label: Callable[[str | None], str]


class Exchange(Generic[AnswerT]):
    """One inference call, of any task. It lives as long as its answer.

    Steps: check the key, admit the request, read and parse the body, check the key's rights on the model and its quota,
    check lengths, tokenise, charge the quota, send the prompts to replicas, render the answer.

    As a context manager, it ends admission and settles the quota when the call ends for any reason: a call that fails
    or is cancelled costs no quota.
    """

    def __init__(self, services: InferenceServices, parse: ParseTask[AnswerT], request: Request) -> None:
        self._services = services
        self._parse = parse
        self._request = request
        self._record = services.observer.begin(f"{request.method} {request.scope['path']}", request.headers)
        self._held = contextlib.ExitStack()  # admission and quota

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._held.__exit__(kind, error, traceback)

    async def answer(self) -> Response:
        """Take all steps. A refusal is an answer too.

        Raises:
            asyncio.CancelledError: the client disconnected.
        """
        observer, record = self._services.observer, self._record
        try:
            with self:
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
        engine = await services.replicas.limits()
        authorize, owner = partial(self._authorize, key), key.name if key else ""
        parsed = await services.intake.read(body, self._parse, engine, authorize, owner)
        self._hold(key, parsed)
        answer = await parsed.task.send(services.replicas, parsed.adapter, parsed.prompts, engine)
        self._record.answer = answer
        rendering = partial(parsed.task.render, answer, self._record.model)
        large = answer.size_bytes > _RENDER_INLINE_BYTES
        content = await services.intake.on_thread(rendering) if large else rendering()
        return Response(content, headers=answer.headers, media_type="application/json")

    def _authorize(self, key: ApiKey | None, adapter: AdapterLocation | None) -> None:
        services, record = self._services, self._record
        name = adapter.name if adapter else services.base
        services.keys.authorize(key, name)
        record.label, record.model = services.label(adapter.name if adapter else None), name
        services.quotas.check(key, name)

    def _hold(self, key: ApiKey | None, parsed: ParsedRequest[AnswerT]) -> None:
        services, record = self._services, self._record
        record.prompts, record.tokens = len(parsed.prompts), parsed.tokens
        self._held.enter_context(services.admission.admit_model(record.model))
        self._held.enter_context(services.quotas.charge(key, record.model, record.tokens))
