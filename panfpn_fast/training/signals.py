"""Signals that ask a training run to stop."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

from panfpn_fast.data.loader import is_worker_failure

T = TypeVar("T")


class _Interrupted(BaseException):
    """Leaves a call that a signal interrupts; not an `Exception`, which the called code might catch."""


class StopSignals:
    """Records SIGTERM and SIGINT inside its `with` block, instead of ending the process.

    Does nothing outside the main thread, where Python forbids changing signal handlers.

    Args:
        interrupts: Whether a signal ends calls that are made through `interruptible`. With several processes it must
            not, because the other processes would wait for this one in their next collective operation.
    """

    def __init__(self, interrupts: bool) -> None:
        self.arrived = False
        self._interrupts = interrupts
        self._calling = False
        self._before: dict[signal.Signals, Any] = {}

    def interruptible(self, function: Callable[[], T]) -> T | None:
        """Calls a function; returns None if a signal arrives meanwhile, and leaves the function at once."""
        try:
            try:
                self._calling = self._interrupts
                return function()
            finally:
                self._calling = False
        except _Interrupted:
            return None
        except RuntimeError as error:
            # A signal to the process group also kills a worker that does not ignore it yet.
            if self.arrived and self._interrupts and is_worker_failure(error):
                return None
            raise

    def _record(self, *_: object) -> None:
        self.arrived = True
        if self._calling:
            self._calling = False
            raise _Interrupted

    def __enter__(self) -> StopSignals:
        """Starts to record signals."""
        self.arrived = False
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._record)
            except ValueError:  # not the main thread
                break
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restores the earlier handlers."""
        while self._before:
            signal.signal(*self._before.popitem())
