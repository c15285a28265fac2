"""Runs the steps of an engine: one thread plans and launches them, another waits for them and delivers their outputs.

On CUDA a second step may be launched while the first computes, so that the device never waits for Python. One lock
guards the queue, the slot table and the steps in flight; no code holds it for long.
"""

import logging
from collections import deque
from collections.abc import Iterable
from threading import Condition, Lock, Thread
from time import perf_counter

import torch

from ranklet.replicas.adapters.manager import AdapterManager
from ranklet.replicas.engine.device_probe import DeviceProbe
from ranklet.replicas.engine.forecast import Forecast
from ranklet.replicas.engine.in_flight import InFlightStep
from ranklet.replicas.engine.masks import Masks
from ranklet.replicas.engine.plan import StepPlan
from ranklet.replicas.engine.result_thread import ResultThread
from ranklet.replicas.engine.scheduler import Scheduler
from ranklet.replicas.engine.sequence import Sequence
from ranklet.replicas.engine.stats import Listener
from ranklet.replicas.engine.step_runner import StepRunner
from ranklet.replicas.engine.step_sizes import cpu_sizes, gpu_sizes
from ranklet.replicas.errors import InternalError, Unavailable
from ranklet.replicas.model.heads import Head

_LAUNCH_LEAD_S = 0.004  # launch latency plus forecast error
_CPU_OVERHEAD_S = 0.003  # of a step on the CPU, outside of the model: planning, delivery and the threads' turns
_SOLO_OUTPUTS = 2  # of a sequence of a failed step: the first, which a prompt's step computes, and one of a decode
_HUNG_S = 30.0  # the device counts as broken when a step takes longer

logger = logging.getLogger(__name__)


class Pipeline:
    """The threads that run an engine's steps.

    Args:
        lock: held to use `scheduler` or `adapters`, and notified after a change.
        probe_head: head of the step that checks the device.

    Attributes:
        masks: computes the masks of texts with a grammar.
    """

    def __init__(
        self, lock: Condition, steps: StepRunner, scheduler: Scheduler, adapters: AdapterManager, listener: Listener,
        probe_head: Head, *, max_sequences: int,
    ) -> None:  # fmt: skip
        self.is_stopping = False
        self._lock = lock
        self._scheduler = scheduler
        self._adapters = adapters
        self._steps = steps
        self._listener = listener
        self._probe = DeviceProbe(steps.runner, probe_head)
        self.masks = Masks(lock, self._drop)
        self._mask_delay_s = 0.0  # of the next step
        self._max_sequences = max_sequences
        self._depth = 2 if steps.runner.model.device.type == "cuda" else 1
        self._forecast = Forecast()
        self._sizes = gpu_sizes if self._depth > 1 else cpu_sizes
        self._in_flight: deque[InFlightStep] = deque()
        self._launching: list[Sequence] = []  # on the CPU a launch is the whole computation
        self._launch_lock = Lock()
        self._must_probe = False  # a sequence failed alone: either it cannot be computed, or the device is broken
        self._launches_more = True  # until the step thread has launched its last step
        self._results = ResultThread()
        loops = {"step": self._step_loop, "answer": self._answer_loop}
        self._threads = [Thread(target=loop, name=f"ranklet-{name}", daemon=True) for name, loop in loops.items()]

    def start(self) -> None:
        self.masks.start()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        with self._lock:
            self.is_stopping = True
            self._lock.notify_all()
        self._refuse_waiting()
        self.masks.stop()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        self._results.stop()
        self._refuse_waiting()  # sequences of steps that failed, or that needed another pass, while the threads ended

    def _refuse_waiting(self) -> None:
        error = shutting_down()
        with self._lock:
            waiting = self._scheduler.waiting()
            self._drop(waiting)
        for sequence in waiting:
            sequence.request.fail(error)
        self._adapters.refuse_loads(error)

    def wait_for_launch(self) -> None:
        """Wait while a step is launched on CUDA. A thread calls this before it queues a request.

        Each kernel that is launched gives Python's interpreter up. Beside a thread that is busy in Python, the launch
        of a step without a graph takes ten times as long, and the device waits for it.
        """
        if self._depth > 1:
            with self._launch_lock:
                pass

    def wake(self, *, must_load: bool) -> None:
        """Plan again, because a request was queued. Called under the lock.

        Args:
            must_load: whether the request's adapter is in no slot.
        """
        if must_load or len(self._in_flight) < self._depth:  # else nothing can start before a step ends
            self._lock.notify_all()

    def running(self) -> list[Sequence]:
        """Return the sequences that are launched or on the device. Called under the lock."""
        return [*self._launching, *(each for step in self._in_flight for each in step.plan.sequences)]

    def stuck_s(self) -> float:
        with self._lock:
            launched_s = self._in_flight[0].launched.launched_s if self._in_flight and self._depth > 1 else None
        return 0.0 if launched_s is None else perf_counter() - launched_s

    def problem(self) -> str | None:
        """Return why no step runs; None if steps run."""
        if self._probe.has_failed:
            return "the device no longer computes"
        if not all(thread.is_alive() for thread in self._threads):
            return "the engine's threads do not run"
        stuck_s = self.stuck_s()
        return f"a step has been on the device for {stuck_s:.0f} s" if stuck_s >= _HUNG_S else None

    # The step thread

    def _step_loop(self) -> None:
        try:
            while self._run_step():
                pass
        except Exception:
            logger.exception("the step thread failed; this engine is unhealthy from now on")
        finally:
            with self._lock:
                self._launches_more, self.is_stopping = False, True
                self._lock.notify_all()
            self._refuse_waiting()

    def _run_step(self) -> bool:
        """Wait until a step is due and launch it. Returns False when the engine stops."""
        with self._lock:
            plan = None
            while plan is None and not self._must_probe:
                if self.is_stopping:
                    return False
                plan = self._next_plan()
                if plan is None:
                    self._lock.wait(self._wait_limit_s())
            if plan is not None:
                slots = self._commit(plan)
            else:
                self._must_probe = False
        if plan is None:
            self._probe.run()
            return True
        self._listener.cancelled(sum(sequence.request.is_open for sequence in plan.cancelled))
        if plan.computes:
            self._launch(plan, slots)
        return True

    def _commit(self, plan: StepPlan) -> list[int | None]:
        """Make the plan take effect. Returns the slot of each part."""
        # A preempted sequence keeps its slot: its adapter's files may have been replaced since it started.
        self._release_slots(plan.cancelled)
        starting = [part.sequence for part in plan.parts if not part.sequence.holds_slot]
        slots = self._adapters.acquire_slots([sequence.adapter for sequence in starting])
        for sequence, slot in zip(starting, slots, strict=True):
            sequence.slot, sequence.holds_slot = slot, True
            adapter = sequence.adapter
            sequence.request.start(sequence, None if adapter is None else self._adapters.info(adapter))
        if plan.computes:
            # A sequence may lose its slot while the device works on it: preempted, cancelled, or ended by its last
            # token. Then the step keeps the slot, so that no other adapter's weights are written into it.
            self._adapters.acquire_slots(plan.adapters)
        self._scheduler.commit(plan, perf_counter())
        self._launching = plan.sequences
        return [part.sequence.slot for part in plan.parts]

    def _drop(self, sequences: Iterable[Sequence]) -> None:
        """Free everything that sequences hold."""
        leaving = list(sequences)
        self._scheduler.drop(leaving)
        self._release_slots(leaving)

    def _release_slots(self, sequences: Iterable[Sequence]) -> None:
        holding = [sequence for sequence in sequences if sequence.holds_slot]
        self._adapters.release_slots([sequence.adapter for sequence in holding])
        for sequence in holding:
            sequence.holds_slot = False

    def _next_plan(self) -> StepPlan | None:
        """Return the step to launch now, if any, and start the loads that waiting sequences need."""
        self.masks.resume(self._scheduler.holders)
        is_full = len(self._in_flight) == self._depth
        self._mask_delay_s = self.masks.patience_s() if self._in_flight and not is_full else 0.0
        if self._mask_delay_s:
            return None
        if is_full and not len(self._scheduler.queue):  # no plan could be launched or demand an adapter
            self._adapters.start_loads(())
            return None
        self._scheduler.set_sizes(self._sizes(self._forecast))
        revived = True
        while revived:  # sequences of an adapter that no longer retires are ready now
            plan = self._scheduler.propose(self._adapters.usable)
            revived = self._adapters.start_loads(plan.demand, plan.adapters)
        if not self._in_flight:
            return plan if plan.is_due else None
        if is_full or not plan.computes:
            return None
        # A large step, or one of decodes, is launched behind the running one at once. A small step is launched just
        # before the device is free, because sequences that arrive until then can join it.
        is_large = plan.tokens * 2 >= self._steps.runner.max_tokens or len(plan.parts) * 2 >= self._max_sequences
        return plan if is_large or plan.decodes or self._due_in_s() <= 0 else None

    def _due_in_s(self) -> float:
        return self._forecast.free_s - _LAUNCH_LEAD_S - perf_counter()

    def _wait_limit_s(self) -> float | None:
        """Return the time until a small step is due behind the running one; None if only a change can make one due."""
        may_follow = 0 < len(self._in_flight) < self._depth and self._scheduler.has_waiting()
        due_s = (self._mask_delay_s or self._due_in_s()) if may_follow else 0.0
        return due_s if due_s > 0 else None

    def _launch(self, plan: StepPlan, slots: list[int | None]) -> None:
        try:
            with self._launch_lock:
                launched = self._steps.launch(plan, slots)
        except Exception as error:  # only this step fails
            if isinstance(error, torch.OutOfMemoryError):
                self._steps.runner.free_caches()
            self._on_failed_step(plan, error)
            return
        with self._lock:
            self._launching = []
            self._in_flight.append(InFlightStep(plan, launched))
            is_timed = not plan.uses_pages or (self._depth == 1 and not plan.decodes)
            self._forecast.on_launch(plan.tokens if is_timed else None, launched.launched_s)
            self._lock.notify_all()

    # The answer thread

    def _answer_loop(self) -> None:
        while True:
            with self._lock:
                while not self._in_flight:
                    if not self._launches_more:
                        return
                    self._lock.wait()
                step = self._in_flight[0]
            try:
                step.launched.wait()
            except Exception as error:
                self._on_failed_step(step.plan, error, step)
                continue
            finished_s, compute_s = perf_counter(), step.launched.device_s()
            began_s, uses_pages = finished_s - compute_s, step.plan.uses_pages
            # The lock keeps sequences with pages from being preempted during their delivery. Others are in no queue,
            # and the next step may be launched while their outputs are delivered.
            with self._lock:
                self._in_flight.popleft()
                self._forecast.on_finish(compute_s + (_CPU_OVERHEAD_S if self._depth == 1 else 0.0), finished_s)
                if uses_pages:
                    self._drop(step.deliver(began_s, compute_s))
                    self._scheduler.publish(step.plan)
                    self.masks.on_step(compute_s, finished_s)
                    self.masks.go_on(step.bound)
                else:
                    self._release_slots(step.plan.final)
                self._adapters.release_slots(step.plan.adapters)
                room = None if self._scheduler.space is None else self._scheduler.space.cache_room()
                self._lock.notify_all()
            if not uses_pages:
                step.deliver(began_s, compute_s)
            step.send(self._results)
            self._listener.batch(step.record(began_s, compute_s, room))

    def _on_failed_step(self, plan: StepPlan, error: Exception, launched: InFlightStep | None = None) -> None:
        """Run the sequences of a failed step one by one, so that only the one at fault fails.

        Args:
            launched: the oldest step in flight; None if the launch failed.
        """
        with self._lock:
            sequences = [sequence for sequence, epoch in plan.members() if sequence.epoch == epoch]
            again = [sequence for sequence in sequences if not sequence.solo] if len(sequences) > 1 else []
            if launched is not None:
                self._in_flight.popleft()
                self._forecast.on_failure()
            else:
                self._launching = []
            self._must_probe = self._must_probe or not again
            for sequence in again:
                sequence.solo = _SOLO_OUTPUTS
            self._scheduler.drop(sequences)
            self._release_slots(() if again else sequences)
            self._scheduler.retry(again)
            self._adapters.release_slots(plan.adapters)
            self._lock.notify_all()
        if not again:
            logger.error("a sequence failed", exc_info=error)
            why = f"the engine failed on this prompt: {type(error).__name__}: {error}"
            for sequence in sequences:
                sequence.request.fail(InternalError(why))


def shutting_down() -> Unavailable:
    return Unavailable("this replica is shutting down; send the request again")
