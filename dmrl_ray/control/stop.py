"""Signals that ask a run to stop: Ctrl+C, SIGTERM from a scheduler, SIGHUP of a closed terminal.

The first one is noted, and `check` raises at the next point where nothing is half done. A second
one ends the process at once: what is committed is whole at any moment.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from dmrl_ray.errors import ClusterError, Interrupted
from dmrl_ray.results.display import Display

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

GRACE_S = 3.0
"""Time to end in good order after the cluster was lost."""


class _Abandon(KeyboardInterrupt):
    """Raised at any point of code that is left; compilers go on after an `Exception`."""


class StopRequest:
    """Whether a run was asked to stop.

    Args:
        display: says at once what is waited for.

    Attributes:
        number: of the first signal that came; None before.
        waits_for: has to end before the run can stop.
        ended: set when the run has ended, in whatever way.
    """

    def __init__(self, display: Display) -> None:
        self.number: int | None = None
        self._display = display
        self.waits_for = ""
        self._abandons = False
        self.ended = threading.Event()
        self._lost: ClusterError | None = None

    def check(self) -> None:
        """Raise Interrupted if the run was asked to stop, ClusterError if it lost its cluster."""
        if self.number is not None:
            raise Interrupted(self.number)
        if self._lost is not None:
            raise self._lost

    def give_up(self, lost: ClusterError) -> None:
        """Have the run end, or the process if it does not; called by another thread.

        Calls of Ray may wait for a lost cluster without an end.
        """
        self._lost = lost
        if not self.ended.wait(GRACE_S):
            self._display.urgent(f"error: {lost}")
            os._exit(lost.exit_code if self.number is None else 128 + self.number)

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Take the signals over, and put the handlers back afterwards.

        Only the main thread can have handlers: in others the signals stay as they are.
        """
        before = {}
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.getsignal(number) for number in SIGNALS}
        if before.get(signal.SIGHUP) is signal.SIG_IGN:  # By `nohup`, to outlive the terminal.
            del before[signal.SIGHUP]
        taken = {number: handler for number, handler in before.items() if handler is not None}
        try:
            for number in taken:
                signal.signal(number, self._on_signal)
            yield
        finally:
            self.ended.set()
            for number, handler in taken.items():
                signal.signal(number, handler)

    @contextmanager
    def waiting_for(self, what: str) -> Iterator[None]:
        """Name what has to end before the run can stop."""
        before, self.waits_for = self.waits_for, what
        try:
            yield
        finally:
            self.waits_for = before

    @contextmanager
    def abandoning(self) -> Iterator[None]:
        """Leave the inside as soon as a signal comes, wherever it is; nobody needs its results.

        Raises:
            Interrupted: a signal came, whatever the code that it met made of that.
        """
        self._abandons = True
        try:
            self.check()
            yield
        except BaseException as error:
            if self.number is None or isinstance(error, Interrupted):
                raise
            raise Interrupted(self.number) from error
        finally:
            self._abandons = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            if hasattr(sys, "ps1"):  # A notebook or a prompt, which is to go on.
                raise KeyboardInterrupt
            os._exit(128 + number)
        self.number = number
        name = signal.Signals(number).name
        if self._abandons:
            raise _Abandon
        awaited = f" when {self.waits_for} has ended" if self.waits_for else ""
        self._display.urgent(f"{name}: stopping{awaited}; a second signal stops at once")
