"""Jobs and results become bytes and come back unchanged, or are refused with a cause and a cure."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jd_hpc.errors import PayloadError
from jd_hpc.payload import ALIGN_BYTES, as_rows, check_dtype, check_finite, has_nan, pack, pack_into, unpack

RECORD = np.dtype([("x", "f8"), ("n", "i4")])
NESTED = np.dtype([("name", "S4"), ("point", RECORD), ("path", "i2", (2, 2))])

# ---- dtypes --------------------------------------------------------------------------------------------------------


def test_check_dtype_accepts_what_has_a_size():
    assert check_dtype(None, "job_dtype") is None
    assert check_dtype("f8", "job_dtype") == np.float64
    assert check_dtype(int, "job_dtype") == np.dtype(int)
    assert check_dtype(("f8", 3), "job_dtype").shape == (3,)
    assert check_dtype(NESTED, "job_dtype") == NESTED


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("no such type", "is no numpy dtype .*use None for Python objects"),
        (5, "is no numpy dtype"),
        (("f8", -1), "is no numpy dtype"),
        ([("a", "f8"), ("a", "f8")], "is no numpy dtype"),
        ("f8,,i4", "is no numpy dtype"),
        (object, "holds Python objects.*use job_dtype = None"),
        ([("a", "f8"), ("b", "O")], "holds Python objects"),
        ("S", "has no size; give its length"),
        (("f8", (2, 0)), "has no size"),
    ],
)
def test_check_dtype_names_cause_and_cure(wrong, said):
    with pytest.raises(PayloadError, match=f"job_dtype: .*{said}"):
        check_dtype(wrong, "job_dtype")


# ---- rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "dtype", "lead"),
    [
        (1.5, "f8", ()),
        (2, "f8", ()),
        (np.float32(1.5), "f8", ()),
        (True, "i8", ()),
        (1 + 2j, "c16", ()),
        ("ab", "U4", ()),
        ([1, 2, 3], ("f8", 3), ()),
        ((1, 2, 3), ("f8", 3), ()),
        (np.arange(3)[::-1], ("i8", 3), ()),
        (np.arange(6.0).reshape(2, 3).T, ("f8", (3, 2)), ()),
        ([[1, 2], [3, 4]], ("i4", (2, 2)), ()),
        ([1.0, 2.0], "f8", (2,)),
        (np.zeros((4, 3)), ("f8", 3), (4,)),
        (range(3), "i8", (3,)),
        (np.array([1.0, 2.0], ">f8"), "f8", (2,)),
        ([], "f8", (0,)),
        ((1.5, 2), RECORD, ()),
        (np.array((1.5, 2), RECORD), RECORD, ()),
        (np.array([(1.5, 2)], RECORD)[0], RECORD, ()),
        (np.array([(1.5, 2), (3, 4)], RECORD), RECORD, (2,)),
        ((b"ab", (1.0, 2), [[1, 2], [3, 4]]), NESTED, ()),
    ],
)
def test_as_rows_gives_the_same_values(value, dtype, lead):
    dtype = np.dtype(dtype)
    rows = as_rows(value, dtype, lead, "it")
    assert rows.shape == lead + dtype.shape
    assert rows.dtype == dtype.base
    assert rows.flags.c_contiguous
    expected = np.empty(lead, dtype)
    expected[...] = value
    np.testing.assert_array_equal(rows, expected)


def test_as_rows_takes_blocks_of_records_as_a_list():
    rows = as_rows([(1.5, 2), np.array((3.5, 4), RECORD)], RECORD, (2,), "it")
    assert rows.tolist() == [(1.5, 2), (3.5, 4)]


def test_as_rows_takes_a_row_of_several_records():
    rows = as_rows([(1.5, 2), (3.5, 4)], np.dtype((RECORD, 2)), (), "it")
    assert rows.tolist() == [(1.5, 2), (3.5, 4)]


def test_as_rows_takes_a_block_of_rows_of_several_records():
    given = [[(1.5, 2), (3.5, 4)], [(5.5, 6), (7.5, 8)], [(0.5, 1), (2.5, 3)]]
    assert as_rows(given, np.dtype((RECORD, 2)), (3,), "it").tolist() == given


def test_a_row_whose_elements_are_rows():
    """numpy keeps (("f8", 3), 2) as two nested subarrays; it is a row of shape (2, 3)."""
    dtype = check_dtype((("f8", 3), 2), "job_dtype")
    np.testing.assert_array_equal(as_rows(np.arange(6.0).reshape(2, 3), dtype, (), "it"), np.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize(
    ("value", "dtype", "lead", "said"),
    [
        # shape: nothing is broadcast
        (1.0, ("f8", 3), (), r"shape \(\) where \(3,\)"),
        ([1.0], ("f8", 3), (), r"shape \(1,\) where \(3,\)"),
        ([1.0], "f8", (), r"shape \(1,\) where \(\)"),
        (np.zeros((3, 1)), ("f8", 3), (), r"shape \(3, 1\)"),
        (np.zeros((2, 3)), ("f8", (3, 2)), (), r"shape \(2, 3\)"),
        (np.zeros(2), "f8", (3,), r"shape \(2,\) where \(3,\)"),
        ([[1], [2, 3]], "f8", (2,), "cannot become an array"),
        # kind: nothing is converted that may change the meaning
        (1.0, "i8", (), "dtype float64 where int64 .*convert it yourself"),
        (float("nan"), "i8", (), "dtype float64 where int64"),
        (1 + 0j, "f8", (), "dtype complex128 where float64"),
        ("1.5", "f8", (), "where float64"),
        (None, "f8", (), "dtype object where float64"),
        (3, "?", (), "dtype int64 where bool"),
        (-1, "u8", (), "uint64"),
        (object(), "f8", (), "dtype object"),
        (2**70, "i8", (), "dtype object|does not fit"),
        # range: nothing wraps
        (2**31, "i4", (), "does not fit into int32"),
        (np.uint64(2**63), "i8", (), "does not fit into int64"),
        ([0, 300], "i1", (2,), "does not fit into int8"),
        # records
        ((1.5,), RECORD, (), "give a tuple of 2 fields"),
        ([1.5, 2], RECORD, (), "is no record"),
        (7, RECORD, (), "is no record"),
        ((1.5, 2.5), RECORD, (), "field 'n' has dtype float64"),
        ((1.5, 2**40), RECORD, (), "field 'n'.* does not fit into int32"),
        ((b"ab", (1.0, 2**40), [[1, 2], [3, 4]]), NESTED, (), "field 'point', field 'n'"),
        ((b"ab", (1.0, 2), [1, 2]), NESTED, (), r"field 'path' has shape \(2,\)"),
        ([(1.5, 2)], RECORD, (2,), "is no sequence of 2 records"),
        (7, RECORD, (2,), "is no sequence of 2 records"),
    ],
)
def test_as_rows_refuses_what_does_not_fit(value, dtype, lead, said):
    with pytest.raises(PayloadError, match=f"^what next_job returned.*{said}"):
        as_rows(value, np.dtype(dtype), lead, "what next_job returned")


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (1e300, "f4"),
        (1e300 + 1j, "c8"),
        ("hello", "U3"),
        (b"hello", "S3"),
        (np.datetime64("2020-01-01T12"), "M8[D]"),
        (np.ma.masked_array([1.0, 2.0], [True, False]), ("f8", 2)),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_as_rows_refuses_a_conversion_that_loses_something(value, dtype):
    with pytest.raises(PayloadError):
        as_rows(value, np.dtype(dtype), (), "it")


def test_as_rows_rounds_to_a_float_but_keeps_infinity():
    assert as_rows(0.1, np.dtype("f4"), (), "it") == np.float32(0.1)
    assert as_rows(2**53 + 1, np.dtype("f8"), (), "it") == 2.0**53
    assert as_rows(float("inf"), np.dtype("f4"), (), "it") == np.inf


def test_as_rows_refuses_a_record_array_whose_numbers_do_not_fit():
    wide = np.array([(1.5, 2**40)], [("x", "f8"), ("n", "i8")])
    with pytest.raises(PayloadError):
        as_rows(wide, RECORD, (1,), "it")


def test_as_rows_never_mixes_up_fields():
    swapped = np.array((7, 8), [("y", "f8"), ("x", "f8")])
    try:
        rows = as_rows(swapped, np.dtype([("x", "f8"), ("y", "f8")]), (), "it")
    except PayloadError:
        return
    assert (rows["x"], rows["y"]) == (8, 7)


def test_as_rows_refuses_a_record_with_other_fields():
    with pytest.raises(PayloadError):
        as_rows(np.array((1.5, 2), [("height", "f8"), ("age", "i4")]), RECORD, (), "it")


INTEGERS = ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", ">i4"]


@given(value=st.integers(-(2**66), 2**66) | st.integers(-300, 300), name=st.sampled_from(INTEGERS))
def test_an_int_arrives_exactly_or_is_refused(value, name):
    info = np.iinfo(name)
    if info.min <= value <= info.max:
        assert int(as_rows(value, np.dtype(name), (), "it")) == value
    else:
        with pytest.raises(PayloadError):
            as_rows(value, np.dtype(name), (), "it")


@given(
    values=st.lists(st.integers(-(2**63), 2**64 - 1), min_size=1, max_size=4),
    given_as=st.sampled_from(INTEGERS),
    name=st.sampled_from(INTEGERS),
)
def test_integer_arrays_arrive_exactly_or_are_refused(values, given_as, name):
    array = np.array([value % 100 for value in values]).astype(given_as)
    info = np.iinfo(given_as)
    array[0] = min(max(values[0], info.min), info.max)
    try:
        rows = as_rows(array, np.dtype(name), array.shape, "it")
    except PayloadError:
        return
    assert rows.tolist() == array.tolist()


def test_as_rows_leaves_the_users_array_alone():
    mine = np.arange(3.0)
    rows = as_rows(mine, np.dtype(("f8", 3)), (), "it")
    assert rows is mine or rows.base is mine or not np.shares_memory(rows, mine)
    np.testing.assert_array_equal(mine, [0, 1, 2])


# ---- NaN -----------------------------------------------------------------------------------------------------------

NAN = float("nan")


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (np.array([1.0, NAN]), True),
        (np.array([1.0, np.inf]), False),
        (np.array([1 + 1j, complex(0, NAN)]), True),
        (np.array([1.0, NAN], "f2"), True),
        (np.array([1, 2]), False),
        (np.array(["nan"]), False),
        (np.array([(NAN, 1)], RECORD), True),
        (np.array([(1.0, 1)], RECORD), False),
        (np.array([(b"", (NAN, 1), [[0, 0], [0, 0]])], NESTED), True),
        (np.array([(b"", (0, 1), [[0, 0], [0, 0]])], NESTED), False),
        (np.zeros(0), False),
    ],
)
def test_has_nan(rows, expected):
    assert has_nan(rows) is expected
    if expected:
        with pytest.raises(PayloadError, match=r"it contains NaN, and allow_nan is False; .*set allow_nan = True"):
            check_finite(rows, "it")
    else:
        check_finite(rows, "it")


# ---- objects -------------------------------------------------------------------------------------------------------


def message_of(value):
    """What `pack` makes of it, at an aligned address."""
    frames, size = pack(value, "it")
    room = np.zeros(size + ALIGN_BYTES, "u1")
    start = -room.ctypes.data % ALIGN_BYTES
    out = room[start : start + size]
    pack_into(frames, out)
    return out


def round_trip(value):
    return unpack(message_of(value))


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4) | st.tuples(inner)
    ),
    max_leaves=20,
)


@given(PLAIN)
def test_plain_objects_come_back(value):
    assert round_trip(value) == value


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["f8", "i1", "c16", "?"]), st.lists(st.integers(0, 5), max_size=3)), max_size=6)
)
def test_arrays_come_back(kinds):
    arrays = [np.arange(int(np.prod(shape))).reshape(shape).astype(kind) for kind, shape in kinds]
    back = round_trip({"arrays": arrays})["arrays"]
    assert len(back) == len(arrays)
    for one, other in zip(arrays, back, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


def test_arrays_travel_out_of_band_and_come_back_as_aligned_views():
    arrays = [np.arange(n, dtype=kind) for n, kind in ((1, "i1"), (1000, "f8"), (7, "i2"), (65, "c16"))]
    out = message_of(arrays)
    for sent, back in zip(arrays, unpack(out), strict=True):
        assert np.shares_memory(back, out)
        assert back.ctypes.data % ALIGN_BYTES == 0
        np.testing.assert_array_equal(sent, back, strict=True)
    assert out.nbytes < sum(array.nbytes for array in arrays) + 1000 + 6 * ALIGN_BYTES


def test_pack_does_not_copy_arrays():
    array = np.arange(1000.0)
    frames, _ = pack([array], "it")
    assert any(np.shares_memory(np.frombuffer(frame, "u1"), array) for frame in frames if frame.nbytes)


def test_a_view_keeps_the_message_alive():
    back = round_trip([np.arange(100.0)])[0]
    np.testing.assert_array_equal(back, np.arange(100.0))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(0),
        np.zeros((0, 5), "i2"),
        np.array(3.5),
        np.arange(24.0).reshape(4, 6)[::2, ::3],
        np.arange(6.0).reshape(2, 3).T,
        np.array([(1.5, 2)], RECORD),
        np.array(["ab", "c"]),
        np.array([{}, None], object),
        np.arange(10)[::-1],
        np.broadcast_to(1.0, (3, 3)),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_peculiar_arrays_come_back(array):
    back = round_trip((array, "behind"))
    np.testing.assert_array_equal(back[0], array, strict=True)
    assert back[1] == "behind"


def test_many_buffers():
    arrays = [np.full(index % 3, index) for index in range(500)]
    for one, other in zip(arrays, round_trip(arrays), strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


def test_one_array_twice_is_one_array_afterwards():
    array = np.arange(1000.0)
    one, other = round_trip((array, array))
    assert one is other


def local_function():
    return lambda: None


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (local_function(), "local_function"),
        (threading.Lock(), "TypeError: cannot pickle '_thread.lock'"),
        ((i for i in range(3)), "generator"),
        ({"deep": [1, threading.Lock()]}, "lock"),
    ],
)
def test_what_cannot_be_pickled_names_cause_and_cure(value, named):
    with pytest.raises(
        PayloadError, match=f"^what process_job returned cannot be pickled: .*{named}.*make it plain data"
    ) as caught:
        pack(value, "what process_job returned")
    assert caught.value.__cause__ is not None


class RaisesWhenPickled:
    def __reduce__(self):
        raise ZeroDivisionError("one over nought")


def test_an_exception_while_pickling_is_named():
    with pytest.raises(PayloadError, match="it cannot be pickled: ZeroDivisionError: one over nought"):
        pack(RaisesWhenPickled(), "it")


def with_table(*numbers):
    """A message that is well formed but for its table."""
    out = message_of([np.arange(100.0)]).copy()
    out[: 8 * len(numbers)].view("i8")[:] = numbers
    return out


@pytest.mark.parametrize(
    "data",
    [
        np.zeros(0, "u1"),
        np.ones(7, "u1"),
        np.ones(8, "u1"),
        np.zeros(64, "u1"),
        with_table(0),
        with_table(-1),
        with_table(10**6),
        with_table(2**62),
        with_table(-(2**63)),
        with_table(2, -1),
        with_table(2, 10**9),
        with_table(2, 2**62, 2**62),
        with_table(2, 64, 10**5),
        message_of([np.arange(100.0)])[:200],
    ],
    ids=lambda data: f"{data.size}-{data[:24].tobytes().hex()}",
)
def test_a_corrupted_table_is_refused(data):
    with pytest.raises(PayloadError, match=f"a pickled message of {data.size} bytes"):
        unpack(data)


def test_a_corrupted_pickle_is_refused():
    """As the docstring of unpack promises."""
    data = message_of([1, 2, 3]).copy()
    data[ALIGN_BYTES : ALIGN_BYTES + 20] = 0xFF
    with pytest.raises(PayloadError):
        unpack(data)
