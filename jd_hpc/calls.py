"""How a call of a function travels: pickled where it is made, and run where it arrives.

The rules it keeps:

- What cannot be pickled is the error of that call alone, and shows where it was made.
- A function is pickled by name where pickle can do it; a lambda, or a function made inside another one, goes by cloudpickle, if
  that is installed.
- A function is unpickled once per process, not once per call. Other callables, such as methods of an object, are made anew for
  every call: what one call finds in them must not depend on which slave ran the one before.
- Arrays inside arguments and results may be written to, as after any other way between processes.
"""

from __future__ import annotations

import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any, TypeAlias

from jd_hpc.errors import PayloadError

KNOWN_FUNCTIONS = 64
"""Functions that a slave keeps unpickled: those used last."""
APART_FROM_BYTES = 4096
"""Memory of this size and more is not copied into the pickle; for less the detour costs more than the copy."""

SINGLE, PLAIN, STARRED = range(3)
"""Kinds of calls: one; a chunk with one argument for each; a chunk with many."""

Call: TypeAlias = tuple[bytes, bytes, Sequence[Any], int]
"""A call as it travels, a plain tuple because a class of ours would pickle five times slower: the pickled function; its pickled
arguments, which are (arguments, keywords), or for a chunk a list of arguments; the memory that is not copied into these; the kind.
The result of a chunk is the list of its results."""
Answer: TypeAlias = bytes | tuple[bytes, Sequence[Any]]
"""A result as it travels: pickled, with the memory that is not copied into it."""


def dumps(value: Any, what: str, buffers: list[Any] | None = None) -> bytes:
    """Pickle a value, by cloudpickle if pickle cannot and it is installed. Large buffers inside go to `buffers`, if that is given.

    Raises
    ------
    PayloadError
        If it cannot be pickled, with the cure.
    """

    def keep(buffer: pickle.PickleBuffer) -> bool:
        if buffers is None or memoryview(buffer).nbytes < APART_FROM_BYTES:
            return True
        buffers.append(buffer)
        return False

    try:
        return pickle.dumps(value, 5, buffer_callback=keep)
    except Exception as error:
        if buffers:
            buffers.clear()
        try:
            import cloudpickle
        except ImportError:
            raise PayloadError(
                f"{what} cannot be pickled: {type(error).__name__}: {error}. A function must be defined at the top of a module "
                f"that the slaves can import; with `pip install cloudpickle` lambdas and functions inside functions travel too. "
                f"Keep locks, files and generators out of the arguments"
            ) from error
    try:
        packed: bytes = cloudpickle.dumps(value, 5, buffer_callback=keep)
    except Exception as error:
        raise PayloadError(
            f"{what} cannot be pickled, nor by cloudpickle: {type(error).__name__}: {error}. Keep locks, files and generators out "
            f"of it"
        ) from error
    return packed


def name_of(function: Any) -> str:
    """Return what a function is called, for messages."""
    return getattr(function, "__qualname__", None) or type(function).__qualname__


_last: tuple[Any, bytes] = (None, b"")  # the function that was pickled last, if it goes by name: its pickle stays the same then


def packed_function(function: Callable[..., Any]) -> bytes:
    """Pickle a function, for `Call`."""
    global _last
    known, packed = _last
    if function is known:
        return packed
    packed = dumps(function, f"the function {name_of(function)}")
    if type(function) is FunctionType and _goes_by_name(function):
        _last = function, packed
    return packed


def _goes_by_name(function: FunctionType) -> bool:
    """Whether pickle finds it again where it was defined, so that what it refers to does not travel."""
    return getattr(sys.modules.get(function.__module__), function.__name__, None) is function


def call(function: Callable[..., Any], arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Call:
    """Make a call ready to travel."""
    buffers: list[Any] = []
    packed = dumps((tuple(arguments), dict(keywords)), f"an argument of {name_of(function)}", buffers)
    return packed_function(function), packed, buffers or (), SINGLE


def chunk(function: bytes, name: str, members: Sequence[Any], starred: bool = True) -> Call:
    """Make a chunk of calls of a packed function ready to travel: one for each argument, or `starred`, sequence of arguments."""
    buffers: list[Any] = []
    return function, dumps(members, f"an argument of {name}", buffers), buffers or (), STARRED if starred else PLAIN


def bytes_of(job: Call) -> int:
    """Return what a call weighs, but for the wrapping of the whole; each buffer is wrapped too."""
    function, arguments, buffers, _ = job
    apart_bytes = sum(memoryview(buffer).nbytes + 128 for buffer in buffers) if buffers else 0
    return len(function) + len(arguments) + apart_bytes


def refuse_streams(options: Mapping[str, Any]) -> None:
    """Raise TypeError where these options of a dispatcher want a random stream for each call: a call has no place for it."""
    if options.get("rng"):
        raise TypeError("rng: a call gets no random stream. Cure: give each a seed among its arguments, or use map_array(rng=True)")


_functions: OrderedDict[bytes, Callable[..., Any]] = OrderedDict()


def _function(packed: bytes) -> Callable[..., Any]:
    function = _functions.get(packed)
    if function is None:
        made: Callable[..., Any] = pickle.loads(packed)
        if not isinstance(made, FunctionType | type):
            return made
        function = _functions[packed] = made
        if len(_functions) > KNOWN_FUNCTIONS:
            _functions.popitem(last=False)
    elif len(_functions) == KNOWN_FUNCTIONS:
        _functions.move_to_end(packed)
    return function


def _loads(packed: bytes, buffers: Sequence[Any]) -> Any:
    return pickle.loads(packed, buffers=[bytearray(buffer) for buffer in buffers] if buffers else ())


def run(job: Call) -> Answer:
    """Run a call that arrived, and return its result as it travels."""
    packed, arguments, buffers, kind = job
    function = _function(packed)
    given = _loads(arguments, buffers)
    if kind == PLAIN:
        result: Any = [function(member) for member in given]
    elif kind == STARRED:
        result = [function(*member) for member in given]
    else:
        result = function(*given[0], **given[1])
    apart: list[Any] = []
    answer = dumps(result, f"the result of {name_of(function)}", apart)
    return (answer, apart) if apart else answer


def opened(answer: Answer) -> Any:
    """Return a result that arrived.

    Raises
    ------
    PayloadError
        If it was pickled well, but cannot be rebuilt here.
    """
    try:
        return pickle.loads(answer) if isinstance(answer, bytes) else _loads(*answer)
    except Exception as error:
        raise PayloadError(
            f"a result was pickled, but cannot be rebuilt here: {type(error).__name__}: {error}. Can this rank import what it is "
            f"made of?"
        ) from error
