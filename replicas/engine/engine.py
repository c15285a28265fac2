"""One base model on one device, answering for many adapters at once.

Two threads: *step* plans the next batch and launches it, *answer* waits for the device and hands out vectors. On CUDA a
second batch may be launched while the first computes, so that the device never waits for Python. Loads run on the
loader's threads. One lock guards the queue and the slot table; nothing slow happens under it.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from threading import Condition, Thread
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray

from ranklet.replicas.adapters.loader import Loader
from ranklet.replicas.adapters.manager import AdapterManager
from ranklet.replicas.adapters.pool import AdapterPool
from ranklet.replicas.adapters.reference import AdapterInfo, AdapterRef, AdapterReport, HeldAdapters
from ranklet.replicas.adapters.verify import ExpectedModules
from ranklet.replicas.config import EngineConfig
from ranklet.replicas.engine.fair_queue import flow_of
from ranklet.replicas.engine.fair_share import share_of_room
from ranklet.replicas.engine.forecast import Forecast
from ranklet.replicas.engine.in_flight import InFlightBatch, adapters_of, names_of, requests_of
from ranklet.replicas.engine.limits import RequestLimits
from ranklet.replicas.engine.request import Answer, Prompt, Request, Ticket
from ranklet.replicas.engine.runner import Runner
from ranklet.replicas.engine.scheduler import Scheduler, StepPlan
from ranklet.replicas.engine.stats import Listener, Snapshot
from ranklet.replicas.errors import InternalError, RankletError, Saturated, Unavailable
from ranklet.replicas.model.architecture import read_architecture, read_config
from ranklet.replicas.model.decoder import Decoder
from ranklet.replicas.model.device import pick_device, pick_dtype
from ranklet.replicas.model.modules import Module
from ranklet.replicas.model.pooling import read_pooling

_PROBE = np.zeros(1, dtype=np.int32)
_LEAD_S = 0.004  # from the decision to launch until the device has its first work, and what a forecast may be off by
_HUNG_S = 30.0  # a batch is on the device for so long: it will not come back

logger = logging.getLogger(__name__)


class Engine:
    """Serves embeddings of one base model and its adapters from one device.

    Raises:
        ModelError: the model folder cannot be served; the message says why.
    """

    def __init__(self, config: EngineConfig, listener: Listener | None = None) -> None:
        self.config = config
        self._listener = listener or Listener()
        device, dtype = pick_device(config), pick_dtype(config)
        settings = read_config(config.model_dir)
        architecture = read_architecture(settings)
        pooling = read_pooling(config.model_dir)
        limits = (config.max_model_len, pooling.max_tokens, architecture.max_position, config.max_batch_tokens)
        longest = min(limit for limit in limits if limit is not None)
        self.limits = RequestLimits(longest, architecture.hidden, architecture.vocab)
        self.architecture, self.device, self.dtype = architecture, device, dtype
        model = Decoder(architecture, settings, config.model_dir, longest, device, dtype)
        self._pool = AdapterPool(architecture, config.slots, config.max_rank, config.lora_modules, device, dtype)
        bases = tuple(dict.fromkeys((config.model_dir.resolve().name, *config.base_aliases)))
        expected = ExpectedModules(architecture, config.max_rank, config.lora_modules, bases, model.embedding)
        loader = Loader(self._pool, expected, config.host_cache_bytes)
        self._wake = Condition()
        self._adapters = AdapterManager(
            config.slots, loader, self._wake, self._take_waiting,
            on_load=self._listener.load, on_evicted=self._listener.evicted,
        )  # fmt: skip
        self.pools_last = pooling.mode == "last"
        most = config.max_batch_tokens
        self.stepper = Runner(model, self._pool, pooling, config.backend, config.merged_bytes, most)
        self._normalize = pooling.normalize
        self._depth = 2 if device.type == "cuda" else 1
        self._pace = Forecast()
        self._scheduler: Scheduler[Prompt] = Scheduler(
            max_tokens=config.max_batch_tokens, max_requests=config.max_batch_requests,
            max_adapters=config.adapters_per_batch, max_demand=config.slots,
        )  # fmt: skip
        self._flights: deque[InFlightBatch] = deque()
        self._launching: list[Prompt] = []  # on the CPU, where a launch is the whole computation
        self._suspect = False  # a prompt failed even alone: is it the prompt, or the device?
        self._broken = False  # the device
        self._stopping = False
        self._stepping = True  # until the step thread has launched its last batch
        self._threads = [Thread(target=run, name=f"ranklet-{run.__name__}", daemon=True) for run in self._loops()]

    def _loops(self) -> tuple[Callable[[], None], Callable[[], None]]:
        return self._step_loop, self._answer_loop

    # What callers use, from any thread

    def start(self) -> None:
        """Begin to serve. On a GPU it compiles the kernels first: some 20 s where nothing was compiled before."""
        config = self.config
        self.stepper.warm(self.limits.max_model_len, config.max_batch_requests)
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Finish what is on the device, refuse what waits with `Unavailable`, and end the threads."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        self._refuse_waiting()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        self._adapters.stop()
        self._refuse_waiting()  # what a batch that failed meanwhile has put back

    def _refuse_waiting(self) -> None:
        with self._wake:
            waiting = list(self._scheduler.queue)
            self._scheduler.queue.remove(waiting)
        error = Unavailable("this replica is shutting down; send the request again")
        for work in waiting:
            work.call.fail(error)
        self._adapters.refuse_loads(error)

    def submit(
        self, prompts: Sequence[NDArray[np.int32]], adapter: AdapterRef | None, dimensions: int | None,
        done: Callable[[Answer | RankletError], None],
    ) -> Ticket:  # fmt: skip
        """Queue prompts for one adapter; returns at once.

        Args:
            prompts: int32 [length] each, at least one.
            adapter: None for the base model.
            dimensions: how many leading values to keep of each vector; None for all.
            done: called once, on a thread of the engine, with the answer or the refusal.

        Raises:
            InvalidRequest: a prompt is empty or too long, a token id or `dimensions` is out of range.
            Saturated: too many tokens wait already.
            Unavailable: the engine is stopping.
        """
        width = self.limits.check(prompts, dimensions)
        tokens = sum(len(prompt) for prompt in prompts)
        arrived_s = perf_counter()
        with self._wake:
            self._admit(tokens, adapter)
            tier = None if adapter is None else self._adapters.tier(adapter)
            shortened = self._normalize and width < self.limits.hidden
            call = Request(len(prompts), width, shortened=shortened, tier=tier, tokens=tokens, done=done)
            call.works = [Prompt(p, adapter, arrived_s, call=call, index=i) for i, p in enumerate(prompts)]
            for work in call.works:
                self._scheduler.queue.add(work)
            self._wake.notify_all()
        if tier is not None:
            self._listener.tier_hit(tier)
        return Ticket(call)

    def load(self, adapter: AdapterRef) -> AdapterInfo:
        """Verify an adapter and bring it into a slot; blocks until it is there.

        Raises:
            AdapterNotFound, InvalidAdapter: as for a request that names it.
            Unavailable: the engine is stopping.
        """
        with self._wake:
            self._admit(0, adapter)
            future = self._adapters.request_load(adapter)
            self._wake.notify_all()
        return future.result()

    def pin(self, names: Collection[str]) -> None:
        """From now on these adapters keep their slots once they have one, and no others do.

        Raises:
            InvalidRequest: they would leave no slot for the rest.
        """
        with self._wake:
            self._adapters.pin(names)

    def release(self, name: str, keep: str | None = None) -> bool:
        """Free the slots and the host memory that an adapter has, but for the revision `keep`.

        Returns:
            Whether nothing of it is left; what requests still use stays until they are answered: ask again then.
        """
        with self._wake:
            return self._adapters.release_adapter(name, keep, self._in_use())

    def report(self) -> list[AdapterReport]:
        """Every adapter that this engine holds, loads, uses or has refused, by revision."""
        with self._wake:
            return self._adapters.report(self._in_use())

    def _in_use(self) -> Counter[AdapterRef]:
        """Adapters by the number of requests that wait for them or run with them."""
        flying = (work for flight in self._flights for work in flight.prompts)
        works = (*self._scheduler.queue, *self._launching, *flying)
        calls = {(id(work.call), work.adapter) for work in works if work.adapter is not None}
        return Counter(adapter for _, adapter in calls if adapter is not None)

    def offer(self, adapter: AdapterRef) -> None:
        """Bring an adapter into a slot ahead of its requests, if no other needs that slot; returns at once."""
        with self._wake:
            if not self._stopping:
                self._adapters.prefetch(adapter, adapters_of(self._scheduler.queue))

    def resident(self) -> tuple[str, ...]:
        """Names of the adapters ready in a slot, most recently used last; cheaper than a snapshot of a long queue."""
        with self._wake:
            return self._adapters.resident()

    def held(self) -> HeldAdapters:
        """What it holds now."""
        with self._wake:
            return self._adapters.held()

    def stuck_s(self) -> float:
        """How long the oldest batch has been on the device, 0 without one or where that says nothing (CPU)."""
        with self._wake:
            launched_s = self._flights[0].running.launched_s if self._flights and self._depth > 1 else None
        return 0.0 if launched_s is None else perf_counter() - launched_s

    def expire(self) -> None:
        """Refuse what has waited too long for an adapter on its way; whoever runs the engine calls it now and then."""
        self._adapters.expire(self.config.load_timeout_s)

    def slot_of(self, adapter: AdapterRef) -> int | None:
        """The slot an adapter is ready in, None if it is in none."""
        with self._wake:
            return self._adapters.slot_of(adapter)

    def ranks_in(self, slot: int) -> dict[Module, int]:
        """The rank of each module that the adapter in a slot targets."""
        return self._pool.ranks(slot)

    def snapshot(self) -> Snapshot:
        """What is resident, waiting and running now."""
        with self._wake:
            waiting = list(self._scheduler.queue)
            running = [*self._launching, *(work for flight in self._flights for work in flight.prompts)]
            return Snapshot(
                resident=self.resident(),
                hosted=self._adapters.held().hosted,
                waiting_requests=requests_of(waiting),
                waiting_tokens=self._scheduler.queue.tokens,
                running_requests=requests_of(running),
                waiting_adapters=names_of(waiting),
                running_adapters=names_of(running),
                slots=self.config.slots,
                pool_bytes=self._pool.nbytes,
                host_bytes=self._adapters.host_bytes,
                pinned=tuple(sorted(self._adapters.pinned)),
            )

    def healthy(self) -> bool:
        """Whether the engine can still answer: its threads live and its device computes."""
        return all(thread.is_alive() for thread in self._threads) and not self._broken and self.stuck_s() < _HUNG_S

    # Admission

    def _admit(self, tokens: int, adapter: AdapterRef | None) -> None:
        if self._stopping:
            raise Unavailable("this replica is shutting down; send the request again")
        refusal = None if adapter is None else self._adapters.refusal(adapter)
        if refusal is not None:
            raise refusal
        queue, limit = self._scheduler.queue, self.config.max_waiting_tokens
        name = flow_of(adapter)
        waiting, own = queue.tokens, queue.tokens_of(name)
        if waiting and waiting + tokens > limit:
            raise Saturated(f"this replica has {waiting} tokens waiting, its limit is {limit}; try again later")
        share = share_of_room(limit, waiting - own)
        if own and own + tokens > share:
            raise Saturated(
                f"{own} tokens of {f'adapter {name!r}' if name else 'the base model'} wait on this replica; of its "
                f"limit of {limit} they may have {share} now, so that others have room. Try again later"
            )

    # The step thread

    def _step_loop(self) -> None:
        try:
            while self._step():
                pass
        except Exception:
            logger.exception("the step thread failed; this engine is unhealthy from now on")
        finally:
            with self._wake:
                self._stepping, self._stopping = False, True
                self._wake.notify_all()
            self._refuse_waiting()

    def _step(self) -> bool:
        """Launch the next batch, waiting for one if need be; False when the engine stops."""
        with self._wake:
            proposal = None if self._suspect else self._next()
            while proposal is None and not self._suspect:
                if self._stopping:
                    return False
                self._wake.wait(self._patience_s())
                proposal = self._next()
            if proposal is None:
                self._suspect = False
            else:
                self._scheduler.commit(proposal)
                slots = self._adapters.acquire_slots(adapters_of(proposal.batch))
                self._launching = proposal.batch
        if proposal is None:
            self._probe()
            return True
        self._listener.cancelled(sum(work.call.open for work in proposal.cancelled))
        if proposal.batch:
            self._launch(proposal.batch, slots)
        return True

    def _probe(self) -> None:
        """A base prompt of one token tells a broken device from a prompt that cannot be computed."""
        try:
            self.stepper.launch([_PROBE], [None]).wait()
        except Exception:
            logger.exception("the device no longer computes; this engine is unhealthy from now on")
            self._broken = True

    def _next(self) -> StepPlan[Prompt] | None:
        """The batch to launch now, if any; starts the loads that waiting prompts need."""
        proposal = self._scheduler.propose(self._adapters.usable, self._pace.enough(), self._pace.small())
        self._adapters.start_loads(proposal.demand, adapters_of(proposal.batch))
        if not self._flights:
            return proposal if proposal.batch or proposal.cancelled else None
        if not proposal.batch or len(self._flights) == self._depth:
            return None
        # Behind a running batch at once if it is worth its launch. A small one would shut out what arrives meanwhile:
        # it goes just before the device is free.
        worth = proposal.tokens * 2 >= self.config.max_batch_tokens
        worth = worth or len(proposal.batch) * 2 >= self.config.max_batch_requests
        return proposal if worth or self._due_in_s() <= 0 else None

    def _due_in_s(self) -> float:
        return self._pace.free_s - _LEAD_S - perf_counter()

    def _patience_s(self) -> float | None:
        """How long to wait for news: until a small batch is due that may go behind the one that runs."""
        may_follow = 0 < len(self._flights) < self._depth and len(self._scheduler.queue) > 0
        due_s = self._due_in_s() if may_follow else 0.0
        return due_s if due_s > 0 else None

    def _launch(self, prompts: list[Prompt], slots: list[int | None]) -> None:
        try:
            running = self.stepper.launch([work.tokens for work in prompts], slots)
        except Exception as error:  # one batch fails, the engine goes on
            self._failed(prompts, error)
            return
        with self._wake:
            self._launching = []
            flight = InFlightBatch(prompts, running)
            self._flights.append(flight)
            self._pace.launched(flight.tokens, running.launched_s)
            self._wake.notify_all()

    # The answer thread

    def _answer_loop(self) -> None:
        while True:
            with self._wake:
                while not self._flights:
                    if not self._stepping:
                        return
                    self._wake.wait()
                flight = self._flights[0]
            try:
                vectors = flight.running.wait()
            except Exception as error:
                self._land(flight, perf_counter(), None)
                self._failed(flight.prompts, error, acquired=False)
                continue
            finished_s, compute_s = perf_counter(), flight.running.device_s()
            self._land(flight, finished_s, compute_s)
            began_s = finished_s - compute_s
            flight.answer(vectors, began_s, compute_s)
            self._listener.batch(flight.record(began_s, compute_s))

    def _land(self, flight: InFlightBatch, finished_s: float, compute_s: float | None) -> None:
        with self._wake:
            self._flights.remove(flight)
            if compute_s is None:
                self._pace.lost()
            else:
                self._pace.landed(compute_s, finished_s)
            self._adapters.release_slots(adapters_of(flight.prompts))
            self._wake.notify_all()

    def _failed(self, prompts: list[Prompt], error: Exception, *, acquired: bool = True) -> None:
        """Try the prompts of a failed batch one by one, so that only the one at fault fails."""
        if isinstance(error, torch.OutOfMemoryError):
            self.stepper.shed()
        again = [work for work in prompts if not work.solo] if len(prompts) > 1 else []
        with self._wake:
            if acquired:
                self._adapters.release_slots(adapters_of(prompts))
            self._launching = []
            self._suspect = not again
            for work in again:
                work.solo = True
            self._scheduler.queue.put_back(again)
            self._wake.notify_all()
        if not again:
            logger.error("a prompt failed", exc_info=error)
            for work in prompts:
                work.call.fail(InternalError(f"the engine failed on this prompt: {type(error).__name__}: {error}"))

    # The loader's threads

    def _take_waiting(self, adapter: AdapterRef) -> list[Request]:
        """Remove the prompts that wait for an adapter from the queue; returns their requests."""
        lost = [work for work in self._scheduler.queue if work.adapter == adapter]
        self._scheduler.queue.remove(lost)
        return [work.call for work in lost]
