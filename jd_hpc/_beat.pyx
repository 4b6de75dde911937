# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The beat of a slave: a C thread that sends one byte per period, whatever Python does meanwhile. No MPI.

The rules it keeps:

- The thread touches no Python object and never needs the GIL: a job that holds the GIL for minutes does not stop it. What it
  shares with the object that started it is one C struct, behind one mutex.
- Every signal is blocked in it, so that Ctrl-C and the launcher's signals reach the main thread.
- It never blocks on the network: a beat that finds no room is left out, since the bytes before it say the same.
- A thread ends with its process and does not come along into a forked child: there nothing is locked, sent or waited for.
"""
from libc.errno cimport EAGAIN, EINTR, EINVAL, ENOBUFS, ENOMEM, ETIMEDOUT, errno
from libc.stdint cimport int64_t
from libc.stdlib cimport calloc, free
from posix.signal cimport sigfillset, sigset_t
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, clockid_t, timespec
from posix.types cimport pid_t
from posix.unistd cimport getpid
cimport cython

import os
from math import isfinite

cdef extern from "<pthread.h>" nogil:
    ctypedef int pthread_t
    ctypedef struct pthread_attr_t:
        pass
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    ctypedef struct pthread_condattr_t:
        pass
    int pthread_attr_init(pthread_attr_t *attributes)
    int pthread_attr_setstacksize(pthread_attr_t *attributes, size_t size)
    int pthread_attr_destroy(pthread_attr_t *attributes)
    int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *) noexcept nogil, void *given)
    int pthread_join(pthread_t thread, void **returned)
    int pthread_mutex_init(pthread_mutex_t *mutex, const void *attributes)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)
    int pthread_mutex_destroy(pthread_mutex_t *mutex)
    int pthread_condattr_init(pthread_condattr_t *attributes)
    int pthread_condattr_setclock(pthread_condattr_t *attributes, clockid_t clock)
    int pthread_condattr_destroy(pthread_condattr_t *attributes)
    int pthread_cond_init(pthread_cond_t *condition, const pthread_condattr_t *attributes)
    int pthread_cond_timedwait(pthread_cond_t *condition, pthread_mutex_t *mutex, const timespec *until)
    int pthread_cond_signal(pthread_cond_t *condition)
    int pthread_cond_destroy(pthread_cond_t *condition)

cdef extern from "<signal.h>" nogil:
    int SIG_BLOCK, SIG_SETMASK
    int pthread_sigmask(int how, const sigset_t *wanted, sigset_t *before)

cdef extern from "<sys/socket.h>" nogil:
    int MSG_DONTWAIT, MSG_NOSIGNAL
    ssize_t send(int fd, const void *data, size_t size, int flags)

cdef extern from *:
    """
    #ifdef __linux__
    #include <sys/prctl.h>
    /* So that top -H and a debugger tell it from the threads of MPI. */
    #define jd_name_thread(name) ((void) prctl(PR_SET_NAME, name, 0, 0, 0))
    #else
    #define jd_name_thread(name) ((void) 0)
    #endif
    """
    void jd_name_thread(const char *name) nogil

cdef enum:
    # It calls three functions deep. Some C libraries take the thread-local storage of all loaded libraries out of this too,
    # and refuse if that leaves too little: then the default size is taken.
    STACK_BYTES = 64 * 1024
    SECOND_NS = 1_000_000_000

cdef double SHORTEST_S = 0.001  # more often would cost the slave more than it tells the master
cdef double LONGEST_S = 86400.0  # keeps all times far from the limits of 64 bits

cdef char BEAT_BYTE = c"."
BEAT = b"."


cdef struct Shared:
    # What the thread and the object that started it share. The mutex guards the flags and the limit.
    pthread_mutex_t mutex
    pthread_cond_t stop_asked
    bint stopping  # the object asks the thread to end
    bint ended  # the thread has ended, or is about to, without having been asked
    int64_t quiet_from_ns  # from this time on no beat is sent; 0: no limit
    int fd
    int64_t period_ns
    pthread_t thread


cdef int64_t now_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t> now.tv_sec * SECOND_NS + now.tv_nsec


cdef bint stop_comes_before(Shared *shared, int64_t due_ns) noexcept nogil:
    """Sleep until the time `due_ns`, or until the thread is to stop; the mutex is held on entry and on return."""
    cdef timespec due
    cdef int code = 0
    due.tv_sec = due_ns // SECOND_NS
    due.tv_nsec = due_ns % SECOND_NS
    while not shared.stopping and code == 0:  # 0 may also be a wake-up for no reason
        code = pthread_cond_timedwait(&shared.stop_asked, &shared.mutex, &due)
    return shared.stopping or code != ETIMEDOUT


cdef bint connection_broke(int fd) noexcept nogil:
    """Send one beat; say whether there is nobody left to send one to."""
    if send(fd, &BEAT_BYTE, 1, MSG_NOSIGNAL | MSG_DONTWAIT) >= 0:
        return False
    # The others pass: no room, or no memory in the system just now.
    return errno != EAGAIN and errno != EINTR and errno != ENOBUFS and errno != ENOMEM


cdef bint is_quiet(Shared *shared) noexcept nogil:
    return shared.quiet_from_ns != 0 and now_ns() >= shared.quiet_from_ns


cdef void *run(void *given) noexcept nogil:
    """The thread. Sending under the mutex is fine: it does not block."""
    cdef Shared *shared = <Shared *> given
    cdef int64_t now, due
    jd_name_thread("jd_hpc beat")
    due = now_ns() + shared.period_ns
    pthread_mutex_lock(&shared.mutex)
    while not stop_comes_before(shared, due) and (is_quiet(shared) or not connection_broke(shared.fd)):
        # From due time to due time, so that delays do not add up. Who was stopped for long does not make up for it.
        now = now_ns()
        due += shared.period_ns
        if due < now:
            due = now + shared.period_ns
    shared.ended = True
    pthread_mutex_unlock(&shared.mutex)
    return NULL


cdef int init_sync(Shared *shared) noexcept:
    """Make mutex and condition; return 0 or the error's number, and then neither is left."""
    cdef pthread_condattr_t attributes
    cdef int code = pthread_mutex_init(&shared.mutex, NULL)
    if code != 0:
        return code
    code = pthread_condattr_init(&attributes)
    if code == 0:
        code = pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC)  # whoever sets the date must not silence a slave
        if code == 0:
            code = pthread_cond_init(&shared.stop_asked, &attributes)
        pthread_condattr_destroy(&attributes)
    if code != 0:
        pthread_mutex_destroy(&shared.mutex)
    return code


cdef void destroy_sync(Shared *shared) noexcept nogil:
    pthread_cond_destroy(&shared.stop_asked)
    pthread_mutex_destroy(&shared.mutex)


cdef int create(Shared *shared, size_t stack_bytes) noexcept:
    """Start the thread, with the default stack for 0 bytes; return 0 or the error's number."""
    cdef pthread_attr_t attributes
    cdef int code = pthread_attr_init(&attributes)
    if code != 0:
        return code
    if stack_bytes:
        code = pthread_attr_setstacksize(&attributes, stack_bytes)
    if code == 0:
        code = pthread_create(&shared.thread, &attributes, run, shared)
    pthread_attr_destroy(&attributes)
    return code


cdef int start(Shared *shared) noexcept:
    """Start the thread with every signal blocked; return 0 or the error's number."""
    cdef sigset_t every, before
    cdef int code
    sigfillset(&every)
    code = pthread_sigmask(SIG_BLOCK, &every, &before)  # a thread inherits the mask of the one that makes it
    if code != 0:
        return code
    code = create(shared, STACK_BYTES)
    if code == EINVAL:
        code = create(shared, 0)
    pthread_sigmask(SIG_SETMASK, &before, NULL)  # cannot fail: it is the mask that was in force
    return code


@cython.final
cdef class Beat:
    """Send one byte to a socket every period, from a C thread that needs no GIL.

    Parameters
    ----------
    fd : int
        A connected stream socket. It stays the caller's, who must not close it before `stop` has returned.
    period_s : float
        From beat to beat, in seconds; the first comes one period from now.

    Raises
    ------
    ValueError
        If `fd` is negative, or `period_s` is not between a millisecond and a day.
    OSError
        If the system gives no further thread.
    """

    cdef Shared *shared
    cdef pid_t pid  # of the process that has the thread

    def __cinit__(self, int fd, double period_s):
        if fd < 0 or not isfinite(period_s) or not SHORTEST_S <= period_s <= LONGEST_S:
            raise ValueError(f"fd must be at least 0 and period_s {SHORTEST_S} to {LONGEST_S:.0f} s; they are {fd} and {period_s}")
        cdef Shared *shared = <Shared *> calloc(1, sizeof(Shared))
        if shared == NULL:
            raise MemoryError
        shared.fd = fd
        shared.period_ns = <int64_t> (period_s * SECOND_NS)
        self.pid = getpid()
        cdef int code = init_sync(shared)
        if code == 0:
            code = start(shared)
            if code != 0:
                destroy_sync(shared)
        if code != 0:
            free(shared)
            raise OSError(code, f"no thread for the beats: {os.strerror(code)}")
        self.shared = shared

    @property
    def alive(self):
        """Whether beats are being sent: not stopped, the connection not broken, and not the copy in a forked child."""
        if self.shared == NULL or getpid() != self.pid:
            return False
        pthread_mutex_lock(&self.shared.mutex)
        cdef bint ended = self.shared.ended
        pthread_mutex_unlock(&self.shared.mutex)
        return not ended

    def limit(self, double seconds):
        """Send no beat any more after so many seconds from now, until another limit is set; 0: no limit.

        Does nothing after `stop`.

        Raises
        ------
        ValueError
            If `seconds` is no number from 0 on.
        """
        if not seconds >= 0:
            raise ValueError(f"the limit is {seconds} s; it must be at least 0")
        if self.shared == NULL or getpid() != self.pid:
            return
        pthread_mutex_lock(&self.shared.mutex)
        self.shared.quiet_from_ns = now_ns() + <int64_t> (min(seconds, LONGEST_S) * SECOND_NS) if seconds else 0
        pthread_mutex_unlock(&self.shared.mutex)

    def stop(self):
        """End the thread and wait for its end, which comes at once. A second call does nothing."""
        self.end()

    def __dealloc__(self):
        self.end()

    cdef void end(self) noexcept:
        # Taken while the GIL is held: of two callers only one finds it.
        cdef Shared *shared = self.shared
        self.shared = NULL
        if shared == NULL:
            return
        # A forked child has a copy of the struct but no thread; it may have got the mutex locked for ever.
        if getpid() == self.pid:
            with nogil:
                pthread_mutex_lock(&shared.mutex)
                shared.stopping = True
                pthread_cond_signal(&shared.stop_asked)
                pthread_mutex_unlock(&shared.mutex)
                pthread_join(shared.thread, NULL)
                destroy_sync(shared)
        free(shared)
