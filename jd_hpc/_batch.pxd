"""Rows, buffers and the evaluation of a batch, for the compiled core. No MPI."""
from libc.stdint cimport int32_t, int64_t
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec
cimport cython
cimport numpy as cnp

ctypedef int32_t (*kernel_t)(const void *job, void *result, void *user_data) noexcept nogil


cdef enum:
    MOST_AXES = 16


cdef inline int64_t monotonic_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)  # cannot fail: this clock is always there
    return <int64_t> now.tv_sec * 1_000_000_000 + now.tv_nsec


cdef class Rows:
    cdef readonly object dtype          # the row's dtype, as declared
    cdef readonly object base           # its elements' dtype
    cdef readonly tuple shape           # the row's shape, () for scalars and records
    cdef readonly int64_t row_bytes
    cdef int axes
    cdef cnp.npy_intp lengths[MOST_AXES]
    cdef bint is_double                 # a plain native float64: the commonest result
    cdef int put(self, char *where, object value, str what) except -1
    cdef bint same_kind(self, cnp.ndarray array) noexcept
    cdef bint same_shape(self, cnp.ndarray array, int lead) noexcept
    cdef char *place(self, cnp.ndarray rows, int64_t at) except NULL
    cdef cnp.ndarray as_block(self, object value, str what)
    cdef object take(self, const char *where)


@cython.final
cdef class Buffer:
    cdef readonly cnp.ndarray memory    # uint8, owns the bytes
    cdef readonly cnp.ndarray rows      # the same bytes from `offset` on as rows, or None
    cdef char *data
    cdef readonly int64_t size
    cdef Rows codec
    cdef readonly int64_t offset
    cdef bint writeable
    cpdef bint kept(self) noexcept
    cdef Buffer like(self)
    cdef Buffer unshared(self)


@cython.final
cdef class SharedNumber:
    cdef int64_t[::1] memory            # keeps the bytes alive
    cdef int64_t *number


cdef class Evaluator:
    cdef readonly object process_job
    cdef readonly object process_jobs   # None: use the single form
    cdef readonly Rows job_rows         # None: objects
    cdef readonly Rows result_rows
    cdef readonly bint allow_nan
    cdef readonly object kernel         # what the user gave, kept alive; None: Python hooks
    cdef kernel_t function
    cdef void *user_data
    cdef int64_t *running               # the offset of the job that runs
    cdef int64_t own_running            # where that is, if nobody watches
    cdef SharedNumber watched           # keeps it alive, if somebody does
    cdef object on_failure              # told of a failure before the next job runs, or None
    cdef object codes                   # gets what the kernel returned, or None
    cdef object stream                  # gives a job's random stream by its number, or None: process_job does not get one
    cdef object owner                   # its first_index becomes the number of a block's first job, or None
    cdef int _singly(self, object jobs, int count, Buffer out, list results, int64_t first, list failures) except -1
    cdef int _block(self, object jobs, int count, Buffer out, list results, int64_t first, list failures) except -1
    cdef int _kernel(self, object jobs, int count, Buffer out, list failures) except -1
    cdef int run_kernel(self, const char *jobs, char *results, int count, int32_t *codes) noexcept nogil
    cdef int run_watched(self, const char *jobs, char *results, int count, int32_t *codes) noexcept nogil
    cpdef int check_nan(self, int count, Buffer out, list failures) except -1
    cpdef list evaluate(self, object jobs, int count, Buffer out, list results, int64_t first=*)
