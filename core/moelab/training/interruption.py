"""Ctrl-C and SIGTERM wait for the end of a step, so that what is saved then is a step's own state."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """A context in which the first signal is remembered, and a second one acts at once."""

    def __init__(self) -> None:
        self.requested = False
        self._held = self._waiting = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._previous = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def to_the_end(self) -> None:
        """Signals are remembered from here until this process ends, whatever is raised meanwhile."""
        self.__enter__()

    @contextmanager
    def listening(self) -> Iterator[Interruption]:
        """From here on a SIGTERM that this process was started to ignore is remembered; any other one ends it as ever.

        Whoever starts it so (examples/slurm/train.sbatch) wants what is saved at the end of a step, and the first step
        may be minutes away, when a large model is built or a checkpoint is read.
        """
        here = threading.current_thread() is threading.main_thread()
        ignored = here and signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        if ignored:
            signal.signal(signal.SIGTERM, self._remember)
        try:
            yield self
        finally:
            if ignored:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def check(self) -> None:
        """Between steps: raise KeyboardInterrupt if a signal came."""
        if self.requested:
            raise KeyboardInterrupt

    @contextmanager
    def held(self) -> Iterator[None]:
        """A second signal waits for the end of this: what belongs together, a step and its line, is not torn apart."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._waiting:
            raise KeyboardInterrupt

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.requested and not self._held:
            raise KeyboardInterrupt
        self.requested, self._waiting = True, self.requested
