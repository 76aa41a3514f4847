"""Ctrl-C and SIGTERM as a flag, so that a step is finished before the run stops."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class InterruptFlag:
    """Context manager: the first SIGINT or SIGTERM inside sets `set_by` to its name, the second raises
    KeyboardInterrupt. Outside the main thread, where Python has no signal handlers, it does nothing."""

    def __init__(self) -> None:
        self.set_by: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> InterruptFlag:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.set_by is not None:
            raise KeyboardInterrupt("stopped at once; the last checkpoint stands")
        self.set_by = signal.Signals(number).name
        logger.warning("%s: finishing this step, then saving; once more stops at once", self.set_by)
