"""Compiled kernels: what counts as one, and how its address is found.

A kernel is a C function ``int32_t kernel(const void *job, void *result, void *user_data)``. It gets one row of `job_dtype`, fills
one row of `result_dtype` and returns 0; any other number is this job's failure. It runs without the GIL: it must not touch Python.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

from jd_hpc.errors import KernelError

SIGNATURES = ("int32_t (const void *, void *, void *)", "int (const void *, void *, void *)")
"""Names that a capsule may carry, in the manner of scipy.LowLevelCallable; a capsule without a name is trusted."""

CFUNCTYPE = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
"""The ctypes type of a kernel, for callbacks and for casting."""


_FUNCTION_POINTER: Any = CFUNCTYPE.__mro__[1]  # the base of all ctypes function pointers has no public name


class Kernel(NamedTuple):
    """A kernel that was found: what keeps it alive, its address, and the address of its user data (0: NULL)."""

    keep: Any
    address: int
    user_data: int


def is_one(given: Any) -> bool:
    """Tell whether this is meant as a kernel, and not as a Python function."""
    if isinstance(given, (tuple, _FUNCTION_POINTER)) or type(given).__name__ == "PyCapsule" or _is_cffi(given):
        return True
    return isinstance(getattr(given, "address", None), int) and hasattr(given, "native_name")


def resolve(given: Any) -> Kernel:
    """Find the address of a kernel.

    Parameters
    ----------
    given
        A ctypes function pointer; a cffi function pointer; a ``numba.cfunc``; a PyCapsule, as Cython's ``__pyx_capi__`` holds
        them; a ``scipy.LowLevelCallable``; or a tuple (one of these, user data), where user data is an address, a pointer of
        ctypes or cffi, or None.

    Raises
    ------
    KernelError
        If it is none of these, or its signature is a different one.
    """
    user_data: Any = None
    function = given
    if isinstance(given, tuple):
        # a LowLevelCallable is a tuple too: (capsule, function, user data)
        if type(given).__name__ == "LowLevelCallable":
            function, user_data = given.function, given.user_data  # type: ignore[attr-defined]
        elif len(given) == 2:
            function, user_data = given
        else:
            raise KernelError(f"a kernel with user data is a pair (function, user_data), not {given!r}")
    return Kernel(given, _address(function), _data_address(user_data))


def _address(function: Any) -> int:
    address = 0
    if isinstance(function, _FUNCTION_POINTER):
        _check_ctypes(function)
        address = ctypes.cast(function, ctypes.c_void_p).value or 0
    elif type(function).__name__ == "PyCapsule":
        return _capsule_address(function)
    elif _is_cffi(function):
        address = _cffi_address(function, True)
    elif isinstance(getattr(function, "address", None), int) and hasattr(function, "native_name"):  # numba.cfunc
        _check_ctypes(function.ctypes)
        address = function.address
    else:
        raise KernelError(
            f"{function!r} is no compiled kernel; give a ctypes or cffi function pointer, a numba.cfunc, a PyCapsule or a "
            f"scipy.LowLevelCallable of signature {SIGNATURES[0]}"
        )
    if address == 0:
        raise KernelError("the kernel is a null pointer")
    return address


def _check_ctypes(function: Any) -> None:
    """Check what ctypes knows of the signature; a pointer argument may have any target type."""
    if function.restype not in (ctypes.c_int, ctypes.c_int32, ctypes.c_uint32):
        raise KernelError(f"the kernel returns {function.restype}; it must return int32, 0 for success: {SIGNATURES[0]}")
    given = function.argtypes
    if given is None:
        return
    pointers = [kind in (ctypes.c_void_p, ctypes.c_char_p) or hasattr(kind, "contents") for kind in given]
    if pointers != [True, True, True]:
        raise KernelError(f"the kernel takes {given}; it must take three pointers: {SIGNATURES[0]}")


def _capsule_address(capsule: Any) -> int:
    name, address = _open_capsule(capsule)
    if name is not None and _plain(name) not in map(_plain, SIGNATURES):
        raise KernelError(f"the capsule has the signature {name!r}; it must be {SIGNATURES[0]!r}")
    return address


def _open_capsule(capsule: Any) -> tuple[str | None, int]:
    """Return the name and the pointer of a PyCapsule."""
    api = ctypes.pythonapi
    api.PyCapsule_GetName.restype = ctypes.c_char_p
    api.PyCapsule_GetName.argtypes = [ctypes.py_object]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    name = api.PyCapsule_GetName(capsule)
    return None if name is None else name.decode(), api.PyCapsule_GetPointer(capsule, name)


def _plain(signature: str) -> str:
    """Write a signature without what says nothing about the types: Cython's own words, and spaces."""
    for word in ("__pyx_", "noexcept", "nogil", "const", " "):
        signature = signature.replace(word, "")
    return signature


def _is_cffi(value: Any) -> bool:
    return type(value).__module__ == "_cffi_backend"


def _cffi_address(value: Any, is_kernel: bool) -> int:
    """Return the address in a cffi pointer."""
    import cffi  # type: ignore[import-untyped]  # whoever gives a cffi pointer has it

    ffi = cffi.FFI()
    try:
        kind = ffi.typeof(value)
        address = int(ffi.cast("uintptr_t", value))
    except TypeError as error:
        raise KernelError(f"{value!r} is no pointer") from error
    if not is_kernel:
        if kind.kind not in ("pointer", "array", "function"):
            raise KernelError(f"{value!r} is a cffi {kind.kind}, not a pointer")
        return address
    if address and kind.kind != "function":
        raise KernelError(f"{value!r} is a cffi {kind.kind}, not a function pointer")
    if address:
        pointers = [arg.kind for arg in kind.args] == ["pointer"] * 3
        if not pointers or kind.result.cname not in ("int", "int32_t", "unsigned int", "uint32_t"):
            raise KernelError(f"the kernel is a {kind.cname}; it must be {SIGNATURES[0]}")
    return address


def _data_address(user_data: Any) -> int:
    if user_data is None:
        return 0
    if isinstance(user_data, int) and 0 <= user_data < 1 << 64:
        return user_data
    if isinstance(user_data, ctypes.c_void_p):
        return user_data.value or 0
    if isinstance(user_data, (ctypes._Pointer, ctypes.Array)):
        return ctypes.cast(user_data, ctypes.c_void_p).value or 0
    if type(user_data).__name__ == "PyCapsule":
        return _open_capsule(user_data)[1]
    if _is_cffi(user_data):
        return _cffi_address(user_data, False)
    raise KernelError(f"user data {user_data!r} has no address; give an int, a ctypes or cffi pointer, or a ctypes array")
