"""Random streams: one for every job, known by the run's seed and the job's number alone. No MPI, no state.

The rules it keeps:

- A stream is Philox 4x64 with its key and counter set, not hashed: the seed is the key, the job's number the highest word of the
  counter. A seed's streams are pieces of one sequence, 2**194 numbers apart, and each seed has its own: no two can overlap.
- `jumped()` moves the next lower word, so that no number of jumps below 2**64 reaches another job's stream.
- `spawn()` gives children that depend on seed and number only, and never on the operating system's entropy.
- Making one costs about 3 us; by way of SeedSequence(seed, spawn_key=(index,)) it would be 11, and keys could collide.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.random import Generator, Philox, SeedSequence
from numpy.random.bit_generator import ISpawnableSeedSequence

SEED_MOST = (1 << 64) - 1
SECOND_KEY = 0x6A645F6870635F31
"""Philox takes a key of two words. With this one a script's own ``Philox(key=seed)`` is another sequence."""


class _Origin(ISpawnableSeedSequence):
    """What numpy asks for the key, and for children. Given ``key=`` it would read entropy all the same, which takes 5 us."""

    def __init__(self, seed: int, index: int) -> None:
        self.seed, self.index = seed, index
        self._family: SeedSequence | None = None  # made when there are children

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> Any:
        """Return the key. Philox asks for two words of 64 bits, and nobody else asks."""
        return np.array((self.seed, SECOND_KEY), "u8")

    def spawn(self, n_children: int) -> Sequence[SeedSequence]:  # type: ignore[override]  # numpy's own does the same
        """Return seeds for children: others at every call."""
        if self._family is None:
            self._family = SeedSequence((self.seed, SECOND_KEY), spawn_key=(self.index,))
        return self._family.spawn(n_children)


def stream(seed: int, index: int) -> Generator:
    """Return a fresh random stream.

    Parameters
    ----------
    seed : int
        The run's, 0 to `SEED_MOST`.
    index : int
        The job's number, from 0.
    """
    origin: Any = _Origin(seed, index)  # numpy's stub knows no other kind than its own
    return Generator(Philox(origin, counter=np.array((0, 0, 0, index), "u8")))
