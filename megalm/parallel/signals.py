"""Being asked to stop: USR1 and TERM from a scheduler, Ctrl-C from a person. Imports no torch, so that it listens early."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

ASKING = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Remembers that one of ASKING has arrived, and which. Nothing is interrupted; who can stop looks at `signal` at times.

    `with StopRequest() as stop:` listens inside the block. A second Ctrl-C raises KeyboardInterrupt: it ends at once.
    """

    def __init__(self) -> None:
        self.signal = ""  # the name of the last one; empty: none yet
        self._previous: dict[int, Any] = {}
        self._interrupts = 0

    def listen(self) -> StopRequest:
        """Take the signals, if this is the main thread (Python allows no other)."""
        if not self._previous and threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in ASKING}
        return self

    def __enter__(self) -> StopRequest:
        return self.listen()

    def __exit__(self, *details: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def ignore(self) -> None:
        """The process is about to end: a late signal must not change its exit code.

        Python gives handlers of its own up before it has ended, and the default action of USR1 kills; an ignored signal
        stays ignored.
        """
        for number in self._previous:
            if number != signal.SIGINT:
                signal.signal(number, signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
            os.write(2, b"\nstopping after this step; Ctrl-C once more ends at once, without saving\n")
