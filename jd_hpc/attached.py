"""What belongs to a user's communicator, and lives as long as that one does.

The rules it keeps:

- It is kept as an attribute of the communicator: whoever has that finds it, and nobody else need remember it.
- When the user frees the communicator, on all ranks, what belongs to it is let go there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar, cast

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

T = TypeVar("T")


class Attached(Generic[T]):
    """One thing for each communicator that is asked for.

    Parameters
    ----------
    let_go : callable
        Called with the thing when its communicator is freed.
    """

    def __init__(self, let_go: Callable[[T], object]) -> None:
        self._let_go = let_go
        self._keyval: int | None = None
        self._lock = threading.Lock()  # of the keyval: runs may be in several threads

    def of(self, comm: Comm, make: Callable[[], T]) -> T:
        """Return what belongs to `comm`; it is made when it is first asked for."""
        from mpi4py import MPI

        with self._lock:
            if self._keyval is None:
                self._keyval = MPI.Comm.Create_keyval(delete_fn=self._delete, nopython=False)
        thing = cast(T | None, comm.Get_attr(self._keyval))
        if thing is None:
            thing = make()
            comm.Set_attr(self._keyval, thing)
        return thing

    def _delete(self, comm: Comm, keyval: int, thing: T) -> None:
        self._let_go(thing)
