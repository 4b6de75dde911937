"""Messages of the user's own between master and slaves: the table of handlers, and the run in one process. No MPI.

The rules it keeps:

- A message is handled once, by the first handler, in the order in which they were added, whose type fits and whose filter agrees.
- A handler is never called inside another handler.
- How messages travel is the core's business (_letters.pxi, _postmaster.pxi).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from jd_hpc.errors import MessageError

Handler = Callable[[int, Any], Iterable[tuple[int, Any]] | None]
Filter = Callable[[int, Any], object]

WAITING_MOST = 1024
"""Messages to itself that a hook may leave behind."""


class Handlers:
    """Who handles what."""

    def __init__(self) -> None:
        self._table: list[tuple[type, Handler, Filter | None]] = []

    def add(self, message_type: type, handler: Handler, accepts: Filter | None) -> None:
        """Let `handler` have messages of a type, if the filter accepts them. To add the same again changes nothing."""
        if not isinstance(message_type, type):
            raise TypeError(f"add_handler: {message_type!r} is no class; give the class of the messages")
        for name, given in (("handler", handler), ("filter", accepts)):
            if not callable(given) and not (name == "filter" and given is None):
                raise TypeError(f"add_handler: {name} = {given!r} cannot be called; it takes (source, message)")
        entry = (message_type, handler, accepts)
        if entry not in self._table:
            self._table.append(entry)

    def handle(self, source: int, message: Any) -> list[tuple[int, Any]]:
        """Call the handler of a message, and return its replies. One that every filter refuses is dropped.

        Raises
        ------
        MessageError
            If there is no handler for its type, or the handler returned something else than pairs.
        Exception
            Whatever the handler raises.
        """
        known = False
        for message_type, handler, accepts in self._table:
            if not isinstance(message, message_type):
                continue
            known = True
            if accepts is None or accepts(source, message):
                return _replies(handler, handler(source, message))
        if known:
            return []
        kind = type(message)
        raise MessageError(
            f"there is no handler here for a message of type {kind.__module__}.{kind.__qualname__}, from rank {source}. "
            f"Cure: self.add_handler({kind.__name__}, ...) on every rank that gets one, such as in __init__ or on_startup"
        )


def _replies(handler: Handler, returned: Any) -> list[tuple[int, Any]]:
    """Check what a handler returned."""
    if returned is None:
        return []
    try:
        replies = [(destination, reply) for destination, reply in returned]
    except (TypeError, ValueError) as error:
        raise MessageError(
            f"the handler {handler!r} returned {returned!r}. Cure: return None, or a list of pairs (destination, message)"
        ) from error
    return replies


class NoPost:
    """Stands where messages cannot go out: in the process that runs jobs for a rank (isolate), which must not call MPI."""

    def tell(self, message: Any, destination: int = 0) -> bool:
        """Refuse."""
        raise MessageError(
            "jobs in a process of their own (isolate=True) cannot tell(), broadcast() or poll(). Cure: isolate=False, or put what "
            "is to be said into the result"
        )

    def broadcast(self, message: Any) -> int:
        """Refuse."""
        return int(self.tell(message))

    def poll_letters(self) -> int:
        """Refuse."""
        return int(self.tell(None))


class LocalPost:
    """Own messages where there is no other rank: all are from rank 0 to rank 0, and none is pickled.

    Attributes
    ----------
    in_job : bool
        A job runs: what it tells is handled at once. What hooks and handlers tell is handled after them.
    """

    def __init__(self, handlers: Handlers) -> None:
        self._handlers = handlers
        self._waiting: deque[Any] = deque()
        self._handling = False
        self.in_job = False

    def tell(self, message: Any, destination: int = 0) -> bool:
        """Send a message to this process itself; whether it was sent."""
        if destination != 0:
            raise MessageError(f"there is no rank {destination} in this run. Cure: tell rank 0, which is the only one")
        if len(self._waiting) >= WAITING_MOST:
            raise MessageError(f"{WAITING_MOST} messages were told in one hook. Cure: call the handler")
        self._waiting.append(message)
        if self.in_job:
            self.settle()
        return True

    def broadcast(self, message: Any) -> int:
        """Send a message to all slaves, of which there are none."""
        return 0

    def poll_letters(self) -> int:
        """Nothing: handlers are called between hooks, and when a job tells something."""
        return 0

    def settle(self) -> bool:
        """Handle what was told; whether there was anything."""
        if self._handling or not self._waiting:
            return False
        self._handling = True
        try:
            while self._waiting:
                for destination, reply in self._handlers.handle(0, self._waiting.popleft()):
                    self.tell(reply, destination)
        finally:
            self._handling = False
        return True
