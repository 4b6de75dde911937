# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Lines of a history: put together and written in blocks, without the GIL. No MPI.

The rules it keeps:

- An event is one line of JSON, and has its line before the next event happens.
- No Python code runs in here: no signal handler comes between an event and its line, or between two halves of a block.
- A write that fails is the last one. It stops nothing else; `trouble` tells of it.
"""
from libc.errno cimport EINTR, errno
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, strlen
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec
from posix.unistd cimport write as posix_write
cimport cython

cdef enum:
    BLOCK_BYTES = 1 << 16
    LINE_BYTES = 4096           # the longest line that is made here
    SPAN_BYTES = 64             # the longest "[first,count],"
    WRITE_AFTER_NS = 1_000_000_000


cdef int64_t clock_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)  # cannot fail with a clock that exists
    return <int64_t> now.tv_sec * 1_000_000_000 + now.tv_nsec


@cython.final
cdef class Lines:
    """The lines of one run's events, on their way to a file."""

    def __cinit__(self):
        self.file = -1
        self.data = <char *> malloc(BLOCK_BYTES)
        if self.data == NULL:
            raise MemoryError()

    def __dealloc__(self):
        free(self.data)

    def start(self, int descriptor):
        """The run begins: its lines go to this file, and times count from now."""
        self.file = descriptor
        self.used = self.trouble = self.is_open = 0
        self.begun_ns = self.written_ns = clock_ns()

    def stop(self):
        """Write what waits. No line comes after this."""
        self.flush()
        self.file = -1

    # ---- the events of every batch -----------------------------------------------------------------------------------

    cpdef int sent(self, int slave, int slot, int64_t first, int count, int attempt) noexcept nogil:
        """A batch went out to a slave; 0 is the master itself."""
        self.begin_line()
        self.put(b'sent"')
        return self.put_batch(slave, slot, first, count, attempt)

    cpdef int result(self, int verdict, int slave, int slot, int64_t first, int count, int attempt) noexcept nogil:
        """An answer came in, and this is the scheduler's verdict."""
        self.begin_line()
        self.put(b'accepted"' if verdict == 0 else b'late"' if verdict == 1 else b'refused"')
        return self.put_batch(slave, slot, first, count, attempt)

    cpdef int delivered(self, int64_t first, int64_t count) noexcept nogil:
        """The results of these jobs are given to the user. What follows at once is told in the same line."""
        if self.is_open and first == self.span_first + self.span_count:
            self.span_count += count
            return 0
        if self.is_open:
            self.put_span()
            if self.used > self.line_limit:
                self.close_deliveries()
        if not self.is_open:
            self.begin_line()
            self.put(b'delivered","jobs":[')
            self.is_open = True
            self.line_limit = self.used + LINE_BYTES - 4 * SPAN_BYTES
        else:
            self.put(b",")
        self.span_first = first
        self.span_count = count
        return 0

    # ---- all others --------------------------------------------------------------------------------------------------

    def add(self, bytes tail):
        """An event of another kind: what follows `"e":"` in its line, of any length. It is written at once."""
        cdef const char *text = tail
        cdef int64_t size = len(tail)
        self.begin_line()
        if size > LINE_BYTES:
            self.write(self.data, self.used)
            self.used = 0
            self.write(text, size)
        else:
            memcpy(self.data + self.used, text, size)
            self.used += size
        self.flush()

    cpdef int flush(self) noexcept nogil:
        """Write what waits."""
        self.close_deliveries()
        self.written_ns = clock_ns()
        self.write(self.data, self.used)
        self.used = 0
        return 0

    cpdef int flush_in_time(self) noexcept nogil:
        """Write what waits, if it waits for a second."""
        if clock_ns() - self.written_ns > WRITE_AFTER_NS:
            self.flush()
        return 0

    # ---- inside ------------------------------------------------------------------------------------------------------

    cdef int begin_line(self) noexcept nogil:
        """Make room, and put the time and all that comes before the event's name."""
        cdef int64_t since_us
        self.close_deliveries()
        self.now_ns = clock_ns()
        if self.used > BLOCK_BYTES - LINE_BYTES - 4 * SPAN_BYTES or self.now_ns - self.written_ns > WRITE_AFTER_NS:
            self.flush()
        since_us = (self.now_ns - self.begun_ns) // 1000
        self.put(b'{"t":')
        self.put_number(since_us // 1_000_000)
        self.put(b".")
        self.put_digits(since_us % 1_000_000, 6)
        return self.put(b',"e":"')

    cdef int close_deliveries(self) noexcept nogil:
        """The line of deliveries ends, if there is one."""
        if self.is_open:
            self.put_span()
            self.put(b"]}\n")
            self.is_open = False
        return 0

    cdef int put_batch(self, int slave, int slot, int64_t first, int count, int attempt) noexcept nogil:
        self.put(b',"slave":')
        self.put_number(slave)
        self.put(b',"slot":')
        self.put_number(slot)
        self.put(b',"first":')
        self.put_number(first)
        self.put(b',"count":')
        self.put_number(count)
        self.put(b',"attempt":')
        self.put_number(attempt)
        return self.put(b"}\n")

    cdef int put_span(self) noexcept nogil:
        if self.span_count == 0:
            return 0
        self.put(b"[")
        self.put_number(self.span_first)
        self.put(b",")
        self.put_number(self.span_count)
        self.span_count = 0
        return self.put(b"]")

    cdef int put(self, const char *text) noexcept nogil:
        cdef size_t size = strlen(text)
        memcpy(self.data + self.used, text, size)
        self.used += size
        return 0

    cdef int put_number(self, int64_t number) noexcept nogil:
        if number < 0:
            self.put(b"-")
            number = -number
        return self.put_digits(number, 1)

    cdef int put_digits(self, int64_t number, int least) noexcept nogil:
        """A number that is not negative, with zeros in front if it has fewer digits than `least`."""
        cdef char digits[24]
        cdef int at = 24
        while number > 0 or 24 - at < least:
            at -= 1
            digits[at] = <char> (48 + number % 10)
            number //= 10
        memcpy(self.data + self.used, &digits[at], 24 - at)
        self.used += 24 - at
        return 0

    cdef int write(self, const char *data, int64_t size) noexcept nogil:
        cdef ssize_t written
        while size > 0 and self.file >= 0:
            written = posix_write(self.file, data, size)
            if written < 0 and errno == EINTR:
                continue
            if written < 0:
                self.trouble = errno
                self.file = -1
                return 0
            data += written
            size -= written
        return 0
