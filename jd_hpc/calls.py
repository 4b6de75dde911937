"""How a call of a function travels: pickled where it is made, and run where it arrives.

The rules it keeps:

- What cannot be pickled is the error of that call alone, and shows where it was made.
- A function is pickled by name where pickle can do it; a lambda, or a function made inside another one, goes by cloudpickle, if
  that is installed.
- A function is unpickled once per process, not once per call. Other callables, such as methods of an object, are made anew for
  every call: what one call finds in them must not depend on which slave ran the one before.
"""

from __future__ import annotations

import importlib.util
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any, NamedTuple

from jd_hpc.errors import PayloadError

KNOWN_FUNCTIONS = 64
"""Functions that a slave keeps unpickled: those used last."""


class Call(NamedTuple):
    """A call as it travels: ``function(*arguments, **keywords)``, or one for each member of a chunk.

    Attributes
    ----------
    function : bytes
        The pickled function.
    arguments : bytes
        Pickled: (arguments, keywords), or for a chunk a list of arguments.
    buffers : sequence of pickle.PickleBuffer
        What belongs to `arguments` and is not copied into it: the memory of large arrays.
    is_chunk : bool
        Whether it stands for many calls; the result is the list of their results then.
    """

    function: bytes
    arguments: bytes
    buffers: Sequence[Any]
    is_chunk: bool


def dumps(value: Any, what: str, buffers: list[Any] | None = None) -> bytes:
    """Pickle a value, by cloudpickle if pickle cannot and it is installed. Large buffers inside go to `buffers`, if that is given.

    Raises
    ------
    PayloadError
        If it cannot be pickled, with the cure.
    """
    keep = None if buffers is None else buffers.append
    try:
        return pickle.dumps(value, 5, buffer_callback=keep)
    except Exception as error:
        if buffers:
            buffers.clear()
        if importlib.util.find_spec("cloudpickle") is None:
            raise PayloadError(
                f"{what} cannot be pickled: {type(error).__name__}: {error}. A function must be defined at the top of a module "
                f"that the slaves can import; with `pip install cloudpickle` lambdas and functions inside functions travel too. "
                f"Keep locks, files and generators out of the arguments"
            ) from error
    import cloudpickle

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


def packed_function(function: Callable[..., Any]) -> bytes:
    """Pickle a function, for `Call`."""
    return dumps(function, f"the function {name_of(function)}")


def call(function: Callable[..., Any], arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Call:
    """Make a call ready to travel."""
    buffers: list[Any] = []
    packed = dumps((tuple(arguments), dict(keywords)), f"an argument of {name_of(function)}", buffers)
    return Call(packed_function(function), packed, buffers, False)


def chunk(function: bytes, name: str, members: Sequence[Sequence[Any]]) -> Call:
    """Make a chunk of calls of a packed function ready to travel: one for each sequence of arguments."""
    buffers: list[Any] = []
    return Call(function, dumps(members, f"an argument of {name}", buffers), buffers, True)


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


def run(job: tuple[bytes, bytes, Sequence[Any], bool]) -> Any:
    """Run a call that arrived, and return its result."""
    packed, arguments, buffers, is_chunk = job
    function = _function(packed)
    given = pickle.loads(arguments, buffers=buffers)
    if is_chunk:
        return [function(*member) for member in given]
    return function(*given[0], **given[1])
