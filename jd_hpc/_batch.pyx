# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Rows of numbers, the buffers they travel in, and the evaluation of a batch of jobs. No MPI.

The rules it keeps:

- A hook may keep whatever it is given. A buffer that somebody still refers to (`Buffer.kept`) is left to them and replaced,
  so nothing is ever copied in case somebody might.
- What runs a batch in a process of its own (isolate.py) can tell afterwards how far it came: the job that runs is noted before it
  does, and its failure is told before the next one runs.
- What a hook returns either is exactly what was declared, or is refused (payload.py): never cut, broadcast or wrapped.
"""
from cpython.object cimport PyObject, PyTypeObject
from cpython.ref cimport Py_INCREF
from libc.stdint cimport int32_t, int64_t, uint64_t, uintptr_t
from libc.string cimport memcpy, memset
cimport cython
cimport numpy as cnp

import numpy as np

from jd_hpc.errors import KernelError, PayloadError
from jd_hpc.payload import as_rows, check_finite

cdef extern from *:
    int64_t __atomic_load_n(int64_t *number, int order) nogil
    void __atomic_store_n(int64_t *number, int64_t value, int order) nogil
    int __ATOMIC_ACQUIRE
    int __ATOMIC_RELEASE

cdef extern from "sched.h" nogil:
    int sched_yield()

cdef extern from "Python.h":
    Py_ssize_t Py_REFCNT(PyObject *held)  # takes a pointer: passing an object would count the argument itself

cdef extern from "numpy/arrayobject.h":
    object PyArray_Scalar(void *data, cnp.PyArray_Descr *dtype, PyObject *base)  # base NULL: copies the data
    bint PyArray_EquivTypes(cnp.PyArray_Descr *one, cnp.PyArray_Descr *other)

    object PyArray_NewFromDescr(PyTypeObject *subtype, cnp.PyArray_Descr *dtype, int axes, const cnp.npy_intp *lengths,
                                const cnp.npy_intp *strides, void *data, int flags, PyObject *like)

cnp.import_array()


cdef class Rows:
    """How one row of a numeric payload lies in memory.

    Parameters
    ----------
    dtype : numpy.dtype
        The row's dtype; a subarray dtype gives the row a shape.
    """

    def __init__(self, dtype):
        self.dtype = dtype
        self.base = dtype.base
        self.shape = dtype.shape
        self.row_bytes = dtype.itemsize
        self.axes = len(dtype.shape)
        if self.axes > MOST_AXES:
            raise PayloadError("a row of %s has %d axes; more than %d are not supported" % (dtype, self.axes, MOST_AXES))
        for axis, length in enumerate(dtype.shape):
            self.lengths[axis] = length
        self.is_double = dtype == np.dtype("f8") and dtype.isnative

    cdef int put(self, char *where, object value, str what) except -1:
        """Write one row to `where`, or raise PayloadError, which says `what` it was."""
        cdef cnp.ndarray array
        if self.is_double and isinstance(value, float):
            (<double *> where)[0] = value
            return 0
        if cnp.PyArray_CheckExact(value):
            array = value
            if cnp.PyArray_NBYTES(array) == self.row_bytes and cnp.PyArray_IS_C_CONTIGUOUS(array) \
                    and self.same_kind(array) and self.same_shape(array, 0):
                memcpy(where, cnp.PyArray_DATA(array), self.row_bytes)
                return 0
        array = as_rows(value, self.dtype, (), what)
        memcpy(where, cnp.PyArray_DATA(array), self.row_bytes)
        return 0

    cdef bint same_kind(self, cnp.ndarray array) noexcept:
        cdef cnp.PyArray_Descr *given = cnp.PyArray_DESCR(array)
        return given == <cnp.PyArray_Descr *> self.base or PyArray_EquivTypes(given, <cnp.PyArray_Descr *> self.base)

    cdef bint same_shape(self, cnp.ndarray array, int lead) noexcept:
        """Whether the array has the row's shape behind its first `lead` axes."""
        cdef int axis
        if cnp.PyArray_NDIM(array) != lead + self.axes:
            return False
        for axis in range(self.axes):
            if cnp.PyArray_DIM(array, lead + axis) != self.lengths[axis]:
                return False
        return True

    cdef object take(self, const char *where):
        """A copy of the row at `where`, as indexing an array of rows would give it: a scalar, a record or an array."""
        cdef cnp.ndarray array
        if self.axes == 0:
            return PyArray_Scalar(<void *> where, <cnp.PyArray_Descr *> self.base, NULL)
        Py_INCREF(self.base)  # PyArray_NewFromDescr takes this reference over
        array = PyArray_NewFromDescr(<PyTypeObject *> cnp.ndarray, <cnp.PyArray_Descr *> self.base, self.axes, self.lengths,
                                     NULL, NULL, 0, NULL)
        memcpy(cnp.PyArray_DATA(array), where, self.row_bytes)
        return array

    def write(self, cnp.ndarray rows, int64_t at, object value, str what):
        """Make `value` row `at` of an array of rows, or raise PayloadError, which says `what` it was."""
        self.put(self.place(rows, at), value, what)

    def read(self, cnp.ndarray rows, int64_t at):
        """A copy of row `at`: a scalar, a record or an array."""
        return self.take(self.place(rows, at))

    cdef char *place(self, cnp.ndarray rows, int64_t at) except NULL:
        if not cnp.PyArray_IS_C_CONTIGUOUS(rows) or not 0 <= at < cnp.PyArray_NBYTES(rows) // self.row_bytes:
            raise IndexError("row %d of %d bytes in one piece" % (at, cnp.PyArray_NBYTES(rows)))
        return <char *> cnp.PyArray_DATA(rows) + at * self.row_bytes

    cdef cnp.ndarray as_block(self, object value, str what):
        """`value` as a contiguous array of rows, itself if it is one, or PayloadError."""
        cdef cnp.ndarray array
        if cnp.PyArray_CheckExact(value):
            array = value
            if cnp.PyArray_IS_C_CONTIGUOUS(array) and self.same_kind(array) and self.same_shape(array, 1):
                return array
        return as_rows(value, self.dtype, (len(value),), what)


cdef class Buffer:
    """Bytes that MPI reads or writes, and the rows in them.

    Parameters
    ----------
    size : int
        Bytes.
    codec : Rows or None
        Whose rows lie in it, from byte `offset` on.
    writeable : bool
        Whether a hook may write to the rows.
    memory : None or numpy.ndarray
        The bytes, if they are not to be its own: `size` of uint8.
    """

    def __init__(self, int64_t size, Rows codec=None, int64_t offset=0, bint writeable=False, cnp.ndarray memory=None):
        self.size = size
        self.codec = codec
        self.offset = offset
        self.writeable = writeable
        if memory is not None and (memory.dtype != "u1" or memory.nbytes != size or not memory.flags.c_contiguous):
            raise ValueError("a buffer of %d bytes needs so many bytes in one piece" % size)
        self.memory = np.empty(size, "u1") if memory is None else memory[:]
        self.data = <char *> cnp.PyArray_DATA(self.memory)
        self.rows = None
        if codec is not None:
            self.memory.flags.writeable = writeable
            self.rows = np.ndarray(((size - offset) // codec.row_bytes,), codec.dtype, self.memory, offset)

    cpdef bint kept(self) noexcept:
        """Whether anybody else still refers to these bytes: more than this object, and `rows`, whose base they are.

        Of bytes that are not its own nobody can tell: no hook may see those.
        """
        if self.rows is None:
            return Py_REFCNT(<PyObject *> self.memory) > 1
        return Py_REFCNT(<PyObject *> self.memory) > 2 or Py_REFCNT(<PyObject *> self.rows) > 1

    cdef Buffer like(self):
        """A fresh one of the same kind."""
        return Buffer(self.size, self.codec, self.offset, self.writeable)

    cdef Buffer unshared(self):
        """Itself, or a fresh one if somebody holds this one."""
        return self.like() if self.kept() else self


@cython.final
cdef class SharedNumber:
    """A number in memory that two processes share. Whoever sees a value sees all that was written before it was set.

    Parameters
    ----------
    memory : numpy.ndarray
        int64, one axis.
    at : int
        Which of them it is.
    """

    def __init__(self, int64_t[::1] memory, int at):
        if not 0 <= at < memory.shape[0]:
            raise IndexError("number %d of %d" % (at, memory.shape[0]))
        self.memory = memory
        self.number = &memory[at]

    def get(self):
        """Return it."""
        return __atomic_load_n(self.number, __ATOMIC_ACQUIRE)

    def set(self, int64_t value):
        """Set it."""
        __atomic_store_n(self.number, value, __ATOMIC_RELEASE)

    def becomes(self, int64_t value, int64_t most_ns):
        """Whether it becomes `value` within `most_ns`; until then the core goes to whoever wants it."""
        cdef int64_t end_ns
        cdef bint it_is
        with nogil:
            end_ns = monotonic_ns() + most_ns
            it_is = __atomic_load_n(self.number, __ATOMIC_ACQUIRE) == value
            while not it_is and monotonic_ns() < end_ns:
                sched_yield()
                it_is = __atomic_load_n(self.number, __ATOMIC_ACQUIRE) == value
        return it_is


cdef class Evaluator:
    """Runs the jobs of a batch through the user's hooks, or through the compiled kernel.

    Parameters
    ----------
    process_job, process_jobs : callable
        The hooks; `process_jobs` is None where the single form is to be used.
    job_rows, result_rows : Rows or None
        None stands for Python objects.
    allow_nan : bool
        Whether results may contain NaN.
    kernel : None or (object, int, int)
        What keeps the kernel alive, its address, and the address of its user data.
    stream : callable, optional
        Takes a job's number and returns its random stream; then `process_job` is called with (job, stream).
    owner : optional
        Before `process_jobs` is called, the attribute `first_index` of this becomes the number of the block's first job.
    """

    def __init__(self, process_job, process_jobs, Rows job_rows, Rows result_rows, bint allow_nan, kernel=None, stream=None,
                 owner=None):
        self.process_job = process_job
        self.process_jobs = process_jobs
        self.job_rows = job_rows
        self.result_rows = result_rows
        self.allow_nan = allow_nan
        self.kernel = kernel
        self.stream = stream
        self.owner = owner
        self.function = NULL
        self.user_data = NULL
        if kernel is not None:
            self.function = <kernel_t> <uintptr_t> kernel[1]
            self.user_data = <void *> <uintptr_t> kernel[2]
        self.running = &self.own_running

    def close(self):
        """Give back what it needed; there is nothing here."""

    def watch(self, SharedNumber running, on_failure, codes):
        """Leave a trace of every batch from now on, for whoever finds it unfinished.

        Parameters
        ----------
        running : SharedNumber
            Becomes the offset of the job that runs, and `count` when all have; the block form leaves it alone.
        on_failure : callable
            Called with (offset, exception) before the next job runs; a kernel's and a block's failures are returned only.
        codes : numpy.ndarray or None
            int32, as long as a batch: gets what the kernel returned.
        """
        self.watched = running
        self.running = running.number
        self.on_failure = on_failure
        self.codes = codes

    cdef int run_kernel(self, const char *jobs, char *results, int count, int32_t *codes) noexcept nogil:
        """Call the kernel for every row; note what it returned, and return how many calls failed."""
        cdef int i, failed = 0
        cdef int64_t job_bytes = self.job_rows.row_bytes, result_bytes = self.result_rows.row_bytes
        for i in range(count):
            codes[i] = self.function(jobs + i * job_bytes, results + i * result_bytes, self.user_data)
            if codes[i] != 0:
                failed += 1
                memset(results + i * result_bytes, 0, result_bytes)
        return failed

    cdef int run_watched(self, const char *jobs, char *results, int count, int32_t *codes) noexcept nogil:
        """The same, and note which call it is: run_kernel has no time for that."""
        cdef int i, failed = 0
        for i in range(count):
            self.running[0] = i
            failed += self.run_kernel(jobs + i * self.job_rows.row_bytes, results + i * self.result_rows.row_bytes, 1, codes + i)
        self.running[0] = count
        return failed

    cpdef list evaluate(self, object jobs, int count, Buffer out, list results, int64_t first=0):
        """Run the first `count` of `jobs`; they have the numbers from `first` on.

        Numeric results are written to the rows of `out`, objects to the list `results` (of length `count`). Returns the failures as
        (offset, exception). KeyboardInterrupt is not a job's failure: it passes through.
        """
        cdef list failures = []
        if self.function != NULL:
            self._kernel(jobs, count, out, failures)
        elif self.process_jobs is not None:
            self._block(jobs, count, out, results, first, failures)
        else:
            self._singly(jobs, count, out, results, first, failures)
        return failures

    cdef int _singly(self, object jobs, int count, Buffer out, list results, int64_t first, list failures) except -1:
        cdef int i
        cdef char *where
        cdef object result
        for i in range(count):
            self.running[0] = i
            try:
                result = self.process_job(jobs[i]) if self.stream is None else self.process_job(jobs[i], self.stream(first + i))
                if self.result_rows is None:
                    results[i] = result
                else:
                    where = out.data + out.offset + i * self.result_rows.row_bytes
                    self.result_rows.put(where, result, "what process_job returned")
                    if not self.allow_nan:
                        check_finite(out.rows[i:i + 1], "what process_job returned")
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                failures.append((i, error))
                if self.on_failure is not None:
                    self.on_failure(i, error)
        self.running[0] = count
        return 0

    cdef int _block(self, object jobs, int count, Buffer out, list results, int64_t first, list failures) except -1:
        """A block that raises fails as a whole: nobody can tell which of its jobs did it."""
        cdef int i
        cdef object given = results if self.result_rows is None else out.rows[:count]
        try:
            if self.owner is not None:
                self.owner.first_index = first
            returned = self.process_jobs(jobs[:count], given)
            if returned is not None and returned is not given:
                raise PayloadError("process_jobs returned a %s; it must fill `results` and return None" % type(returned).__name__)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            failures.extend([(i, error) for i in range(count)])
            return 0
        if self.result_rows is None:
            if len(results) != count:
                error = ValueError("process_jobs changed the length of results from %d to %d" % (count, len(results)))
                failures.extend([(i, error) for i in range(count)])
        else:
            self.check_nan(count, out, failures)
        return 0

    cdef int _kernel(self, object jobs, int count, Buffer out, list failures) except -1:
        cdef cnp.ndarray rows = jobs
        cdef int32_t[::1] codes = np.zeros(count, "i4") if self.codes is None else self.codes
        cdef char *where = <char *> cnp.PyArray_DATA(rows)
        cdef int failed
        with nogil:
            if self.watched is None:
                failed = self.run_kernel(where, out.data + out.offset, count, &codes[0])
            else:
                failed = self.run_watched(where, out.data + out.offset, count, &codes[0])
        if failed:
            failures.extend(kernel_failures(codes[:count]))
        self.check_nan(count, out, failures)
        return 0

    cpdef int check_nan(self, int count, Buffer out, list failures) except -1:
        """Add a failure for each of the first `count` results that contains NaN, where that is illegal."""
        cdef int i
        if self.allow_nan:
            return 0
        for i in range(count):
            try:
                check_finite(out.rows[i:i + 1], "the result")
            except ValueError as error:
                failures.append((i, error))
        return 0


cdef uint64_t fingerprint(const char *data, int64_t size) noexcept nogil:
    """Multiplying by an odd number and shifting down keep all of what went in; the rest spreads it over all bits."""
    cdef uint64_t mixed = <uint64_t> size * <uint64_t> 0x9E3779B97F4A7C15, word
    while size > 0:
        word = 0
        memcpy(&word, data, 8 if size >= 8 else size)
        mixed = (mixed ^ word) * <uint64_t> 0xD6E8FEB86659FD93
        mixed ^= mixed >> 32
        data += 8
        size -= 8
    mixed *= <uint64_t> 0xD6E8FEB86659FD93
    return mixed ^ (mixed >> 32)


def fingerprints(cnp.ndarray rows):
    """A hash of 64 bits of the bytes of every row: it tells jobs apart, and is no protection against malice."""
    cdef int64_t at, count = len(rows), row_bytes
    cdef cnp.ndarray out = np.empty(count, "u8")
    cdef uint64_t *hashes = <uint64_t *> cnp.PyArray_DATA(out)
    cdef const char *data = <const char *> cnp.PyArray_DATA(rows)
    if not cnp.PyArray_IS_C_CONTIGUOUS(rows):
        raise ValueError("rows must lie in one piece")
    row_bytes = cnp.PyArray_NBYTES(rows) // max(count, 1)
    with nogil:
        for at in range(count):
            hashes[at] = fingerprint(data + at * row_bytes, row_bytes)
    return out


def kernel_failures(codes):
    """The failures of a kernel's calls, as (offset, exception), from what the calls returned."""
    return [(i, KernelError("the kernel returned %d" % code)) for i, code in enumerate(codes) if code]
