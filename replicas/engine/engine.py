"""One base model on one device, serving many adapters at once. Any thread may call an engine."""

import logging
from collections import Counter
from collections.abc import Collection, Iterator
from collections.abc import Sequence as Many
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from threading import Condition
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from ranklet.replicas.adapters.dense_files import read_base_dense
from ranklet.replicas.adapters.expected_modules import ExpectedModules
from ranklet.replicas.adapters.loader import MAX_READERS, Loader
from ranklet.replicas.adapters.manager import AdapterManager
from ranklet.replicas.adapters.pool import AdapterPool
from ranklet.replicas.adapters.reference import AdapterInfo, AdapterRef, AdapterReport, HeldAdapters
from ranklet.replicas.cache.pages import IntegrityError
from ranklet.replicas.cache.prefix import base_revision
from ranklet.replicas.cache.tensors import KvPages, pages_that_fit
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.generate import GenerateTask
from ranklet.replicas.engine.kv_space import KvSpace, integrity_check
from ranklet.replicas.engine.lengths import request_limits
from ranklet.replicas.engine.limits import check_space, check_wait
from ranklet.replicas.engine.paged_runner import PagedRunner
from ranklet.replicas.engine.params import EmbedParams, Params
from ranklet.replicas.engine.pipeline import Pipeline, shutting_down
from ranklet.replicas.engine.request import Request, Sink, Ticket
from ranklet.replicas.engine.runner import Runner
from ranklet.replicas.engine.scheduler import Scheduler
from ranklet.replicas.engine.snapshots import snapshot_of
from ranklet.replicas.engine.start_times import StartTimes
from ranklet.replicas.engine.stats import Listener, Snapshot
from ranklet.replicas.engine.step_cost import StepCost
from ranklet.replicas.engine.step_runner import StepRunner
from ranklet.replicas.engine.tasks import Task, embed_task
from ranklet.replicas.engine.text import Text, generates_text, why_no_text
from ranklet.replicas.engine.text_warmup import warm_up_text
from ranklet.replicas.engine.text_workspace import text_reserve
from ranklet.replicas.engine.warmup import measured_workspace, warm_up
from ranklet.replicas.errors import InvalidRequest
from ranklet.replicas.model.architecture import read_architecture, read_config
from ranklet.replicas.model.decoder import Decoder
from ranklet.replicas.model.device import pick_device, pick_dtype
from ranklet.replicas.model.end_of_text import EndOfText
from ranklet.replicas.model.heads import PoolingHeads, TextHead
from ranklet.replicas.model.lm_head import LmHead
from ranklet.replicas.model.pooling import read_pooling
from ranklet.replicas.model.sampler import Sampler

logger = logging.getLogger(__name__)


class Engine:
    """Serves one base model and its adapters from one device.

    Attributes:
        heads: the heads of embeddings.
        end_of_text: the tokens that end texts.
        runner: launches steps without pages; public for benchmarks and profiles, as is the next.
        steps: launches all steps.

    Raises:
        ModelError: the model folder cannot be served; the message says why.
    """

    def __init__(self, config: EngineConfig, listener: Listener | None = None) -> None:
        self.config, self._listener, self._times = config, listener or Listener(), StartTimes()
        self.device, self.dtype = pick_device(config), pick_dtype(config)
        settings = read_config(config.model_dir)
        self.architecture = architecture = read_architecture(settings)
        dense = read_base_dense(config.model_dir, architecture.hidden)
        self.heads = PoolingHeads(read_pooling(config.model_dir), dense)
        limits = partial(request_limits, config, architecture, self.heads.base.pooling, self.dtype)
        longest = limits(makes_text=generates_text(config)).max_model_len
        with self._times.part("weights"):
            model = Decoder(architecture, settings, config.model_dir, longest, self.device, self.dtype)
            self._pool = AdapterPool(
                architecture, config.slots, config.max_rank, config.lora_modules, self.device, self.dtype,
                config.token_rows, config.added_tokens,
            )  # fmt: skip
        self._no_text = why_no_text(config, model.lm_head)
        self.limits = replace(limits(makes_text=self._no_text is None), no_text=self._no_text)
        bases = tuple(dict.fromkeys((config.model_dir.resolve().name, *config.base_aliases)))
        self.end_of_text = EndOfText(config.model_dir, settings, architecture.vocab)
        if self._no_text is None:
            with self._times.part("revision"):
                self.limits = self.limits.with_text(self.end_of_text.base_ids, base_revision(config.model_dir))
        self._expected = ExpectedModules(
            architecture, config.max_rank, config.lora_modules, bases, model.embedding,
            model.lm_head if self._no_text is None and isinstance(model.lm_head, LmHead) else None,  # used by texts
            self.end_of_text, config.slots, config.adapter_roots, model.linears, config.token_rows, config.added_tokens,
        )  # fmt: skip
        loader = Loader(self._pool, self._expected, config.host_cache_bytes)
        self._lock = Condition()
        self._scheduler = Scheduler(
            max_tokens=config.max_batch_tokens, max_sequences=config.max_batch_requests,
            max_adapters=config.adapters_per_batch, max_demand=config.slots + MAX_READERS,
            costs=StepCost.of(architecture), decode_slowdown=config.decode_slowdown,
        )  # fmt: skip
        self._adapters = AdapterManager(
            config.slots, loader, self._lock, self._scheduler.take_waiting, on_load=self._listener.load,
            on_loading=self._listener.loading, on_evicted=self._listener.evicted,
        )  # fmt: skip
        self.runner = Runner(model, self._pool, config)
        self.steps = StepRunner(self.runner)
        self._text: Text | None = None
        self._lost_pages: str | None = None
        self._pipeline = Pipeline(
            self._lock, self.steps, self._scheduler, self._adapters, self._listener, self.heads.base,
            max_sequences=config.max_batch_requests,
        )  # fmt: skip
        if self._no_text is None:
            with self._times.part("grammars"):
                self.limits = self._pipeline.masks.prepare(config.model_dir, self.limits)

    def start(self) -> None:
        """Compile kernels and begin to serve. On a GPU the first start takes minutes, a later one less."""
        config, longest = self.config, min(self.limits.max_model_len, self.config.max_batch_tokens)
        with self._times.part("kernels"), measured_workspace(self.device) as workspace:
            warm_up(self.runner, self.heads.base, longest, config.max_batch_requests)
        lm_head = self.runner.model.lm_head
        if self._no_text is None and isinstance(lm_head, LmHead):
            self._start_text(lm_head, workspace.bytes)
        self._expected.prepare()
        self._pipeline.start()
        logger.info("the engine started in %s", self._times.summary())

    def _start_text(self, lm_head: LmHead, workspace_bytes: int) -> None:
        config, rows, longest = self.config, self.config.max_batch_requests, self.limits.max_model_len
        with self._times.part("text kernels"):
            head = TextHead(lm_head, Sampler(self.limits.vocab, rows, self.device, config.added_tokens))
            reserve_bytes = text_reserve(self.runner, head, self.heads, config, longest, workspace_bytes)
        with self._times.part("pages"):
            pages = pages_that_fit(
                self.architecture, self.dtype, self.device, config, longest, reserve_bytes, self._pool.rows.most_bytes
            )
            space = KvSpace(pages, rows, longest)
            kv = KvPages(self.architecture, pages, self.device, self.dtype)
            self.steps.paged = PagedRunner(self.runner, kv, space.table, head, self.heads)
        self._text = Text(head, self.limits, str(self.dtype), config.prefix_cache)
        self._scheduler.space = space
        with self._times.part("graphs"):
            warm_up_text(self.steps.paged, longest)

    def stop(self) -> None:
        """Finish the steps on the device, refuse waiting requests with `Unavailable`, and end the threads."""
        self._pipeline.stop()
        self._adapters.stop()

    def submit(
        self, prompts: Many[NDArray[np.int32]], adapter: AdapterRef | None, params: Params, sink: Sink, *,
        given: Many[NDArray[np.int32]] = (), key_name: str = "",
    ) -> Ticket:  # fmt: skip
        """Queue a request and return at once. The class of `params` is the kind of the request.

        Args:
            prompts: int32 [length] each.
            adapter: None for the base model.
            given: int32 [length] for each choice: tokens that it has already. Empty if all choices are new.
            key_name: name of the API key, which shares each adapter with others; "" without one.

        Raises:
            InvalidRequest: a prompt is empty or too long, or a token id or parameter is out of range.
            InvalidAdapter: an earlier load of the adapter was refused. A load that fails later ends at `sink`.
            Saturated: too many tokens are waiting, or the wait would be too long.
            Unavailable: the engine is stopping.
        """
        task: Task
        limits = self.limits.of(adapter)
        if isinstance(params, EmbedParams):
            task = embed_task(params, prompts, self.heads, limits, self.runner.model.lm_head, adapter)
        elif self._text is None:
            raise InvalidRequest(self._no_text or "the engine has not started; send the request again", param="model")
        else:
            limits.check_prompts(prompts, limits.max_model_len)
            task = self._text.task(params, prompts, adapter, given)
        return self.submit_task(prompts, adapter, task, sink, given=given, key_name=key_name)

    def submit_task(
        self, prompts: Many[NDArray[np.int32]], adapter: AdapterRef | None, task: Task, sink: Sink, *,
        given: Many[NDArray[np.int32]] = (), key_name: str = "",
    ) -> Ticket:  # fmt: skip
        """Queue a request of any task; see `submit`. The prompts must be within `limits`."""
        request = Request(task, prompts, adapter, sink, arrived_s=perf_counter(), given=given, key_name=key_name)
        queue = partial(self._queue, request, adapter, sum(map(len, (*prompts, *given))))
        if isinstance(task, GenerateTask) and task.has_grammar:
            self._pipeline.masks.begin(task, request, queue)
        else:
            queue()
        return Ticket(request)

    def _queue(self, request: Request, adapter: AdapterRef | None, tokens: int) -> None:
        self._pipeline.wait_for_launch()
        with self._lock:
            self._check_adapter(adapter)
            check_space(self._scheduler.queue, self.config.max_waiting_tokens, request.sequences[0].flow, tokens)
            check_wait(self._scheduler.queue, self.config.max_wait_s, request.sequences, perf_counter())
            tier = request.tier = None if adapter is None else self._adapters.tier(adapter)
            self._scheduler.queue.add(request.sequences)
            self._pipeline.wake(must_load=tier not in (None, "gpu"))
        if tier is not None:
            self._listener.tier_hit(tier)

    def load(self, adapter: AdapterRef) -> AdapterInfo:
        """Verify an adapter and load it into a slot. Returns after the load.

        Raises:
            AdapterNotFound: its folder does not exist.
            InvalidAdapter: it cannot be served.
            Unavailable: the engine is stopping.
        """
        with self._lock:
            self._check_adapter(adapter)
            future = self._adapters.request_load(adapter)
            self._lock.notify_all()
        return future.result()

    def _check_adapter(self, adapter: AdapterRef | None) -> None:
        if self._pipeline.is_stopping:
            raise shutting_down()
        refusal = None if adapter is None else self._adapters.refusal(adapter)
        if refusal is not None:
            raise refusal

    def pin(self, names: Collection[str]) -> None:
        """Replace the set of pinned adapters. A pinned adapter is never evicted.

        Raises:
            InvalidRequest: no slot would be left for other adapters.
        """
        with self._lock:
            self._adapters.pin(names)

    def release(self, name: str, keep: str | None = None) -> bool:
        """Free the slots and the host memory of an adapter's revisions other than `keep`.

        Returns:
            Whether everything is free. Revisions that requests use stay: call again after the requests are answered.
        """
        with self._lock:
            return self._adapters.release_adapter(name, keep, self._references())

    def report(self) -> list[AdapterReport]:
        """Describe every adapter revision that is held, loading, in use or refused."""
        with self._lock:
            return self._adapters.report(self._references())

    def _references(self) -> Counter[AdapterRef]:
        """Count the open requests of each adapter. Called under the lock."""
        # A sequence is in the queue, among the decoding ones, or in a step whose output is not delivered.
        sequences = [*self._scheduler.waiting(), *self._pipeline.running()]
        pairs = {(id(each.request), each.adapter) for each in sequences}
        return Counter(adapter for _, adapter in pairs if adapter is not None)

    def prefetch(self, adapter: AdapterRef) -> None:
        """Start to load an adapter before its first request, if no other adapter needs that slot."""
        with self._lock:
            if not self._pipeline.is_stopping:
                self._adapters.prefetch(adapter, [sequence.adapter for sequence in self._scheduler.queue])

    def held(self) -> HeldAdapters:
        with self._lock:
            return self._adapters.held()

    def stuck_s(self) -> float:
        """Return how long the oldest step has been on the device; 0 without a step, and on the CPU."""
        return self._pipeline.stuck_s()

    def expire(self) -> None:
        """Refuse requests whose adapter loads for too long. The owner calls it a few times a second."""
        self._adapters.expire(self.config.load_timeout_s)

    def slot_of(self, adapter: AdapterRef) -> int | None:
        """Return the slot of an adapter; None if it is not ready in one."""
        with self._lock:
            return self._adapters.slot_of(adapter)

    def snapshot(self) -> Snapshot:
        with self._lock:
            return snapshot_of(
                self._scheduler, self._pipeline.running(), self._adapters, slots=self.config.slots,
                pool_bytes=self._pool.nbytes,
            )  # fmt: skip

    def healthy(self) -> bool:
        return self.problem() is None

    def problem(self) -> str | None:
        """Return why the engine is unhealthy; None if its threads run, the device computes and no page is lost."""
        return self._lost_pages or self._pipeline.problem()

    def check_integrity(self) -> None:
        """Check that every page of the key-value cache is free, cached or held by a sequence.

        If not, the engine is unhealthy from now on. The owner calls this every few seconds.

        Raises:
            IntegrityError: the tables contradict each other: a defect of ranklet.
        """
        with self._lock:
            space = self._scheduler.space
            check = None if space is None else integrity_check(space.pool, self._scheduler.holders.all)
        try:
            if check is not None:
                check()
        except IntegrityError as error:
            self._lost_pages = f"the tables of the key-value cache contradict each other: {error}"
            raise

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Plan no step while the context is open, so that requests submitted in it can share one."""
        with self._lock:
            yield
