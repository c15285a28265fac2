"""Ends requests whose results take the host a while, so that the answers of other requests do not wait for them.

Dense layers and heads multiply each vector by up to 64 MiB of weights. On the thread that delivers the outputs of
steps, the requests of one adapter would delay all streams.
"""

from collections import OrderedDict, deque
from collections.abc import Callable
from threading import Condition, Thread

from ranklet.replicas.engine.sequence import Flow


class ResultThread:
    """Ends one request at a time. Flows with requests take turns. The thread starts with the first request."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[Flow, deque[Callable[[], None]]] = OrderedDict()
        self._changed = Condition()
        self._is_stopping = False
        self._thread: Thread | None = None

    def stop(self) -> None:
        """End the requests that wait, then the thread. None come after this."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def add(self, flow: Flow, end: Callable[[], None]) -> None:
        """Queue a request of a flow.

        Args:
            end: raises nothing.
        """
        with self._changed:
            self._waiting.setdefault(flow, deque()).append(end)
            self._changed.notify()
            if self._thread is None:
                self._thread = Thread(target=self._run, name="ranklet-results", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while (end := self._next()) is not None:
            end()

    def _next(self) -> Callable[[], None] | None:
        """Wait for a request, and take it. Returns None at the end."""
        with self._changed:
            while not self._waiting:
                if self._is_stopping:
                    return None
                self._changed.wait()
            flow, ends = self._waiting.popitem(last=False)
            end = ends.popleft()
            if ends:
                self._waiting[flow] = ends  # behind the others
            return end
