"""The fixed order of steps that every inference call takes, from its HTTP headers to the end of its answer."""

import asyncio
import contextlib
from dataclasses import dataclass
from functools import partial

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ranklet.cluster.access.admission import Admission
from ranklet.cluster.access.keys import ApiKey, ApiKeys
from ranklet.cluster.access.quota import Charge, Quotas
from ranklet.cluster.catalog.location import AdapterLocation
from ranklet.cluster.config import LimitsConfig
from ranklet.cluster.ingress.body import read_body
from ranklet.cluster.ingress.intake import SMALL_BODY_BYTES, Inputs, Intake
from ranklet.cluster.ingress.known_fields import IGNORED_HEADER, ignored_value
from ranklet.cluster.ingress.naming import ModelNames
from ranklet.cluster.ingress.observe import Observer
from ranklet.cluster.ingress.protocol import TokenIds
from ranklet.cluster.ingress.refusals import on_error, refuse
from ranklet.cluster.ingress.replicas_client import ReplicasClient
from ranklet.cluster.ingress.sender import sender_of
from ranklet.cluster.ingress.stream import EventStream
from ranklet.cluster.ingress.task import AdmittedCall, InferenceTask, ParseTask
from ranklet.replicas.engine.limits import RequestLimits
from ranklet.replicas.errors import RankletError

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


class Exchange:
    """One inference call, of any task, until the end of its answer.

    Steps: check the key, admit the request, read and parse the body, find the model, check the key's rights and quota,
    check the parameters and lengths, tokenise, charge the quota, send the prompts to replicas, render the answer.

    Admission and the charge end with the answer, that of a stream with its last event. A call that fails or is
    cancelled costs no quota, unless it has generated tokens.
    """

    def __init__(self, services: InferenceServices, parse: ParseTask, request: Request) -> None:
        self._services = services
        self._parse = parse
        self._request = request
        self._record = services.observer.begin(f"{request.method} {request.scope['path']}", request.headers)
        self._held = contextlib.ExitStack()  # admission and the charge
        self._ignored: tuple[str, ...] = ()

    async def answer(self) -> Response:
        """Take all steps. Renders an error of any step as the answer.

        Raises:
            asyncio.CancelledError: the client disconnected.
        """
        observer, record = self._services.observer, self._record
        try:
            with self._held as held:
                response = await self._answer()
                if isinstance(response, EventStream):
                    self._name_ignored(response)
                    return _OpenAnswer(self, response, held.pop_all())
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
        self._name_ignored(response)
        return response

    async def send(
        self, stream: EventStream, held: contextlib.ExitStack, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Send a streamed answer. Its admission and charge, which are `held`, end with it.

        Raises:
            asyncio.CancelledError: the client disconnected.
        """
        observer, record = self._services.observer, self._record
        try:
            with held:
                await stream(scope, receive, send)
        except (asyncio.CancelledError, OSError):
            observer.on_disconnect(record)
            raise
        if stream.queue.error is not None:
            record.refused(stream.queue.error)
        observer.on_answer(record)

    async def _answer(self) -> Response:
        services, limits = self._services, self._services.limits
        key = services.keys.authenticate(self._request.headers)
        self._held.enter_context(services.admission.admit())
        owner = sender_of(key, self._request)
        share = self._held.enter_context(services.intake.room.share(owner))
        body = await read_body(self._request, limits.max_body_bytes, limits.body_timeout_s, share)
        engine_limits = await services.replicas.limits()
        body_bytes = len(body)
        if body_bytes > SMALL_BODY_BYTES:
            self._held.callback(services.intake.give_back_soon)
        check = partial(self._check, key, body, engine_limits)
        del body
        task, adapter, inputs = await services.intake.in_turn(owner, body_bytes, check)
        del check
        remake = partial(self._prompts, owner, task, adapter, engine_limits, body_bytes)
        prompts = await remake(inputs)
        share.release()
        return await task.respond(
            AdmittedCall(
                limits=engine_limits,
                stream_limits=limits,
                replicas=services.replicas,
                intake=services.intake,
                adapter=adapter,
                prompts=prompts,
                observer=services.observer,
                record=self._record,
                charge=await self._charge(key, prompts),
                key_name=_name_of(key),
                remake_prompts=remake,
            )
        )

    def _check(
        self, key: ApiKey | None, body: bytes, engine_limits: RequestLimits
    ) -> tuple[InferenceTask, AdapterLocation | None, Inputs | None]:
        """Take the steps from parsing to tokenising a small body. They share one thread, since each switch costs.

        A large body has a turn for them.
        """
        services = self._services
        task = self._parse(body)
        self._ignored, self._record.is_text = task.ignored, task.is_text
        adapter = services.names.resolve(key, task.model, task.lora_path)
        model = adapter.name if adapter else services.names.base
        services.observer.on_model(self._record, model, is_adapter=adapter is not None)
        services.quotas.check(key, model)
        return task, adapter, self._inputs(task, adapter, engine_limits, len(body))

    def _inputs(
        self, task: InferenceTask, adapter: AdapterLocation | None, engine_limits: RequestLimits, body_bytes: int
    ) -> Inputs | None:
        inputs = task.inputs(adapter, self._services.limits.max_texts_per_request, engine_limits)
        return None if inputs is None else self._services.intake.tokenise_if_small(inputs, body_bytes)

    async def _prompts(
        self, owner: str, task: InferenceTask, adapter: AdapterLocation | None, engine_limits: RequestLimits,
        body_bytes: int, inputs: Inputs | None = None,
    ) -> TokenIds:  # fmt: skip
        intake = self._services.intake
        if inputs is None:
            await task.prepare(adapter, engine_limits, owner)
            check = partial(self._inputs, task, adapter, engine_limits, body_bytes)
            inputs = await intake.in_turn(owner, body_bytes, check)
            assert inputs is not None, "the task is prepared"
        return await intake.tokenise(inputs, owner)

    async def _charge(self, key: ApiKey | None, prompts: TokenIds) -> Charge:
        services, record = self._services, self._record
        record.prompts, record.tokens = len(prompts), sum(map(len, prompts))
        self._held.enter_context(services.admission.admit_model(record.model, _name_of(key)))
        return self._held.enter_context(await services.quotas.charge(key, record.model, record.tokens))

    def _name_ignored(self, response: Response) -> None:
        if self._ignored:
            response.headers[IGNORED_HEADER] = ignored_value(self._ignored)
            self._services.observer.on_ignored(self._ignored)


def _name_of(key: ApiKey | None) -> str:
    return "" if key is None else key.name


class _OpenAnswer(Response):
    """A streamed answer that Starlette sends, with what its exchange holds until its end."""

    def __init__(self, exchange: Exchange, stream: EventStream, held: contextlib.ExitStack) -> None:
        super().__init__()
        self._parts = exchange, stream, held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange, stream, held = self._parts
        await exchange.send(stream, held, scope, receive, send)
