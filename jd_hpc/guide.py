"""How many calls travel together: guided self-scheduling.

The rules it keeps:

- It starts with one. Calls that take long travel alone, so that slaves are balanced one call at a time.
- Short ones travel together, as many as take CHUNK_S; but not more than leave every slave something to do at the end.
"""

from __future__ import annotations

CHUNK_S = 0.005
"""What a chunk may take, from the master and back, to be made larger: what a message costs is a hundredth of that."""


class Guide:
    """Says how large the next chunk is. It knows no clock.

    Parameters
    ----------
    places : int
        Where chunks run at the same time.
    fixed : int, optional
        The answer, if it is known.
    """

    def __init__(self, places: int, fixed: int | None = None) -> None:
        self._places = places
        self._fixed = fixed
        self._size = 1
        self._call_s = 0.0

    def next(self, left: int) -> int:
        """Return the size of the next chunk, if there are `left` calls to be given out."""
        return min(left, self._fixed or max(1, min(self._size, left // (2 * self._places))))

    def note(self, count: int, seconds: float) -> None:
        """A chunk of `count` calls took so long. One that is slow counts at once, the quick ones after it little by little."""
        self._call_s = max(seconds / count, self._call_s / 2, 1e-9)
        self._size = max(1, int(min(CHUNK_S / self._call_s, max(self._size, 2 * count))))
