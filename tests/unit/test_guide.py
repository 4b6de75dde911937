"""How many calls travel together."""

from __future__ import annotations

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from jd_hpc.guide import CHUNK_S, Guide


def sizes(guide, count, seconds_of, in_flight=1):
    """The sizes of all chunks, if so many are on their way and each call takes what `seconds_of` says."""
    told, flying = [], deque()
    while count or flying:
        while count and len(flying) < in_flight:
            size = guide.next(count)
            assert 1 <= size <= count
            flying.append((len(told), size))
            told.append(size)
            count -= size
        at, size = flying.popleft()
        guide.note(size, size * seconds_of(at))
    return told


def test_long_calls_travel_alone():
    assert sizes(Guide(3), 100, lambda at: 2 * CHUNK_S) == [1] * 100


def test_short_calls_travel_together_and_alone_at_the_end():
    told = sizes(Guide(3), 100_000, lambda at: 1e-6)
    assert told[:5] == [1, 2, 4, 8, 16]
    assert CHUNK_S / 1e-6 / 2 < max(told) <= CHUNK_S / 1e-6 + 1
    assert told[-6:] == [1] * 6
    assert len(told) < 100


def test_no_chunk_is_more_than_its_share():
    guide = Guide(4)
    for size in (1, 2, 4, 8, 16, 32, 64):
        guide.note(size, 1e-9)
    assert [guide.next(left) for left in (1000, 80, 8, 7, 1)] == [125, 10, 1, 1, 1]


def test_a_long_call_counts_at_once_and_is_forgotten_slowly():
    guide = Guide(1)
    for _ in range(12):
        guide.note(guide.next(10**6), 1e-9)
    assert guide.next(10**6) > 100
    guide.note(1, 1.0)
    assert guide.next(10**6) == 1
    sizes_after = []
    for _ in range(12):
        sizes_after.append(guide.next(10**6))
        guide.note(sizes_after[-1], 1e-9)
    assert sizes_after == sorted(sizes_after)
    assert sizes_after[:5] == [1] * 5
    assert sizes_after[-1] > 1


def test_a_fixed_size():
    assert sizes(Guide(3, 7), 30, lambda at: 100.0) == [7, 7, 7, 7, 2]


@given(st.integers(1, 20), st.integers(1, 5000), st.lists(st.floats(0, 10), min_size=1, max_size=50), st.integers(1, 40))
def test_everything_goes_out_whatever_is_measured(places, count, seconds, in_flight):
    told = sizes(Guide(places), count, lambda at: seconds[at % len(seconds)], in_flight)
    assert sum(told) == count
