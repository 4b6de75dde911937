"""Ctrl-C in the middle of a run: it must reach the user's code, but never between two ranks that are parting."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

GIVE_UP_AFTER = 3
"""So many Ctrl-C while ranks part, and this one leaves without a goodbye."""


class Interrupts:
    """Context of a run: SIGINT raises KeyboardInterrupt as ever, but waits while `link.parting` is set.

    Where Python's own handler is not in place, or outside the main thread, nothing is changed.

    Parameters
    ----------
    link
        The core's master or slave. It sets `parting` itself when it leaves its loop, so that no signal can come in between; with
        `impatient` it leaves at once.
    """

    def __init__(self, link: Any) -> None:
        self._link = link
        self._held = 0
        self._ours = False

    def __enter__(self) -> Self:
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._handle)
            self._ours = True
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._link.parting:
            self._held += 1
            if self._held < GIVE_UP_AFTER:
                return
            self._link.impatient = True
        raise KeyboardInterrupt

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._ours and signal.getsignal(signal.SIGINT) == self._handle:  # a hook may have put its own there
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._held and not isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt
