"""How jobs and results become bytes and come back.

Numeric payloads have a dtype: rows of fixed size, no pickle. What does not fit exactly is refused here with the cause and the cure;
numpy's own conversions would broadcast, cut or wrap silently. Objects travel by pickle protocol 5 with their buffers out of band:
arrays inside are laid behind the pickle and become views of the receive buffer.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jd_hpc.errors import PayloadError

ALIGN_BYTES = 64
"""Where buffers start inside a message, so that arrays that become views of it are aligned."""

Frames = list[memoryview]


def check_dtype(dtype: Any, name: str) -> np.dtype[Any] | None:
    """Return `dtype` as a numpy dtype, or None for objects.

    Raises
    ------
    PayloadError
        If it is no dtype, holds Python objects or has no size.
    """
    if dtype is None:
        return None
    try:
        given: np.dtype[Any] = np.dtype(dtype)
    except (TypeError, ValueError, SyntaxError) as error:
        raise PayloadError(f"{name}: {dtype!r} is no numpy dtype ({error}); use None for Python objects") from error
    shape: tuple[int, ...] = ()
    while given.subdtype is not None:  # an array of arrays is an array of more axes
        shape, given = shape + given.shape, given.base
    if shape:
        given = np.dtype((given, shape))
    if given.hasobject:
        raise PayloadError(f"{name}: {given} holds Python objects, which cannot travel as bytes; use {name} = None")
    if given.itemsize == 0:
        raise PayloadError(f"{name}: {given} has no size; give its length, or use None for Python objects")
    return given


def as_rows(value: Any, dtype: np.dtype[Any], lead: tuple[int, ...], what: str) -> NDArray[Any]:
    """Convert `value` to an array of shape `lead` + the row's shape, exactly.

    Parameters
    ----------
    value
        What a hook returned: an array, a number, a sequence; a tuple where the dtype has fields.
    dtype
        The row's dtype; a subarray dtype gives the row's shape.
    lead
        `()` for one row, `(n,)` for a block of n rows.
    what
        Where it came from, for the message.

    Raises
    ------
    PayloadError
        If the shape differs, or the conversion would lose something.
    """
    base, shape = dtype.base, lead + dtype.shape
    if base.names is not None and not isinstance(value, (np.ndarray, np.generic)):
        return _as_records(value, dtype, lead, what)
    if isinstance(value, np.ma.MaskedArray):
        raise PayloadError(f"{what} is a masked array, and its mask cannot travel; use filled(), or send the mask as a field")
    try:
        array = np.asarray(value)
    except Exception as error:  # ragged lists and the like
        raise PayloadError(f"{what}: {value!r} cannot become an array of {dtype} ({error})") from error
    if array.shape != shape:
        raise PayloadError(f"{what} has shape {array.shape} where {shape} was declared ({dtype}); reshape it, or declare its shape")
    if array.dtype != base:
        array = _cast(array, base, what)
    return np.ascontiguousarray(array).reshape(shape)


def _cast(array: NDArray[Any], base: np.dtype[Any], what: str) -> NDArray[Any]:
    """Convert the elements, if that loses nothing but digits of floating numbers."""
    if base.names is not None and array.dtype.names == base.names:
        out = np.empty(array.shape, base)
        for name in base.names:
            out[name] = as_rows(array[name], base[name], array.shape, f"{what}, field {name!r}")
        return out
    integers = array.dtype.kind in "iu" and base.kind in "iu"  # here the values decide
    castable = integers or np.can_cast(array.dtype, base, "same_kind")
    if not castable or array.dtype.hasobject or base.names is not None or array.dtype.names is not None:
        raise PayloadError(f"{what} has dtype {array.dtype} where {base} was declared; convert it yourself if that is meant")
    with np.errstate(over="ignore"):
        cast = array.astype(base)
    lossless = not (np.isinf(cast) & ~np.isinf(array)).any() if base.kind in "fc" else (cast == array).all()
    if not lossless:
        raise PayloadError(f"{what}: {array!r} does not fit into {base}")
    return cast


def _as_records(value: Any, dtype: np.dtype[Any], lead: tuple[int, ...], what: str) -> NDArray[Any]:
    """Fill records field by field, so that every field is checked."""
    base = dtype.base
    names = base.names or ()
    out = np.zeros(lead + dtype.shape, base)
    if out.ndim:
        if not isinstance(value, Sequence) or len(value) != len(out):
            raise PayloadError(f"{what}: {value!r} is no sequence of {len(out)} records of {base}")
        item_dtype = dtype if lead else np.dtype((base, dtype.shape[1:]))
        for at, item in enumerate(value):
            out[at] = as_rows(item, item_dtype, (), what)
        return out
    if not isinstance(value, tuple) or len(value) != len(names):
        raise PayloadError(f"{what}: {value!r} is no record of {base}; give a tuple of {len(names)} fields or a numpy record")
    for name, item in zip(names, value, strict=True):
        out[name] = as_rows(item, base[name], (), f"{what}, field {name!r}")
    return out


def block_length(block: Any, most: int) -> int:
    """How many jobs there are in what next_jobs returned; 0 for None.

    Raises
    ------
    PayloadError
        If it has no length, or is longer than `most`.
    """
    if block is None:
        return 0
    try:
        length = len(block)
    except TypeError as error:
        raise PayloadError(f"next_jobs({most}) returned {block!r}; return an array or a list of jobs, or None") from error
    if length > most:
        raise PayloadError(f"next_jobs({most}) returned {length} jobs; return at most as many as asked for")
    return length


def has_nan(rows: NDArray[Any]) -> bool:
    """Tell whether a floating or complex number in `rows`, in any field, is NaN."""
    if rows.dtype.names is not None:
        return any(has_nan(rows[name]) for name in rows.dtype.names)
    return rows.dtype.kind in "fc" and bool(np.isnan(rows).any())


def check_finite(rows: NDArray[Any], what: str) -> None:
    """Refuse NaN where the user declared it illegal.

    Raises
    ------
    PayloadError
        If there is one.
    """
    if has_nan(rows):
        raise PayloadError(f"{what} contains NaN, and allow_nan is False; find out why, or set allow_nan = True")


def pickled(value: Any, what: str) -> tuple[bytes, list[pickle.PickleBuffer]]:
    """Pickle `value`; return the pickle and the buffers that belong to it.

    Raises
    ------
    PayloadError
        If it cannot be pickled.
    """
    buffers: list[pickle.PickleBuffer] = []
    try:
        return pickle.dumps(value, 5, buffer_callback=buffers.append), buffers
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise _cannot_be_pickled(what, error) from error


def _cannot_be_pickled(what: str, error: BaseException) -> PayloadError:
    return PayloadError(
        f"{what} cannot be pickled: {type(error).__name__}: {error}. Keep locks, files, lambdas and generators out of it, or "
        f"make it plain data"
    )


def pack(value: Any, what: str) -> tuple[Frames, int]:
    """Pickle `value`; return the pieces of its message and their size in bytes, without copying the buffers inside it.

    Raises
    ------
    PayloadError
        If it cannot be pickled.
    """
    return framed(*pickled(value, what), what)


def framed(head: bytes, buffers: list[pickle.PickleBuffer], what: str) -> tuple[Frames, int]:
    """Do the second half of `pack`."""
    try:
        frames = [memoryview(head), *(buffer.raw() for buffer in buffers)]
    except BufferError as error:
        raise _cannot_be_pickled(what, error) from error
    table = np.array([len(frames), *(frame.nbytes for frame in frames)], "i8")
    frames.insert(0, memoryview(table.view("u1").data))
    return frames, sum(_aligned(frame.nbytes) for frame in frames)


def pack_into(frames: Frames, out: NDArray[np.uint8]) -> None:
    """Lay the pieces into `out`, each at a multiple of ALIGN_BYTES."""
    at = 0
    for frame in frames:
        out[at : at + frame.nbytes] = np.frombuffer(frame, "u1") if frame.nbytes else 0
        at += _aligned(frame.nbytes)


def unpack(data: NDArray[np.uint8]) -> Any:
    """Rebuild what `pack` took apart; arrays inside are views of `data`.

    Raises
    ------
    PayloadError
        If the bytes are not laid out as `pack` does it.
    Exception
        Whatever unpickling raises.
    """
    count = int(data[:8].view("i8")[0]) if data.size >= 8 else -1
    if not 1 <= count <= data.size // 8 - 1:
        raise PayloadError(f"a pickled message of {data.size} bytes claims to have {count} parts")
    sizes = data[8 : 8 + 8 * count].view("i8").tolist()
    at, views = _aligned(8 + 8 * count), []
    for size in sizes:
        if size < 0 or at + size > data.size:
            raise PayloadError(f"a pickled message of {data.size} bytes has parts of {sizes} bytes")
        views.append(memoryview(data[at : at + size]))  # type: ignore[arg-type]
        at += _aligned(size)
    try:
        return pickle.loads(views[0], buffers=views[1:])
    except pickle.UnpicklingError as error:
        raise PayloadError(f"a message of {data.size} bytes is no pickle ({error})") from error


def _aligned(size: int) -> int:
    return -(-size // ALIGN_BYTES) * ALIGN_BYTES


def pick(batch: Any, places: Sequence[int] | NDArray[np.int64]) -> Any:
    """Return the rows or objects at these places of a batch, rows read-only; the batch itself if that is all."""
    if len(places) == len(batch):
        return batch
    if isinstance(batch, list):
        return [batch[at] for at in places]
    rows = batch[places]
    rows.flags.writeable = False
    return rows
