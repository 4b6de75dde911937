"""What counts as a compiled kernel, and how one is called."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import sysconfig
from ctypes import POINTER, c_char_p, c_double, c_int, c_int32, c_int64, c_void_p

import numpy as np
import pytest

from jd_hpc import JobDispatcher, JobError, KernelError, PayloadError
from jd_hpc.kernel import CFUNCTYPE, SIGNATURES, Kernel, resolve

SOURCE = """
#include <math.h>
#include <stdint.h>

/* a job is two doubles, the result one: their sum, times *user_data where there is any */
int32_t add(const void *job, void *result, void *user_data)
{
    const double *x = job;
    if (x[0] < 0)
        return (int32_t)x[0];
    *(double *)result = (x[0] + x[1]) * (user_data ? *(double *)user_data : 1);
    return 0;
}

int32_t not_a_number(const void *job, void *result, void *user_data)
{
    const double *x = job;
    *(double *)result = x[1] > 5 ? NAN : x[1];
    return x[0] < 0 ? 3 : 0;
}

double wrong(double x) { return x; }
"""
HOLDING = np.arange(12.0).reshape(6, 2)
SUMS = [1.0, 5.0, 9.0, 13.0, 17.0, 21.0]


def compiled_c(folder):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    (folder / "kernels.c").write_text(SOURCE)
    command = [compiler, "-O1", "-shared", "-fPIC", "kernels.c", "-o", "kernels.so"]
    subprocess.run(command, cwd=folder, check=True, timeout=60)
    return str(folder / "kernels.so")


@pytest.fixture(scope="session")
def library_path(tmp_path_factory):
    return compiled_c(tmp_path_factory.mktemp("c"))


@pytest.fixture
def library(library_path):
    """A fresh one each time: ctypes keeps restype and argtypes with the function."""
    return ctypes.CDLL(library_path)


class Sums(JobDispatcher):
    """Runs a kernel on rows of two doubles."""

    job_dtype = ("f8", 2)
    result_dtype = "f8"

    def __init__(self, kernel, jobs=HOLDING, **options):
        super().__init__(**options)
        self.kernel = kernel
        self.jobs, self.results, self.failures = jobs, {}, {}

    def reset(self):
        self.todo = list(self.jobs)

    def next_job(self):
        return self.todo.pop(0) if self.todo else None

    def process_result(self, index, job, result):
        self.results[index] = float(result)

    def process_failure(self, index, job, error):
        self.failures[index] = error

    def postprocess(self):
        return [self.results.get(index) for index in range(len(self.jobs))]


def run(kernel, **options):
    dispatcher = Sums(kernel, **options)
    got = dispatcher.run()
    assert not dispatcher.failures, dispatcher.failures
    return got


# ---- ctypes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grain", [1, 4, 100])
def test_a_ctypes_function(library, grain):
    assert run(library.add, grain=grain) == SUMS


def test_a_ctypes_function_with_its_signature_declared(library):
    for argtypes in ([c_void_p] * 3, [POINTER(c_double), POINTER(c_double), c_char_p]):
        library.add.argtypes = argtypes
        library.add.restype = c_int32
        assert run(library.add) == SUMS


@pytest.mark.parametrize("kind", ["array", "pointer", "void pointer", "integer", "null pointer", "none"])
def test_ctypes_with_user_data(library, kind):
    factor = (c_double * 1)(10)
    data, times = {
        "array": (factor, 10),
        "pointer": (ctypes.cast(factor, POINTER(c_double)), 10),
        "void pointer": (ctypes.cast(factor, c_void_p), 10),
        "integer": (ctypes.addressof(factor), 10),
        "null pointer": (c_void_p(), 1),
        "none": (None, 1),
    }[kind]
    assert run((library.add, data)) == [times * value for value in SUMS]


def test_a_callback_written_in_python():
    def add(job, result, user_data):
        x = ctypes.cast(job, POINTER(c_double))
        ctypes.cast(result, POINTER(c_double))[0] = x[0] + x[1]
        return 0

    callback = CFUNCTYPE(add)
    assert run(callback) == SUMS


def test_what_was_given_is_kept_alive(library):
    given = (library.add, (c_double * 1)(3))
    found = resolve(given)
    assert isinstance(found, Kernel)
    assert found.keep is given
    assert found.address == ctypes.cast(library.add, c_void_p).value
    assert found.user_data == ctypes.addressof(given[1])


@pytest.mark.parametrize("restype", [c_double, c_int64, c_void_p, None])
def test_ctypes_with_a_wrong_result_is_refused(library, restype):
    library.add.restype = restype
    with pytest.raises(KernelError, match=r"must return .*, 0 for success"):
        resolve(library.add)


@pytest.mark.parametrize("argtypes", [[], [c_void_p], [c_void_p] * 4, [c_int, c_void_p, c_void_p], [c_double] * 3])
def test_ctypes_with_wrong_arguments_is_refused(library, argtypes):
    library.add.argtypes = argtypes
    with pytest.raises(KernelError, match="must take three pointers"):
        resolve(library.add)


def test_null_pointers_are_refused():
    with pytest.raises(KernelError, match="null pointer"):
        resolve(CFUNCTYPE())
    with pytest.raises(KernelError, match="null pointer"):
        resolve((CFUNCTYPE(), None))


@pytest.mark.parametrize("data", ["text", 1.5, np.zeros(3), c_int(3), [1], -1, 2**70], ids=repr)
def test_user_data_without_an_address_is_refused(library, data):
    with pytest.raises(KernelError, match=r"user data .*give an int, a ctypes or cffi pointer, or a ctypes array"):
        resolve((library.add, data))


def python_function(job, result, user_data):
    return 0


@pytest.mark.parametrize(
    "given", [python_function, len, "add", 12345, object(), [1, 2]], ids=lambda it: type(it).__name__
)
def test_what_is_no_kernel_is_refused(given):
    with pytest.raises(KernelError, match=r"is no compiled kernel; give a ctypes or cffi function pointer"):
        resolve(given)


@pytest.mark.parametrize("parts", [0, 1, 3])
def test_a_tuple_is_a_pair(library, parts):
    with pytest.raises(KernelError, match="is a pair"):
        resolve((library.add,) * parts)


# ---- capsules ------------------------------------------------------------------------------------------------------


def capsule(function, name):
    """What Cython's __pyx_capi__ holds: an address under the name of its signature, which must live as long."""
    new = ctypes.pythonapi.PyCapsule_New
    new.restype = ctypes.py_object
    new.argtypes = [c_void_p, c_char_p, c_void_p]
    return new(ctypes.cast(function, c_void_p), name, None)


@pytest.mark.parametrize(
    "name",
    [
        None,
        *(text.encode() for text in SIGNATURES),
        b"int (void const *, void *, void *)",
        b"int32_t (void const *, void *, void *)",
        b"int(const void*,void*,void*)",
        b"int (const void *, void *, void *) noexcept nogil",
    ],
)
def test_a_capsule(library, name):
    assert run(capsule(library.add, name)) == SUMS


@pytest.mark.parametrize(
    "name",
    [
        b"double (double)",
        b"int (int, void *)",
        b"",
        b"int (const void *, void *)",
        b"void (const void *, void *, void *)",
    ],
)
def test_a_capsule_of_another_signature_is_refused(library, name):
    with pytest.raises(KernelError, match="the capsule has the signature"):
        resolve(capsule(library.add, name))


def test_a_capsule_with_user_data(library):
    factor = (c_double * 1)(10)
    data = capsule(factor, b"double")
    assert run((capsule(library.add, None), data)) == [10 * value for value in SUMS]


CYTHON_SOURCE = """# cython: language_level=3
from libc.stdint cimport int32_t

cdef api int add_int(const void *job, void *result, void *user_data) noexcept nogil:
    (<double *> result)[0] = (<double *> job)[0] + (<double *> job)[1]
    return 0

cdef api int32_t add_int32(const void *job, void *result, void *user_data) noexcept nogil:
    (<double *> result)[0] = (<double *> job)[0] + (<double *> job)[1]
    return 0

cdef api double other(double x) noexcept nogil:
    return x
"""


@pytest.fixture(scope="session")
def cython_kernels(tmp_path_factory):
    build = pytest.importorskip("Cython.Build")
    compiler = shutil.which("cc") or shutil.which("gcc") or pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("cython")
    (folder / "cykernels.pyx").write_text(CYTHON_SOURCE)
    build.cythonize([str(folder / "cykernels.pyx")], quiet=True)
    include, target = sysconfig.get_path("include"), folder / f"cykernels{sysconfig.get_config_var('EXT_SUFFIX')}"
    command = [
        compiler,
        "-O0",
        "-w",
        "-shared",
        "-fPIC",
        f"-I{include}",
        str(folder / "cykernels.c"),
        "-o",
        str(target),
    ]
    subprocess.run(command, cwd=folder, check=True, timeout=120)
    spec = importlib.util.spec_from_file_location("cykernels", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.__pyx_capi__


@pytest.mark.parametrize("name", ["add_int", "add_int32"])
def test_a_cython_function(cython_kernels, name):
    assert run(cython_kernels[name]) == SUMS


def test_a_cython_function_of_another_signature_is_refused(cython_kernels):
    with pytest.raises(KernelError, match=r"the capsule has the signature 'double \(double\)'"):
        resolve(cython_kernels["other"])


# ---- cffi, numba, scipy --------------------------------------------------------------------------------------------


@pytest.fixture
def ffi():
    return pytest.importorskip("cffi").FFI()


@pytest.fixture
def cffi_library(ffi, library_path):
    ffi.cdef("int32_t add(const void *job, void *result, void *user_data); double wrong(double);")
    return ffi.dlopen(library_path)


def test_a_cffi_function(cffi_library):
    assert run(cffi_library.add) == SUMS


def test_cffi_with_user_data(ffi, cffi_library):
    for data in (ffi.new("double *", 10), ffi.new("double[2]", [10, 0])):
        assert run((cffi_library.add, data)) == [10 * value for value in SUMS]
    assert run((cffi_library.add, ffi.NULL)) == SUMS


def test_a_cffi_callback(ffi):
    @ffi.callback("int(const void *, void *, void *)")
    def add(job, result, user_data):
        x = ffi.cast("const double *", job)
        ffi.cast("double *", result)[0] = x[0] + x[1]
        return 0

    assert run(add) == SUMS


def test_cffi_null_is_refused(ffi):
    with pytest.raises(KernelError, match="null pointer"):
        resolve(ffi.NULL)


def test_cffi_of_another_signature_is_refused(ffi, cffi_library):
    with pytest.raises(KernelError):
        resolve(cffi_library.wrong)


@pytest.mark.parametrize("what", ["double[3]", "double *"])
def test_cffi_data_is_no_kernel(ffi, what):
    with pytest.raises(KernelError):
        resolve(ffi.new(what))


def test_other_cffi_values_are_refused(ffi, cffi_library):
    with pytest.raises(KernelError, match="not a function pointer"):
        resolve(ffi.cast("int", 3))
    with pytest.raises(KernelError, match="not a pointer"):
        resolve((cffi_library.add, ffi.cast("int", 3)))
    with pytest.raises(KernelError):
        resolve(ffi.typeof("int"))


def test_a_numba_cfunc():
    numba = pytest.importorskip("numba")
    types = numba.types

    @numba.cfunc(types.int32(types.CPointer(types.float64), types.CPointer(types.float64), types.voidptr))
    def add(job, result, user_data):
        result[0] = job[0] + job[1]
        return 0 if job[0] < 8 else 5

    dispatcher = Sums(add)
    assert dispatcher.run() == [1, 5, 9, 13, None, None]
    assert [error.message for error in dispatcher.failures.values()] == ["the kernel returned 5"] * 2


def test_numba_of_another_signature_is_refused():
    numba = pytest.importorskip("numba")

    @numba.cfunc("float64(float64)")
    def other(x):
        return x

    with pytest.raises(KernelError, match=r"must return .*, 0 for success"):
        resolve(other)

    @numba.njit
    def jitted(job, result, user_data):
        return 0

    with pytest.raises(KernelError, match="is no compiled kernel"):
        resolve(jitted)


def test_a_scipy_low_level_callable(library):
    check_low_level_callable(pytest.importorskip("scipy").LowLevelCallable, library)


class LowLevelCallable(tuple):
    """As scipy's: a tuple that cannot be indexed, and tells its parts by name."""

    def __new__(cls, function, user_data=None):
        return tuple.__new__(cls, ("a capsule of scipy's own", function, user_data))

    def __getitem__(self, index):
        raise ValueError

    @property
    def function(self):
        return tuple.__getitem__(self, 1)

    @property
    def user_data(self):
        return tuple.__getitem__(self, 2)


def test_something_like_a_low_level_callable(library):
    check_low_level_callable(LowLevelCallable, library)


def check_low_level_callable(kind, library):
    library.add.argtypes, library.add.restype = [c_void_p] * 3, c_int
    factor = (c_double * 1)(10)
    assert run(kind(library.add)) == SUMS
    assert run(kind(library.add, ctypes.cast(factor, c_void_p))) == [10 * value for value in SUMS]


# ---- runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grain", [1, 2, 100])
def test_a_number_other_than_0_is_that_jobs_failure(library, grain):
    jobs = HOLDING.copy()
    jobs[1, 0], jobs[4, 0] = -7, -(2**31)
    dispatcher = Sums(library.add, jobs, grain=grain)
    assert dispatcher.run() == [SUMS[0], None, SUMS[2], SUMS[3], None, SUMS[5]]
    assert sorted(dispatcher.failures) == [1, 4]
    error = dispatcher.failures[1]
    assert isinstance(error, JobError)
    assert (error.index, error.slave, error.type_name, error.message) == (1, 0, "KernelError", "the kernel returned -7")
    assert isinstance(error.__cause__, KernelError)
    assert dispatcher.failures[4].message == f"the kernel returned {-(2**31)}"


def test_a_failure_ends_the_run_by_default(library):
    class Strict(Sums):
        process_failure = JobDispatcher.process_failure

    with pytest.raises(JobError, match="job 0 failed on the master: KernelError: the kernel returned -1"):
        Strict(library.add, np.array([[-1.0, 0]])).run()


@pytest.mark.parametrize("grain", [1, 100])
def test_nan_is_that_jobs_failure_where_it_is_illegal(library, grain):
    class NoNaN(Sums):
        allow_nan = False

    jobs = HOLDING.copy()
    jobs[5, 0] = -1  # fails by itself, and its NaN does not count again
    dispatcher = NoNaN(library.not_a_number, jobs, grain=grain)
    assert dispatcher.run() == [1, 3, 5, None, None, None]
    assert [dispatcher.failures[index].type_name for index in (3, 4, 5)] == [
        "PayloadError",
        "PayloadError",
        "KernelError",
    ]
    assert "contains NaN" in dispatcher.failures[3].message


@pytest.mark.parametrize("missing", ["job_dtype", "result_dtype"])
def test_a_kernel_needs_rows(library, missing):
    kind = type("NoRows", (Sums,), {missing: None})
    with pytest.raises(KernelError, match="declare both job_dtype and result_dtype"):
        kind(library.add).run()


def test_a_kernel_as_class_attribute_and_in_blocks(library):
    class Blocks(JobDispatcher):
        job_dtype = ("f8", 2)
        result_dtype = "f8"
        kernel = library.add
        asked = False

        def next_jobs(self, count):
            self.asked, first = True, not self.asked
            return HOLDING if first else None

        def process_results(self, indices, jobs, results):
            self.got = indices.tolist(), jobs.tolist(), results.tolist()

    dispatcher = Blocks(grain=10)
    dispatcher.run()
    assert dispatcher.got == (list(range(6)), HOLDING.tolist(), SUMS)


def test_a_bad_job_is_refused_before_the_kernel_sees_it(library):
    with pytest.raises(PayloadError, match="has shape"):
        Sums(library.add, np.zeros((2, 3))).run()
