"""Tells whether the device computes."""

import logging

import numpy as np

from ranklet.replicas.engine.layout import TokenSpan
from ranklet.replicas.engine.runner import Runner
from ranklet.replicas.model.heads import Head

logger = logging.getLogger(__name__)


class DeviceProbe:
    """Runs one token of the base model.

    Attributes:
        has_failed: whether that failed once, so that the device is broken.
    """

    def __init__(self, runner: Runner, head: Head) -> None:
        self._runner = runner
        self._span = TokenSpan(np.zeros(1, dtype=np.int32), 0, head)
        self.has_failed = False

    def run(self) -> None:
        try:
            self._runner.launch([self._span], [None]).wait()
        except Exception:
            logger.exception("the device no longer computes; this engine is unhealthy from now on")
            self.has_failed = True
